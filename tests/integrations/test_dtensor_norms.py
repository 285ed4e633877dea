"""grad_norms() of DTensors over gloo processes: the norms of one process, in any placement."""

import pytest
import torch
from ranks import run_ranks
from sharded_runs import SHAPES, parameters, train
from shards import cut
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from training import gradient, values

from fused_adam import FusedAdamW

OPTIONS = {"max_grad_norm": 0.5}
# Against one process: sums of chunks in another order, each off by 63 * 2^-48 at most, and one
# rounding to float32.
TOLERANCE = 2.0**-23


def norms_of(optimizer):
    return {key: norm.item() for key, norm in optimizer.grad_norms().items()}


def agree(found, expected):
    return found.keys() == expected.keys() and all(
        found[key] == pytest.approx(expected[key], rel=TOLERANCE, abs=0) for key in expected
    )


def in_rows(rank, world, backend):
    mesh = init_device_mesh("cpu", (world,))
    params = parameters(torch.float32, SHAPES, mesh, (Shard(0),))
    optimizer = FusedAdamW(params, backend=backend, **OPTIONS)
    assert optimizer.grad_norms() == {}
    train(optimizer, 2)
    first = norms_of(optimizer)
    params[1].grad = params[-1].grad = None
    optimizer.step()
    return first, norms_of(optimizer)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_shards_in_rows(world, backend):
    """Uneven ones and empty ones, and afterwards some parameters without a gradient."""
    alone = FusedAdamW(parameters(torch.float32, SHAPES), **OPTIONS)
    train(alone, 2)
    expected = norms_of(alone)
    without = {key: norm for key, norm in expected.items() if key not in (1, len(SHAPES) - 1)}
    everyone = run_ranks(world, in_rows, world, backend)
    assert all(agree(a, expected) and agree(b, without) for a, b in everyone)
    assert all(pair == everyone[0] for pair in everyone)


PLACES = [
    (Replicate(), Replicate()),
    (Replicate(), Shard(0)),
    (Shard(1), Replicate()),
    (Shard(0), Shard(1)),
    (Shard(0), Shard(0)),
    None,
]
SQUARE = [(8, 6)] * len(PLACES)


def square(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    params = parameters(torch.float32, SQUARE, mesh, PLACES)
    within = cut(values((6, 3), 99, torch.float32), mesh["inner"], (Shard(0),))
    params.append(torch.nn.Parameter(within))
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    optimizer = FusedAdamW(named, **OPTIONS)
    train(optimizer, 1)
    return norms_of(optimizer)


def test_replicas_count_once_on_several_meshes():
    params = [*parameters(torch.float32, SQUARE), values((6, 3), 99, torch.float32)]
    alone = FusedAdamW([(f"p{i}", param) for i, param in enumerate(params)], **OPTIONS)
    train(alone, 1)
    expected = norms_of(alone)
    assert list(expected) == [f"p{i}" for i in range(len(PLACES) + 1)]
    assert all(agree(found, expected) for found in run_ranks(4, square))


def scaled(rank):
    """Rank 1 has no gradient at all in the second step, and takes part."""
    mesh = init_device_mesh("cpu", (2,))
    [param] = parameters(torch.float32, [(6, 5)], mesh, (Shard(0),))
    optimizer = FusedAdamW([param], **OPTIONS)
    optimizer.grad_scale = torch.tensor(8.0)
    found = []
    for step in range(2):
        param.grad = cut(8 * gradient(param, 0, step), mesh, (Shard(0),))
        if step == 1 and rank == 1:
            param.grad = None
        optimizer.step()
        found.append(norms_of(optimizer))
    return found


def test_with_a_scale_and_a_rank_without_gradients():
    [param] = parameters(torch.float32, [(6, 5)])
    whole, half = gradient(param, 0, 0).double().norm(), gradient(param, 0, 1)[:3].double().norm()
    ranks = run_ranks(2, scaled)
    for first, _ in ranks:
        assert agree(first, {0: whole.item()})
    assert agree(ranks[0][1], {0: half.item()}) and ranks[1][1] == {}
