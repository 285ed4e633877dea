"""Precision recipes: what reaches the weights over many steps, and what users write into them."""

import pytest
import torch
from recipes import BF16, FP16, every_backend, members, parameters, train, trained, weights
from torch import nn
from training import gradient, results, same_bits, values

from fused_adam import FusedAdam, FusedAdamW

# Trajectories
# ------------------------------------------------------------------------------------------------


def test_split32_and_master32_are_fp32_training():
    """1000 steps on the same gradients: weights and moments are those of float32 parameters, bit
    for bit.
    """
    start = [values((40,), 1, BF16), values((3, 7), 2, BF16)]
    runs = {}
    for name in ("split32", "master32", None):
        params = [nn.Parameter(x.clone() if name else x.float()) for x in start]
        optimizer = FusedAdamW(params, lr=1e-3, weight_decay=0.1, amsgrad=True, precision=name)
        for step in range(1000):
            for i, p in enumerate(params):
                p.grad = values(p.shape, 10 * step + i, BF16).to(p.dtype)
            optimizer.step()
        exported = optimizer.export_fp32()
        runs[name] = [
            {"weight": weight, **entry}
            for weight, entry in zip(
                exported["params"].values(), exported["state"]["state"].values(), strict=True
            )
        ]
        for p, found in zip(params, runs[name], strict=True):
            assert torch.equal(p.detach(), found["weight"].to(p.dtype))  # no exact tie among these
    assert same_bits(runs["split32"], runs[None]) and same_bits(runs["master32"], runs[None])


@pytest.mark.parametrize("precision", ["sr-bf16", "split24-bf16", "split32-bf16"])
def test_decay_alone_arrives(precision):
    """lr * wd = 1e-4 is a fortieth of a bfloat16's last place: torch's own bf16 parameters would
    not move.
    """
    p = nn.Parameter(torch.linspace(1, 2, 1024).bfloat16())
    p.grad = torch.zeros_like(p)
    start = p.detach().float()
    optimizer = FusedAdamW([p], lr=1e-3, weight_decay=0.1, precision=precision)
    for _ in range(2000):
        optimizer.step()
    factor = (p.detach().double().sum() / start.double().sum()).item()
    assert abs(factor / (1 - 1e-4) ** 2000 - 1) < 0.01


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_second_moments_do_not_go_stale(states):
    """beta2 = 0.999, 2500 steps, half of the gradients ten times smaller in the second half."""
    exact, ours = (nn.Parameter(torch.ones(1024)) for _ in range(2))
    optimizers = [
        FusedAdam([exact], lr=1e-6),
        FusedAdam([ours], lr=1e-6, precision=f"native-{states}"),
    ]
    generator = torch.Generator().manual_seed(1)
    deviation = 1e-3 * torch.exp(0.5 * torch.randn(1024, generator=generator))
    for step in range(2500):
        if step == 1250:
            deviation[::2] /= 10
        exact.grad = ours.grad = deviation * (0.1 + torch.randn(1024, generator=generator))
        for optimizer in optimizers:
            optimizer.step()
    want, got = (o.export_fp32()["state"]["state"][0]["exp_avg_sq"] for o in optimizers)
    ratio = got.double() / want.double()
    for part in (ratio[::2], ratio[1::2]):
        assert 0.98 < part.mean() < 1.02


# Writes from outside
# ------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    "precision", ["master32", "split32", "split24-bf16", "split24-int8", "sr-bf16"]
)
def test_what_a_user_writes_into_a_parameter_counts(precision, backend):
    """Between steps, by any way: the next step starts from it. What was not written keeps its lower
    bits.
    """

    def run(write):
        optimizer = trained(precision, 3, [(64,)], backend=backend, amsgrad=False)
        [p] = members(optimizer)
        if write:
            p.data[:16] = 3.0
            with torch.no_grad():
                p[16:32].zero_()
                p[32:48].copy_(p[32:48].clone())
        p.grad = torch.zeros_like(p)
        for key, value in optimizer.state[p].items():
            value.zero_() if key.startswith("exp_avg") else None
        # No update, and a decay of nearly nothing: what the step started from is what it stores.
        optimizer.param_groups[0].update(lr=1e-30, weight_decay=1.0)
        before = p.detach().clone()
        optimizer.step()
        return optimizer, before

    (touched, before), (left, _) = run(True), run(False)
    p = members(touched)[0].detach()
    assert torch.equal(p, before)
    [weight], [expected] = weights(touched), weights(left)
    assert torch.equal(weight[32:], expected[32:])
    # To within half of bfloat16's last place; a zero is a zero.
    assert (weight[:16] - 3.0).abs().max() <= 2**-7
    assert weight[16:32].abs().max() < 1e-40
    if precision == "master32":
        assert torch.equal(weight[:32], p[:32].float())


@every_backend
@pytest.mark.parametrize("precision", ["split32", "split24-bf16", "master32"])
def test_masks_after_every_step(precision, backend):
    """Pruning: `p.data.mul_(mask)`. A zero over a negative remainder would be a NaN."""
    optimizer = trained(precision, 0, [(64,)], backend=backend)
    [p] = members(optimizer)
    mask = (torch.arange(64) % 2 == 0).to(BF16)
    for step in range(6):
        train(optimizer, 1, first=step)
        p.data.mul_(mask)
    assert p.isfinite().all() and torch.equal(p != 0, mask != 0)
    train(optimizer, 1, first=6)
    assert p.isfinite().all() and p.abs().max() < 4


def test_weights_of_another_model_count():
    """A checkpoint's master weights do not undo what the model was loaded with."""
    a = trained("master32", 3, [(64,)])
    b = FusedAdamW(parameters(BF16, [(64,)], seed=99), lr=1e-2, precision="master32")
    mine = members(b)[0].detach().float()
    b.load_state_dict(a.state_dict())
    train(b, 1, first=3)
    assert (weights(b)[0] - mine).abs().max() < 0.05


@every_backend
@pytest.mark.parametrize("precision", ["split24-int8", "native-int8", "master32-int8"])
def test_a_nan_spoils_its_own_group_and_can_be_undone(precision, backend):
    """Groups of 32: the rest goes on; a good checkpoint brings everything back, the group's unused
    end included.
    """
    optimizer = trained(precision, 2, [(70,)], backend=backend)
    [p] = members(optimizer)
    good, start = {**optimizer.state_dict()}, p.detach().clone()
    good = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, good
    )
    p.grad = gradient(p, 0, 2)
    p.grad[65] = float("nan")
    optimizer.step()
    clean = trained(precision, 3, [(70,)])
    assert p[:64].isfinite().all() and p[65].isnan()
    assert torch.equal(p[:64], members(clean)[0][:64])
    train(optimizer, 1, first=3)
    with torch.no_grad():
        p.copy_(start)
    optimizer.load_state_dict(good)
    train(optimizer, 1, first=2)
    assert same_bits(results(optimizer), results(clean))


@pytest.mark.parametrize("precision", ["split24-int8", "split32-int8", "master32-int8"])
def test_what_lies_behind_the_end_reaches_no_group(precision):
    """There 0 / (0 + eps) is NaN with an eps of 0, and decay would bring it into the gradient."""
    options = {"optimizer_class": FusedAdam, "shapes": [(70,)], "eps": 0.0, "dtype": BF16}
    kernel = trained(precision, 4, backend="triton", **options)
    reference = trained(precision, 4, backend="reference", **options)
    assert same_bits(results(kernel), results(reference))
    assert weights(kernel)[0].isfinite().all()


@every_backend
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_master_weights_begin_as_the_parameters(dtype, backend):
    """Also where the first step is of size zero, as torch.distributed.checkpoint takes one to have
    some state.
    """
    p = nn.Parameter(torch.tensor([1.5, -0.0, 3.0, 0.0], dtype=dtype))
    optimizer = FusedAdamW([p], lr=0.0, precision="master32", backend=backend)
    p.grad = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=dtype)
    optimizer.step()
    master = optimizer.state[p]["master_weight"]
    assert torch.equal(master.view(torch.int32), p.detach().float().view(torch.int32))
