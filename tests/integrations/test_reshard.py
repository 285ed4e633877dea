"""Files of 8-bit moments whose shards cut groups of 32, loaded by other numbers of processes."""

import pytest
import torch
from ranks import run_ranks
from recipes import within_int8
from sharded_runs import parameters, train
from shards import whole
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from training import same_bits

from fused_adam import FusedAdamW
from fused_adam.precision import GROUP
from fused_adam.reshard import LoadPlanner

# Uneven shards and empty ones; rows and columns that are no multiple of 32.
SHAPES = [(33, 6), (3, 34), (7,), (70,), (2, 5, 48), (16, 64)]
# Rows of whole groups, more on one rank than on the other.
WHOLE_ROWS = [(5, 64), (7, 32), (3, 2, 96)]
SHARDED = {"rows": 0, "columns": 1}


def optimizer_over(world, shapes, cut, plain=False, **options):
    mesh = None if plain else init_device_mesh("cpu", (world,))
    places = [(Shard(min(SHARDED[cut], len(shape) - 1)),) for shape in shapes]
    params = parameters(torch.bfloat16, shapes, mesh, places)
    return FusedAdamW(params, lr=1e-2, precision="split24-int8", **options)


def read(optimizer):
    """Whole decoded moments, by parameter."""
    exported = optimizer.export_fp32()["state"]["state"].values()
    return [{key: whole(entry[key]) for key in ("exp_avg", "exp_avg_sq")} for entry in exported]


def saved(rank, world, shapes, cut, folder):
    optimizer = optimizer_over(world, shapes, cut)
    train(optimizer, 3)
    checkpoint.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    return read(optimizer)


def loaded(rank, world, shapes, cut, folder, plain=False):
    optimizer = optimizer_over(world, shapes, cut, plain)
    optimizer.init_state()
    state = {"optimizer": optimizer.state_dict()}
    checkpoint.load(state, checkpoint_id=folder, planner=LoadPlanner())
    optimizer.load_state_dict(state["optimizer"])
    found = read(optimizer)
    train(optimizer, 1)  # the state can be stepped
    return found


def same_groups(shape, dim, before, after):
    """Which elements of a parameter keep all of their neighbours: bool, of its shape."""

    def groups(world):
        ids, first = [], 0
        for part in torch.zeros(shape).chunk(world, dim):
            number = first + torch.arange(part.numel()).view(part.shape) // GROUP
            ids.append(number)
            first += -(-part.numel() // GROUP)
        return torch.cat(ids, dim).flatten()

    old, new = groups(before), groups(after)
    origins = {}
    for i, j in zip(new.tolist(), old.tolist(), strict=True):
        origins.setdefault(i, set()).add(j)
    return torch.tensor([len(origins[i]) == 1 for i in new.tolist()]).view(shape)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("cut", ["rows", "columns"])
def test_moments_are_the_nearest_in_other_shards(before, after, cut, tmp_path):
    """And the same ones in every group that stays together, or comes from a single one."""
    [expected, *_] = run_ranks(before, saved, before, SHAPES, cut, str(tmp_path))
    everyone = run_ranks(after, loaded, after, SHAPES, cut, str(tmp_path))
    kept = []
    for found in everyone:
        for shape, new, old in zip(SHAPES, found, expected, strict=True):
            dim = min(SHARDED[cut], len(shape) - 1)
            same = same_groups(shape, dim, before, after)
            kept.append(same.all().item())
            for key in new:
                assert torch.equal(new[key][same], old[key][same])
            assert within_int8(new, old)
    assert not all(kept)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (4, 2)])
def test_rows_of_whole_groups_keep_their_bits(before, after, tmp_path):
    [expected, *_] = run_ranks(before, saved, before, WHOLE_ROWS, "rows", str(tmp_path))
    for found in run_ranks(after, loaded, after, WHOLE_ROWS, "rows", str(tmp_path)):
        assert same_bits(found, expected)


def test_plain_parameters_load_shards(tmp_path):
    [expected, _] = run_ranks(2, saved, 2, SHAPES, "columns", str(tmp_path))
    [found] = run_ranks(1, loaded, 1, SHAPES, "columns", str(tmp_path), True)
    assert all(map(within_int8, found, expected))


def test_the_same_shards_keep_their_bits(tmp_path):
    [expected, _] = run_ranks(2, saved, 2, SHAPES, "columns", str(tmp_path))
    for found in run_ranks(2, loaded, 2, SHAPES, "columns", str(tmp_path)):
        assert same_bits(found, expected)


def test_columns_load_as_rows(tmp_path):
    """Also where both have as many scales, so that sizes alone would not tell: (6, 6)."""
    shapes = [(6, 6), (16, 64), (10, 14)]
    [expected, _] = run_ranks(2, saved, 2, shapes, "columns", str(tmp_path))
    for found in run_ranks(2, loaded, 2, shapes, "rows", str(tmp_path)):
        assert all(map(within_int8, found, expected))


def saved_over_two_dimensions(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2))
    params = parameters(torch.bfloat16, [(6, 10)], mesh, (Shard(0), Shard(1)))
    optimizer = FusedAdamW(params, precision="split24-int8")
    train(optimizer, 1)
    checkpoint.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    replicas = parameters(torch.bfloat16, [(6, 10)], mesh, (Replicate(), Replicate()))
    other = FusedAdamW(replicas, precision="split24-int8")
    other.init_state()
    try:
        checkpoint.load(
            {"optimizer": other.state_dict()}, checkpoint_id=folder, planner=LoadPlanner()
        )
    except checkpoint.CheckpointException as error:
        return [str(failure) for failure in error.failures.values()]


def test_shards_of_two_mesh_dimensions_are_refused(tmp_path):
    for failures in run_ranks(4, saved_over_two_dimensions, str(tmp_path)):
        assert all("several mesh dimensions within groups of 32" in str(x) for x in failures)


def averaged(rank, world, folder, load):
    optimizer = optimizer_over(world, SHAPES, "columns", ema_decay=0.9)
    if load:
        optimizer.init_state()
        state = {"optimizer": optimizer.state_dict()}
        checkpoint.load(state, checkpoint_id=folder, planner=LoadPlanner())
        optimizer.load_state_dict(state["optimizer"])
    else:
        train(optimizer, 3)
        checkpoint.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    found = optimizer.ema_state_dict()
    assert all(type(e) is type(p) for e, p in zip(found.values(), optimizer.state, strict=True))
    return [whole(average) for average in found.values()]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_averages_keep_their_bits_in_other_shards(before, after, tmp_path):
    [expected, *_] = run_ranks(before, averaged, before, str(tmp_path), False)
    assert all(average.dtype == torch.float32 for average in expected)
    for found in run_ranks(after, averaged, after, str(tmp_path), True):
        assert all(map(torch.equal, found, expected))
