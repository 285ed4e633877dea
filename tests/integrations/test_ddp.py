"""DistributedDataParallel over two gloo processes: every rank has the bits of one process that saw
all batches.
"""

import contextlib

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import results, same_bits, set_grad

from bench.harness.oracle import Options, tolerance
from fused_adam import FusedAdamW, step_in_backward

WORLD, STEPS, LR = 2, 4, 1e-2


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 33), nn.GELU(), nn.Linear(33, 3)).to(dtype)


def loss_of(model, rank, step, part=0):
    generator = torch.Generator().manual_seed(1000 * part + 10 * step + rank)
    x = torch.randn(5, 6, generator=generator).to(next(model.parameters()).dtype)
    return model(x).square().mean()


def alone(options, *, parts=1, batches=lambda rank: STEPS, skipped=(), dtype=torch.float32):
    """One process: per rank the gradients of its micro-batches, summed, then averaged over ranks as
    DDP does.
    """
    model = network(dtype)
    optimizer = FusedAdamW(model.parameters(), lr=LR, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        if step in skipped:
            continue
        params = list(model.parameters())
        sums = [torch.zeros_like(param) for param in params]
        for rank in range(WORLD):
            if step < batches(rank):
                own = [torch.zeros_like(param) for param in params]
                for part in range(parts):
                    grads = torch.autograd.grad(loss_of(model, rank, step, part), params)
                    for total, grad in zip(own, grads, strict=True):
                        total += grad
                for total, grad in zip(sums, own, strict=True):
                    total += grad / WORLD
        for param, grad in zip(params, sums, strict=True):
            set_grad(param, grad)
        optimizer.step()
    return results(optimizer)


def wrapped(options, flatten=None, dtype=torch.float32, optimizer_class=FusedAdamW, **ddp):
    """Model and optimizer; parameters are flattened before the model is wrapped, after it, or not
    at all.
    """
    model = network(dtype)
    if flatten == "before":
        optimizer = optimizer_class(model.parameters(), lr=LR, flatten=True, **options)
        return DistributedDataParallel(model, **ddp), optimizer
    model = DistributedDataParallel(model, **ddp)
    if flatten == "after":
        options = {**options, "flatten": True}
    return model, optimizer_class(model.parameters(), lr=LR, **options)


def training(rank, options, parts, how):
    model, optimizer = wrapped(options, **how)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            with model.no_sync() if part + 1 < parts else contextlib.nullcontext():
                loss_of(model, rank, step, part).backward()
        optimizer.step()
    return results(optimizer)


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("flatten", [None, "before", "after"])
def test_ranks_have_the_bits_of_one_process(flatten, bucket_view, static_graph):
    how = {"flatten": flatten, "gradient_as_bucket_view": bucket_view, "static_graph": static_graph}
    ranks = run_ranks(WORLD, training, {}, 1, how)
    expected = alone({})
    assert all(same_bits(rank, expected) for rank in ranks)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("flatten", [None, "before"])
def test_accumulation_without_synchronization(flatten, bucket_view):
    ranks = run_ranks(
        WORLD, training, {}, 2, {"flatten": flatten, "gradient_as_bucket_view": bucket_view}
    )
    expected = alone({}, parts=2)
    assert all(same_bits(rank, expected) for rank in ranks)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"max_grad_norm": 0.01}, torch.float32),
        ({"precision": "split32"}, torch.bfloat16),
        ({"precision": "split24-int8", "seed": 3}, torch.bfloat16),
    ],
    ids=str,
)
def test_clipping_and_recipes(options, dtype):
    """Random bits are keyed, not drawn: ranks stay equal."""
    ranks = run_ranks(WORLD, training, options, 1, {"flatten": "before", "dtype": dtype})
    expected = alone(options, dtype=dtype)
    assert all(same_bits(rank, expected) for rank in ranks)


def test_near_torch_under_ddp():
    ours, theirs = (
        run_ranks(WORLD, training, {}, 1, {"optimizer_class": cls})[0]
        for cls in (FusedAdamW, torch.optim.AdamW)
    )
    atol = tolerance(torch.float32, STEPS, Options(lr=LR), roundings=4)["param"]
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine["param"], its["param"], rtol=0, atol=atol)


def batches_of(rank):
    return STEPS - rank


def uneven(rank, flatten):
    model, optimizer = wrapped({}, flatten)
    with model.join():
        for step in range(batches_of(rank)):
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            optimizer.step()
    return [{"param": param.detach().clone()} for param in model.parameters()]


@pytest.mark.parametrize("flatten", [None, "before"])
def test_join_with_uneven_inputs(flatten):
    """The rank that ends early takes the parameters of the other; a batch that is missing counts as
    zeros.
    """
    ranks = run_ranks(WORLD, uneven, flatten)
    expected = [{"param": entry["param"]} for entry in alone({}, batches=batches_of)]
    assert all(same_bits(rank, expected) for rank in ranks)


def scaled(rank, options, flatten):
    model, optimizer = wrapped(options, flatten)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(STEPS):
        optimizer.zero_grad()
        overflow = float("inf") if (rank, step) == (1, 1) else 1.0
        scaler.scale(loss_of(model, rank, step) * overflow).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return results(optimizer), scales


@pytest.mark.parametrize("flatten", [None, "before"])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"skip_nonfinite": True}], ids=str)
def test_an_overflow_on_one_rank_skips_on_all(options, flatten):
    ranks = run_ranks(WORLD, scaled, options, flatten)
    expected = alone({}, skipped=(1,))
    for result, scales in ranks:
        assert same_bits(result, expected)
        assert scales == [1024.0, 512.0, 512.0, 512.0]


def releasing(rank):
    model, optimizer = wrapped({})
    with pytest.raises(RuntimeError, match="before they are averaged over processes"):
        step_in_backward(model, optimizer)


def test_steps_inside_backward_are_refused():
    run_ranks(WORLD, releasing)


class Experts(nn.Module):
    """One layer per step is used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x, step):
        return self.layers[step % 3](x).square().mean()


def unused_training(rank, flatten, views, set_to_none):
    model = DistributedDataParallel(
        Experts(), find_unused_parameters=True, gradient_as_bucket_view=views
    )
    optimizer = FusedAdamW(model.parameters(), lr=LR, flatten=flatten)
    for step in range(6):
        optimizer.zero_grad(set_to_none)
        model(torch.full((5, 6), rank + step / 4), step).backward()
        optimizer.step()
    return results(optimizer)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("views", [False, True])
def test_experts_that_no_rank_uses_rest(views, set_to_none):
    """With bucket views DDP took the zeros of flat buffers for gradients, and all experts were
    stepped.
    """
    plain, flat = (
        run_ranks(WORLD, unused_training, flatten, views, set_to_none) for flatten in (False, True)
    )
    assert [int(entry["step"]) for entry in plain[0]] == (
        [2] * 6 if set_to_none else [6, 6, 5, 5, 4, 4]
    )
    for one, other in zip(plain, flat, strict=True):
        assert same_bits(one, other)
