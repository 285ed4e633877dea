"""Optimizers over DTensor parameters, and their training with the gradients of one process."""

import torch
from shards import cut, whole_results
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from training import gradient, values

from fused_adam import FusedAdamW

STEPS = 4
# Uneven shards, empty ones (of 3, 2 or 1 rows), nothing at all, rows that are no whole vectors or
# fours.
SHAPES = [(33, 6), (33,), (3, 33), (3,), (2, 5, 4), (1,), (0, 4), (17, 7), (16, 64)]

FEW_SHAPES = [(33, 6), (3,), (17, 7)]


def train(optimizer, steps=STEPS, first=0):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(first, first + steps):
        for index, param in enumerate(params):
            grad = gradient(param, index, step)
            param.grad = (
                cut(grad, param.device_mesh, param.placements)
                if isinstance(param, DTensor)
                else grad
            )
        optimizer.step()


def parameters(dtype, shapes, mesh=None, placements=()):
    """Parameters sharded as `placements` say, each or all; plain ones without a mesh."""
    whole_ones = [values(shape, i, dtype) for i, shape in enumerate(shapes)]
    if mesh is None:
        return [torch.nn.Parameter(value) for value in whole_ones]
    if not isinstance(placements, list):
        placements = [placements] * len(shapes)
    return [
        torch.nn.Parameter(value if place is None else cut(value, mesh, place))
        for value, place in zip(whole_ones, placements, strict=True)
    ]


def in_rows(rank, world, dtype, options, shapes):
    mesh = init_device_mesh("cpu", (world,))
    optimizer = FusedAdamW(parameters(dtype, shapes, mesh, (Shard(0),)), lr=1e-2, **options)
    train(optimizer)
    return whole_results(optimizer), optimizer.grad_norm
