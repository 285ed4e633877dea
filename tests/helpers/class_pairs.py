"""Both of our classes with torch's, and a small network for them to step."""

import pytest
import torch
from torch import nn

from fused_adam import FusedAdam, FusedAdamW

PAIRS = [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)]

both_classes = pytest.mark.parametrize(("ours", "theirs"), PAIRS)
flat_or_not = pytest.mark.parametrize("flatten", [False, True])


def network(dtype=torch.float64, **factory):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(1, 3, dtype=dtype), nn.Sigmoid(), nn.Linear(3, 1, dtype=dtype), nn.Sigmoid()
    )  # fmt: skip


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def backward(optimizer):
    """Gradients that depend on the parameters."""
    optimizer.zero_grad()
    sum((p * p * (i + 1)).sum() for i, p in enumerate(params_of(optimizer))).backward()
