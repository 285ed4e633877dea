"""Steps on DTensors leave nothing behind: after a warm-up the number of Python objects stays."""

import collections
import gc
import time

import pytest
import torch
from ranks import run_ranks
from test_ddp import LR, loss_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fused_adam import FusedAdamW

WARM_UP, STEPS = 10, 40


def count_objects():
    gc.collect()
    return collections.Counter(type(each).__name__ for each in gc.get_objects())


def counts(rank, dtype, options):
    """How many objects of each type there are after the warm-up, and after all steps."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 3)).to(dtype)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = FusedAdamW(model.parameters(), lr=LR, **options)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            count_objects()  # the first count leaves caches of its own
            first = count_objects()
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()
    # gloo's own thread may hold the last sum for a moment after it is there.
    for _ in range(20):
        last = count_objects()
        if not added(first, last):
            break
        time.sleep(0.1)
    return first, last


def added(first, last):
    """Types of which there are more than before, but for the first count itself."""
    return (last - first).keys() - {"Counter"}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"max_grad_norm": 0.01, "skip_nonfinite": True}),
        (torch.bfloat16, {"precision": "split24-int8"}),
    ],
    ids=str,
)
def test_objects_do_not_accumulate(dtype, options):
    for first, last in run_ranks(2, counts, dtype, options):
        assert first["DTensor"] >= 20  # parameters and moments are among what is counted
        assert not added(first, last)
