"""FSDP2 (fully_shard) and distributed checkpoints over gloo processes: the bits of one process,
whatever the world.
"""

import copy

import pytest
import torch
from ranks import run_ranks
from recipes import within_int8
from shards import whole, whole_results
from test_ddp import LR, STEPS, alone, loss_of, network
from test_sharded import train
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from training import results, same_bits

from fused_adam import FusedAdamW


def sharded(world, dtype=torch.float32):
    model = network(dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model


def with_fsdp2(rank, dtype, options):
    model = sharded(2, dtype)
    optimizer = FusedAdamW(model.parameters(), lr=LR, **options)
    train(model, optimizer, rank, 0, STEPS)
    return whole_results(optimizer)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"max_grad_norm": 0.01, "skip_nonfinite": True}),
        (torch.float32, {"flatten": True}),  # shards are FSDP's: they stay where they are
        (torch.bfloat16, {"precision": "split24-bf16", "seed": 5}),
    ],
    ids=str,
)
def test_fsdp2_has_the_bits_of_one_process(dtype, options):
    ranks = run_ranks(2, with_fsdp2, dtype, options)
    expected = alone(options, dtype=dtype)
    assert all(same_bits(found, expected) for found in ranks)


def two_dimensional(rank, options):
    """FSDP over tensor parallelism: rows and columns of one network over 2 x 2 processes, the rest
    of it over 2.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 32), torch.nn.GELU(), torch.nn.Linear(32, 3), torch.nn.LayerNorm(3)
    )
    reference = copy.deepcopy(model)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = FusedAdamW(model.parameters(), lr=LR, **options)
    single = FusedAdamW(reference.parameters(), lr=LR, **options)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, 0, step).backward()
        # Sums over columns have another order than in one process: the gradients are taken over,
        # not computed again.
        for mine, its in zip(reference.parameters(), model.parameters(), strict=True):
            mine.grad = its.grad.full_tensor()
        optimizer.step()
        single.step()
    return (
        whole_results(optimizer),
        results(single),
        len({param.device_mesh for param in model.parameters()}),
    )


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.01}], ids=str)
def test_fsdp2_over_tensor_parallelism(options):
    for found, expected, meshes in run_ranks(4, two_dimensional, options):
        assert meshes == 2 and same_bits(found, expected)


RECIPES = [
    (torch.float32, {}),
    (torch.float32, {"amsgrad": True}),
    (torch.float32, {"precision": "native-bf16"}),
    (torch.bfloat16, {"precision": "split32"}),
    (torch.bfloat16, {"precision": "split24-bf16"}),
    (torch.bfloat16, {"precision": "master32"}),
    (torch.bfloat16, {"precision": "sr-bf16"}),
]


def saves(rank, folder, dtype, options, flat, optimizer_class=FusedAdamW):
    """Half of the steps, into files."""
    model = sharded(2, dtype)
    optimizer = optimizer_class(model.parameters(), lr=LR, **options)
    train(model, optimizer, rank, 0, STEPS // 2)
    choice = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=choice),
    }
    checkpoint.save(state, checkpoint_id=folder)
    return whole_results(optimizer)


def loads(rank, world, folder, dtype, options, flat, finish):
    """What the files hold; or the other half of the steps."""
    model = sharded(world, dtype) if world > 1 else network(dtype)
    optimizer = FusedAdamW(model.parameters(), lr=LR, **options)
    choice = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=choice),
    }
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=choice)
    if finish:
        train(model, optimizer, rank, STEPS // 2, STEPS)
    return whole_results(optimizer)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("dtype", "options"), RECIPES, ids=str)
def test_files_of_two_ranks_load_in_one_two_and_four(dtype, options, flat, tmp_path):
    saved = run_ranks(2, saves, str(tmp_path), dtype, options, flat)[0]
    for world in (1, 4):
        for found in run_ranks(world, loads, world, str(tmp_path), dtype, options, flat, False):
            assert same_bits(found, saved)
    expected = alone(options, dtype=dtype)
    for found in run_ranks(2, loads, 2, str(tmp_path), dtype, options, flat, True):
        assert same_bits(found, expected)


@pytest.mark.parametrize("flat", [False, True])
def test_8_bit_state_cut_within_groups_loads_in_the_same_world(flat, tmp_path):
    options = {"precision": "split24-int8"}
    saved = run_ranks(2, saves, str(tmp_path), torch.bfloat16, options, flat)[0]
    for found in run_ranks(2, loads, 2, str(tmp_path), torch.bfloat16, options, flat, False):
        assert same_bits(found, saved)
    # Elsewhere it would be cut anew: torch refuses, naming the entry and both sizes.
    with pytest.raises(
        RuntimeError,
        match=r"(?s)Size mismatch.*exp_avg_ratio_scale|exp_avg_ratio_scale.*Size mismatch",
    ):
        run_ranks(1, loads, 1, str(tmp_path), torch.bfloat16, options, flat, False)


def whole_groups(rank, world, folder, write):
    """Shards that are whole groups of 32: 8-bit state fits every world."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = FusedAdamW(model.parameters(), lr=LR, precision="split24-int8")
    if write:
        for step in range(2):
            optimizer.zero_grad()
            torch.manual_seed(step)
            model(torch.randn(4, 64, dtype=torch.bfloat16)).square().mean().backward()
            optimizer.step()
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    if write:
        checkpoint.save(state, checkpoint_id=folder)
    else:
        checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return whole_results(optimizer)


def test_8_bit_state_of_whole_groups_loads_everywhere(tmp_path):
    saved = run_ranks(2, whole_groups, 2, str(tmp_path), True)[0]
    for world in (1, 4):
        assert all(
            same_bits(found, saved)
            for found in run_ranks(world, whole_groups, world, str(tmp_path), False)
        )


def test_files_of_torch_load(tmp_path):
    saved = run_ranks(2, saves, str(tmp_path), torch.float32, {}, False, torch.optim.AdamW)[0]
    for found in run_ranks(4, loads, 4, str(tmp_path), torch.float32, {}, False, False):
        assert same_bits(found, saved)


def through_full_state(rank, dtype, options):
    """From two ranks into one dict on every rank, from there into a single process and into two
    ranks again.
    """
    model = sharded(2, dtype)
    optimizer = FusedAdamW(model.parameters(), lr=LR, **options)
    train(model, optimizer, rank, 0, STEPS // 2)
    full = StateDictOptions(full_state_dict=True)
    weights, state = (
        get_model_state_dict(model, options=full),
        get_optimizer_state_dict(model, optimizer, options=full),
    )
    single = network(dtype)
    single.load_state_dict(weights)
    alone = FusedAdamW(single.parameters(), lr=LR, **options)
    set_optimizer_state_dict(single, alone, copy.deepcopy(state))
    other = sharded(2, dtype)
    resumed = FusedAdamW(other.parameters(), lr=LR, **options)
    set_model_state_dict(other, weights, options=full)
    set_optimizer_state_dict(other, resumed, state, options=full)
    return whole_results(optimizer), results(alone), whole_results(resumed)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {"precision": "split32"}),
        (torch.bfloat16, {"precision": "split24-bf16"}),
        (torch.bfloat16, {"precision": "master32"}),
    ],
    ids=str,
)
def test_full_state_dicts(dtype, options):
    for saved, single, resumed in run_ranks(2, through_full_state, dtype, options):
        assert same_bits(saved, single) and same_bits(saved, resumed)


def converted(rank):
    """A checkpoint of one recipe into another, on shards; and everything as float32."""
    model = sharded(2, torch.bfloat16)
    optimizer = FusedAdamW(model.parameters(), lr=LR, precision="split32")
    train(model, optimizer, rank, 0, 2)
    exported = optimizer.export_fp32()
    other = FusedAdamW(model.parameters(), lr=LR, precision="split24-int8")
    other.load_state_dict(optimizer.state_dict())
    again = other.export_fp32()
    return [
        {
            "param": whole(e["params"][i]),
            **{key: whole(e["state"]["state"][i][key]) for key in ("exp_avg", "exp_avg_sq")},
        }
        for e in (exported, again)
        for i in range(4)
    ]


def test_recipes_convert_on_shards():
    expected = FusedAdamW(network(torch.bfloat16).parameters(), lr=LR, precision="split32")
    trained = run_ranks(2, converted)
    assert same_bits(trained[0], trained[1])
    before, after = trained[0][:4], trained[0][4:]
    for old, new, param in zip(before, after, expected.param_groups[0]["params"], strict=True):
        assert old["param"].dtype == torch.float32 and old["param"].shape == param.shape
        # What 24 bits keep of float32.
        torch.testing.assert_close(new["param"], old["param"], rtol=2.0**-16, atol=0)
        assert within_int8(new, old)


def after_a_look(rank, look, options):
    """Tools look at the state before the first step."""
    model = sharded(2)
    optimizer = FusedAdamW(model.parameters(), lr=LR, weight_decay=0, **options)
    optimizer.init_state()
    state = look(model, optimizer)
    steps = [float(entry["step"]) for entry in optimizer.state.values()]
    before = whole_results(optimizer)
    train(model, optimizer, rank, 0, 1)
    after = whole_results(optimizer)
    first = [(new["param"] - old["param"]).abs() for old, new in zip(before, after, strict=True)]
    train(model, optimizer, rank, 1, STEPS)
    return sorted(state), steps, first, whole_results(optimizer)


def optimizer_alone(model, optimizer):
    return get_optimizer_state_dict(model, optimizer)


def model_too(model, optimizer):
    return get_state_dict(model, optimizer)[1]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("look", [optimizer_alone, model_too])
def test_a_look_at_the_state_before_training_counts_no_step(look, options):
    """Without `init_state()` torch takes a dummy step to see it, and the first update is 0.74 lr
    instead of lr.
    """
    expected = alone({"weight_decay": 0, **options})
    for keys, steps, first, found in run_ranks(2, after_a_look, look, options):
        assert keys == ["param_groups", "state"] and steps == [0.0] * 4
        for moved in first:
            # Less than lr where a gradient is so small that eps counts.
            torch.testing.assert_close(moved, torch.full_like(moved, LR), rtol=0.02, atol=0)
        assert same_bits(found, expected)
