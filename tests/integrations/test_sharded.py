"""ZeroRedundancyOptimizer and FullyShardedDataParallel (FSDP1) over two gloo processes: the bits of
one process.
"""

import copy

import pytest
import torch
from ranks import run_ranks
from test_ddp import LR, STEPS, WORLD, alone, loss_of, network
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training import results, same_bits

from bench.harness.oracle import Options, tolerance
from fused_adam import FusedAdamW


def weights(model):
    return [{"param": param.detach().clone()} for param in model.parameters()]


def only_weights(entries):
    return [{"param": entry["param"]} for entry in entries]


def train(model, optimizer, rank, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def zero(model, options, bucket_view):
    return ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=FusedAdamW,
        parameters_as_bucket_view=bucket_view,
        lr=LR,
        **options,
    )


def with_zero(rank, options, bucket_view):
    """Train, consolidate; load into another one half-way and train the rest again."""
    model = DistributedDataParallel(network())
    optimizer = zero(model, options, bucket_view)
    train(model, optimizer, rank, 0, STEPS // 2)
    optimizer.consolidate_state_dict(to=0)
    saved = [
        copy.deepcopy((optimizer.state_dict(), model.module.state_dict())) if rank == 0 else None
    ]
    torch.distributed.broadcast_object_list(saved, 0)
    [(optimizer_state, model_state)] = saved
    train(model, optimizer, rank, STEPS // 2, STEPS)

    other = DistributedDataParallel(network())
    other.module.load_state_dict(model_state)
    resumed = zero(other, options, bucket_view)
    resumed.load_state_dict(optimizer_state)
    train(other, resumed, rank, STEPS // 2, STEPS)
    resumed.consolidate_state_dict(to=0)
    return weights(model), weights(other), resumed.state_dict() if rank == 0 else None


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_zero_redundancy_optimizer(flatten, bucket_view):
    ranks = run_ranks(WORLD, with_zero, {"flatten": flatten}, bucket_view)
    expected = alone({})
    for trained, resumed, _ in ranks:
        assert same_bits(trained, only_weights(expected)) and same_bits(
            resumed, only_weights(expected)
        )
    # What was consolidated is the whole optimizer: it loads where there is one process.
    single = FusedAdamW(network().parameters(), lr=LR)
    single.load_state_dict(ranks[0][2])
    for param, entry in zip(single.param_groups[0]["params"], expected, strict=True):
        param.data.copy_(entry["param"])
    assert same_bits(results(single), expected)


# With use_orig_params=True, on a CPU, torch 2.13 exports exp_avg_sq under the name exp_avg, for its
# own AdamW too: only weights are compared there.
def with_fsdp(rank, optimizer_class, options, use_orig_params):
    model = FullyShardedDataParallel(
        network(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = optimizer_class(model.parameters(), lr=LR, **options)
    train(model, optimizer, rank, 0, STEPS)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        whole = model.state_dict()
    if use_orig_params:
        return [{"param": value.clone()} for value in whole.values()]
    state = FullyShardedDataParallel.full_optim_state_dict(model, optimizer, rank0_only=False)[
        "state"
    ]
    return [{"param": value.clone(), **state[name]} for name, value in whole.items()]


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_fsdp1(flatten, use_orig_params):
    ranks = run_ranks(WORLD, with_fsdp, FusedAdamW, {"flatten": flatten}, use_orig_params)
    expected = only_weights(alone({})) if use_orig_params else alone({})
    assert all(same_bits(rank, expected) for rank in ranks)


def test_fsdp1_near_torch():
    ours, theirs = (
        run_ranks(WORLD, with_fsdp, cls, {}, True)[0] for cls in (FusedAdamW, torch.optim.AdamW)
    )
    atol = tolerance(torch.float32, STEPS, Options(lr=LR), roundings=4)["param"]
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine["param"], its["param"], rtol=0, atol=atol)
