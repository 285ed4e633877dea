"""fastai's Learner: fine_tune, which freezes and unfreezes, with one learning rate per layer group;
saved and resumed.
"""

import contextlib
import functools

import fastai.callback.schedule  # noqa: F401  (gives Learner fine_tune and fit_one_cycle)
import pytest
import torch
from fastai.basics import DataLoaders, Learner, OptimWrapper, params
from torch import nn
from training import results, same_bits

from bench.harness.oracle import Options, tolerance
from fused_adam import FusedAdamW

LR, BATCHES = 1e-2, 4
EPOCHS = 2


def loss(output, target):
    return (output.float() - target.float()).square().mean()


def learner(folder, dtype, options, optimizer_class=FusedAdamW):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4 * BATCHES, 6, generator=generator).to(dtype)
    targets = torch.randn(4 * BATCHES, 3, generator=generator)
    data = torch.utils.data.TensorDataset(inputs, targets)
    loaders = [torch.utils.data.DataLoader(data, batch_size=4) for _ in range(2)]
    return Learner(
        DataLoaders(*loaders),
        model,
        loss_func=loss,
        opt_func=functools.partial(OptimWrapper, opt=optimizer_class, **options),
        splitter=lambda model: [params(model[0]), params(model[2])],
        lr=LR,
        wd=0.1,
        path=folder,
    )


@contextlib.contextmanager
def quiet(run):
    with run.no_bar(), run.no_logging():
        yield


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"flatten": True}),
        (torch.bfloat16, {"precision": "split32-bf16"}),
        (torch.bfloat16, {"precision": "split24-int8", "seed": 3}),
    ],
    ids=str,
)
def test_fine_tune_and_resume(dtype, options, tmp_path):
    """Weights and state have the bits of a training that was never stopped."""
    whole, rest = (learner(tmp_path, dtype, options) for _ in range(2))
    with quiet(whole):
        whole.fine_tune(EPOCHS, base_lr=LR, freeze_epochs=1)
        whole.save("tuned")
        whole.fit_one_cycle(1, LR)
    rest.load("tuned")
    # Unfreezing clears the state.
    assert all(entry["step"] == EPOCHS * BATCHES for entry in results(rest.opt.opt))
    with quiet(rest):
        rest.fit_one_cycle(1, LR)
    assert type(rest.opt.opt) is FusedAdamW
    assert same_bits(results(rest.opt.opt), results(whole.opt.opt))
    assert all(entry["step"] == (EPOCHS + 1) * BATCHES for entry in results(rest.opt.opt))


def test_what_is_frozen_stays(tmp_path):
    run, untouched = (learner(tmp_path, torch.float32, {}) for _ in range(2))
    with quiet(run):
        run.freeze()
        run.fit_one_cycle(1, LR)
    body, head = ([param.detach() for param in run.model[i].parameters()] for i in (0, 2))
    assert all(map(torch.equal, body, untouched.model[0].parameters()))
    assert not any(map(torch.equal, head, untouched.model[2].parameters()))
    assert len(run.opt.opt.state) == 2


def test_near_torch(tmp_path):
    trained = []
    for optimizer_class in (FusedAdamW, torch.optim.AdamW):
        run = learner(tmp_path, torch.float32, {}, optimizer_class)
        with quiet(run):
            run.fine_tune(EPOCHS, base_lr=LR, freeze_epochs=1)
        trained.append([param.detach() for param in run.model.parameters()])
    options = Options(lr=LR, weight_decay=0.1)
    atol = tolerance(torch.float32, 3 * BATCHES, options, roundings=4)["param"]
    torch.testing.assert_close(*trained, rtol=0, atol=atol)
