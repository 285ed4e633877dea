"""DTensors as tests make them and read them back, whole. Knows no optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


def cut(tensor: Tensor, mesh: Any, placements: Sequence[Placement]) -> DTensor:
    """A whole tensor that every rank has, as a DTensor; without communication."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; gloo and NCCL cannot gather int16, so it goes through int32."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    if tensor.dtype == torch.int16:
        wide = DTensor.from_local(
            tensor.to_local().int(),
            tensor.device_mesh,
            tensor.placements,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        return wide.full_tensor().short()
    return tensor.detach().full_tensor()


def whole_results(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """`training.results`, every tensor whole. A collective."""
    return [
        {
            "param": whole(param),
            **{key: whole(value) for key, value in optimizer.state.get(param, {}).items()},
        }
        for group in optimizer.param_groups
        for param in group["params"]
    ]
