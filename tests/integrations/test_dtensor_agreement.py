"""What the ranks of DTensor parameters settle together: sums and norms over all shards, skipped
steps, errors on all.
"""

import copy

import pytest
import torch
from ranks import run_ranks
from sharded_runs import SHAPES, parameters, train
from shards import cut, whole_results
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from training import gradient, results, same_bits

from fused_adam import FusedAdamW


def partial_gradient(rank):
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.float32, [(4, 3), (5,)], mesh, [(Replicate(),), (Shard(0),)])
    optimizer = FusedAdamW(params, lr=1e-2)
    for step in range(3):
        for index, param in enumerate(params):
            half = gradient(param, index, step) / 2
            param.grad = DTensor.from_local(half, mesh, [Partial()])
        before = params[0].grad
        optimizer.step()
        assert params[0].grad is before and before.placements[0].is_partial()
        assert not optimizer._engine.redistributed  # the sums are let go
    return whole_results(optimizer)


def test_gradients_that_are_still_to_be_summed_are():
    params = parameters(torch.float32, [(4, 3), (5,)])
    expected = FusedAdamW(params, lr=1e-2)
    train(expected, 3)
    assert all(same_bits(found, results(expected)) for found in run_ranks(2, partial_gradient))


def poisoned(rank, value, options):
    mesh = init_device_mesh("cpu", (4,))
    params = parameters(
        torch.float32, [(3, 4), (2,)], mesh, (Shard(0),)
    )  # the last rank has nothing
    optimizer = FusedAdamW(params, lr=1e-2, **options)
    train(optimizer, 1)
    before = whole_results(optimizer)
    for index, param in enumerate(params):
        grad = gradient(param, index, 1)
        grad.view(-1)[-1] = value
        param.grad = cut(grad, mesh, param.placements)
    optimizer.step()
    return (
        before,
        whole_results(optimizer),
        int(optimizer.skipped_steps),
        float(optimizer.grad_norm),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_one_bad_gradient_skips_the_step_on_every_rank(options, value):
    for before, after, skipped, norm in run_ranks(
        4, poisoned, value, {"skip_nonfinite": True, **options}
    ):
        assert same_bits(before, after) and skipped == 1 and not norm < float("inf")


def with_a_spike(rank, limit):
    mesh = init_device_mesh("cpu", (4,))
    params = parameters(torch.float32, [(3, 4), (2,)], mesh, (Shard(0),))
    optimizer = FusedAdamW(params, lr=1e-2, skip_grad_norm=limit)
    train(optimizer, 1)
    before = whole_results(optimizer)
    for index, param in enumerate(params):
        grad = gradient(param, index, 1)
        grad.view(-1)[-1] = 1e4  # on one rank
        param.grad = cut(grad, mesh, param.placements)
    optimizer.step()
    return before, whole_results(optimizer), int(optimizer.skipped_steps)


@pytest.mark.parametrize("limit", [1e3, torch.tensor(1e3)])
def test_a_spike_on_one_rank_skips_the_step_on_every_rank(limit):
    for before, after, skipped in run_ranks(4, with_a_spike, limit):
        assert same_bits(before, after) and skipped == 1


def with_reduce_norm(rank):
    """Two optimizers, as of two stages of a pipeline, on meshes of two ranks each; the norm is of
    all four.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    stage = mesh.get_local_rank("stage")
    shapes = SHAPES[:3] if stage == 0 else SHAPES[3:5]
    params = parameters(torch.float32, shapes, mesh["data"], (Shard(0),))
    optimizer = FusedAdamW(params, lr=1e-2, max_grad_norm=0.1)

    def over_stages(total):
        distributed.all_reduce(total, group=mesh.get_group("stage"))
        return total

    optimizer.reduce_norm = over_stages
    assert optimizer.reduce_norm is over_stages
    train(optimizer, 1)
    return float(optimizer.grad_norm)


def test_reduce_norm_adds_what_no_mesh_shows():
    norms = run_ranks(4, with_reduce_norm)
    squares = [
        float(gradient(param, index, 0).double().square().sum())
        for shapes in (SHAPES[:3], SHAPES[3:5])
        for index, param in enumerate(parameters(torch.float32, shapes))
    ]
    assert norms == pytest.approx([sum(squares) ** 0.5] * 4, rel=1e-7)


# --- What cannot be stepped stops every rank


def differing(rank, what):
    mesh = init_device_mesh("cpu", (2,))
    dtype = torch.bfloat16 if what == "dtype" and rank else torch.float32
    shapes = [(4, 8), (4, 8)]
    params = parameters(dtype, shapes, mesh, (Shard(0),))
    options = {}
    if what == "precision":
        options["precision"] = "native-bf16" if rank else "native-int8"
    if what == "max_grad_norm":
        options["max_grad_norm"] = 1.0 + rank
    if what == "skip_grad_norm":
        options["skip_grad_norm"] = torch.tensor(1.0) if rank else 1.0
    if what == "cautious":
        options["cautious"] = bool(rank)
    if what == "ema_decay":
        options["ema_decay"] = 0.5 if rank else None
    groups = [{"params": params}]
    if what == "group" and rank:
        groups = [{"params": params[:1]}, {"params": params[1:]}]
    if what == "parameters" and rank:
        groups = [{"params": params[:1]}]
    optimizer = FusedAdamW(groups, **options)
    for param in params:
        param.grad = cut(torch.ones(param.shape, dtype=dtype), mesh, param.placements)
    if what == "gradient" and rank:
        params[1].grad = None
    if what == "failure" and rank:
        moments = {key: torch.zeros_like(params[0]) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[params[0]] = {"step": torch.tensor(-1.0), **moments}
    before = [param.to_local().clone() for param in params]
    for _ in range(2):  # and once more
        with pytest.raises((RuntimeError, ValueError)) as error:
            optimizer.step()
    assert all(
        torch.equal(param.to_local(), value) for param, value in zip(params, before, strict=True)
    )
    return str(error.value)


@pytest.mark.parametrize(
    "what",
    [
        *("dtype", "group", "parameters", "precision", "cautious", "ema_decay"),
        *("max_grad_norm", "skip_grad_norm", "gradient"),
    ],
)
def test_ranks_that_differ_all_say_so(what):
    first, second = run_ranks(2, differing, what)
    assert first == second and "ranks differ" in first and what in first and "rank 1" in first


def test_what_stops_one_rank_stops_all():
    first, second = run_ranks(2, differing, "failure")
    assert (
        "'step' of parameter 0" in second
        and "no rank steps, because rank 1" in first
        and second in first
    )


def refused(rank):
    mesh = init_device_mesh("cpu", (2,))
    two_by_one = init_device_mesh("cpu", (2, 1))
    param = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    texts = []
    with pytest.raises(ValueError) as error:
        FusedAdamW([torch.nn.Parameter(param)])
    texts.append(str(error.value))
    sharded = parameters(torch.float32, [(4, 3)], mesh, (Shard(0),))
    optimizer = FusedAdamW(sharded)
    train(optimizer, 1)
    before = whole_results(optimizer)
    saved = optimizer.state_dict()
    for key, value in {
        "exp_avg": cut(torch.ones(4, 3), two_by_one, [Shard(0), Replicate()]),
        "exp_avg_sq": cut(torch.ones(5, 3), mesh, [Shard(0)]),
    }.items():
        wrong = copy.copy(saved)
        wrong["state"] = {0: {**saved["state"][0], key: value}}
        with pytest.raises(ValueError) as error:
            optimizer.load_state_dict(wrong)
        texts.append(str(error.value))
    with pytest.raises(ValueError) as error:
        optimizer.reduce_norm = sum
    texts.append(str(error.value))
    assert same_bits(before, whole_results(optimizer))
    return texts


def test_errors_name_what_is_wrong():
    for texts in run_ranks(2, refused):
        for text, words in zip(
            texts,
            ["Partial", "'exp_avg' lies on", "'exp_avg_sq' has shape", "max_grad_norm"],
            strict=True,
        ):
            assert words in text


def scaled(rank, overflow, options):
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.float32, [(5, 3), (3,)], mesh, (Shard(0),))
    optimizer = FusedAdamW(params, lr=1e-2, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for index, param in enumerate(params):
        grad = gradient(param, index, 0) * 1024.0
        if overflow:
            grad.view(-1)[-1] = float("inf")
        param.grad = cut(grad, mesh, param.placements)
    scaler.step(optimizer)
    scaler.update()
    return whole_results(optimizer), scaler.get_scale()


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"max_grad_norm": 0.5}], ids=str)
def test_a_grad_scaler_across_ranks(options, overflow):
    params = parameters(torch.float32, [(5, 3), (3,)])
    expected = FusedAdamW(params, lr=1e-2, **options)
    if not overflow:
        train(expected, 1)
    for found, scale in run_ranks(2, scaled, overflow, options):
        assert scale == (512.0 if overflow else 1024.0)
        if overflow:
            found = [{"param": entry["param"]} for entry in found]
        assert same_bits(found, results(expected))
