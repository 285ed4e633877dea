"""DTensor parameters over 1, 2 and 4 gloo processes: the bits of one process, in any placement."""

import types

import hashes
import pytest
import torch
from ranks import run_ranks
from sharded_runs import FEW_SHAPES, SHAPES, in_rows, parameters, train
from shards import cut, whole, whole_results
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from training import results, same_bits, values

from bench import verify
from fused_adam import FusedAdamW

OPTIONS = [
    (torch.float32, {}),
    (torch.float32, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    (torch.float32, {"cautious": True, "weight_decay": 0.5}),
    (torch.float32, {"ema_decay": 0.9}),
    (torch.bfloat16, {"precision": "split32-bf16", "ema_decay": 0.9}),
    (torch.float64, {"max_grad_norm": 0.5}),
    (torch.float32, {"precision": "native-bf16", "seed": 7, "max_grad_norm": 0.5}),
    (torch.float16, {"precision": "master32", "skip_nonfinite": True}),
    (torch.bfloat16, {"precision": "split32"}),
    (torch.bfloat16, {"precision": "split24-bf16", "amsgrad": True}),
    (torch.bfloat16, {"precision": "sr-bf16", "seed": 2**40 + 1}),
]

# 8-bit groups are those of one process where every shard is whole groups.
WHOLE_GROUPS = [(16, 64), (128,), (4, 8, 4), (32, 32)]


def alone(dtype, options, shapes=SHAPES):
    optimizer = FusedAdamW(parameters(dtype, shapes), lr=1e-2, **options)
    train(optimizer)
    return optimizer


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=str)
def test_shards_have_the_bits_of_one_process(dtype, options, world):
    ranks = run_ranks(world, in_rows, world, dtype, options, SHAPES)
    expected = alone(dtype, options)
    for found, grad_norm in ranks:
        assert same_bits(found, results(expected))
        if expected.grad_norm is not None:  # in another order
            torch.testing.assert_close(grad_norm, expected.grad_norm, rtol=2e-7, atol=0)


@pytest.mark.parametrize("precision", ["sr-bf16", "split24-int8"])
def test_the_kernel_on_shards(precision):
    """In the interpreter; some shards do not begin at a multiple of 4 elements, as draws of random
    bits do.
    """
    shapes = FEW_SHAPES if precision == "sr-bf16" else WHOLE_GROUPS
    options = {"precision": precision, "seed": 3, "max_grad_norm": 0.5}
    ranks = run_ranks(2, in_rows, 2, torch.bfloat16, {**options, "backend": "triton"}, shapes)
    expected = results(alone(torch.bfloat16, options, shapes))
    assert all(same_bits(found, expected) for found, _ in ranks)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"precision": "native-int8"}),
        (torch.bfloat16, {"precision": "split24-int8", "amsgrad": True}),
    ],
    ids=str,
)
def test_8_bit_states_have_them_where_shards_are_whole_groups(dtype, options, world):
    ranks = run_ranks(world, in_rows, world, dtype, options, WHOLE_GROUPS)
    expected = results(alone(dtype, options, WHOLE_GROUPS))
    assert all(same_bits(found, expected) for found, _ in ranks)


def test_8_bit_states_have_them_where_one_process_holds_all():
    options = {"precision": "split24-int8"}
    [(found, _)] = run_ranks(1, in_rows, 1, torch.bfloat16, options, SHAPES)
    assert same_bits(found, results(alone(torch.bfloat16, options)))


def hashed(rank, world, steps, arguments):
    """The training of bench/verify.py over parameters that are cut."""
    only = arguments.pop("only", None)
    mesh = init_device_mesh("cpu", (world,))
    plain = verify.start("cpu", only)
    params = {
        name: torch.nn.Parameter(cut(param.detach(), mesh, (Shard(0),)))
        for name, param in plain.items()
    }
    optimizer = hashes.optimizer_of(params, **arguments)
    for step in range(steps):
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * (1 - step / 2000)
        for seed, param in enumerate(params.values()):
            wave = verify.noise(param.numel(), 100 + seed + 1000 * step).float()
            grad = (0.5 * whole(param).float() + wave).to(param.dtype)
            param.grad = cut(grad, mesh, (Shard(0),))
        optimizer.step()

    read = {name: torch.nn.Parameter(whole(param)) for name, param in params.items()}
    state = {
        read[name]: {key: whole(x) for key, x in optimizer.state[params[name]].items()}
        for name in params
    }
    return verify.digest(read, types.SimpleNamespace(state=state))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("precision", [None, "split32", "sr-bf16", "native-bf16"])
def test_the_hash_does_not_depend_on_the_world_size(precision, world):
    if precision is None:
        steps, arguments, expected = verify.SHORT_STEPS, {}, verify.SHORT_HASH
    else:
        steps, arguments = hashes.RECIPE_STEPS, hashes.of_recipe(precision)
        expected = hashes.RECIPE_HASHES[precision]
    assert run_ranks(world, hashed, world, steps, arguments) == [expected] * world


# On a mesh of 2 x 2: copies, rows, columns, both, rows within rows; and parameters that are no
# DTensors.
SQUARE = [(8, 6), (8, 6), (8, 6), (8, 6), (8, 6), (8, 6), (8, 6), (7, 5)]
PLACES = [
    (Replicate(), Replicate()),
    (Replicate(), Shard(0)),
    (Shard(1), Replicate()),
    (Shard(0), Shard(1)),
    (Shard(0), Shard(0)),
    None,
    (Shard(1), Shard(1)),
    (Shard(0), Shard(0)),
]


def square(rank, options):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    params = parameters(torch.float32, SQUARE, mesh, PLACES)
    # Of a mesh within the mesh: every row of processes has a copy.
    params += [
        torch.nn.Parameter(cut(values((6, 3), 99, torch.float32), mesh["inner"], (Shard(0),)))
    ]
    optimizer = FusedAdamW(
        [{"params": params[:4]}, {"params": params[4:], "lr": 1e-3}], lr=1e-2, **options
    )
    train(optimizer)
    return whole_results(optimizer), optimizer.grad_norm


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"skip_nonfinite": True}], ids=str)
def test_any_placement_on_several_meshes_beside_plain_parameters(options):
    ranks = run_ranks(4, square, options)
    params = [
        *parameters(torch.float32, SQUARE),
        torch.nn.Parameter(values((6, 3), 99, torch.float32)),
    ]
    expected = FusedAdamW(
        [{"params": params[:4]}, {"params": params[4:], "lr": 1e-3}], lr=1e-2, **options
    )
    train(expected)
    for found, grad_norm in ranks:
        assert same_bits(found, results(expected))
        if options:  # copies are counted once
            torch.testing.assert_close(grad_norm, expected.grad_norm, rtol=2e-7, atol=0)


def columns_with_random_bits(rank):
    """Columns draw bits of their own: no two shards the same, copies all the same."""
    mesh = init_device_mesh("cpu", (2, 2))
    value = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    params = [
        torch.nn.Parameter(cut(value, mesh, place))
        for place in [(Replicate(), Shard(1)), (Shard(1), Shard(0))]
    ]
    optimizer = FusedAdamW(params, lr=1e-3, weight_decay=0.0, precision="sr-bf16")
    for param in params:
        param.grad = cut(torch.ones_like(value), mesh, param.placements)
    optimizer.step()
    return [param.to_local().detach().clone() for param in params]


def test_random_bits_of_columns():
    ranks = run_ranks(4, columns_with_random_bits)
    left, right = ranks[0][0], ranks[1][0]
    assert 0 < (left != 1.0).float().mean() < 1 and not torch.equal(left, right)
    assert torch.equal(left, ranks[2][0]) and torch.equal(right, ranks[3][0])
    blocks = [rank[1] for rank in ranks]
    assert all(not torch.equal(blocks[i], blocks[j]) for i in range(4) for j in range(i))
