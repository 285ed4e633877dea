"""An optimizer with state of several shapes, and its entries."""

import torch
from training import parameters

from fused_adam import FusedAdamW

SHAPES = [(5,), (3, 4), (40,), (64,)]


def new(dtype=torch.float32, shapes=SHAPES, **options):
    return FusedAdamW(parameters(dtype, shapes), lr=0.01, weight_decay=0.1, **options)


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def replace_all(optimizer, change):
    """What frameworks do around phases that need the device's memory."""
    for entry in optimizer.state.values():
        for key, value in entry.items():
            entry[key] = change(value)
