"""The optimizer's own arguments: what each may be, and which go together. What torch's may be, torch checks."""

from __future__ import annotations

import torch
from torch import Tensor

GRAD_ATTRIBUTES = ("grad", "main_grad", "decoupled_grad")


def check_flatten(flatten: object, differentiable: bool) -> None:
    """Raise TypeError or ValueError unless parameters may be moved into flat buffers, or are not to be."""
    if not isinstance(flatten, bool):
        raise TypeError(f"flatten={flatten!r} must be True or False")
    if flatten and differentiable:
        raise ValueError("flatten=True does not go with differentiable=True: gradients would be overwritten in place")


def check_guards(max_grad_norm: object, skip_nonfinite: object, differentiable: bool) -> None:
    """Raise TypeError or ValueError unless the arguments that look at all gradients are what they may be."""
    number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
    if max_grad_norm is not None and not (number and max_grad_norm > 0):  # type: ignore[operator]
        raise ValueError(f"max_grad_norm={max_grad_norm!r} must be a number above 0, or None for no clipping")
    if not isinstance(skip_nonfinite, bool):
        raise TypeError(f"skip_nonfinite={skip_nonfinite!r} must be True or False")
    if differentiable and (max_grad_norm is not None or skip_nonfinite):
        raise ValueError("max_grad_norm and skip_nonfinite do not go with differentiable=True, which is torch's step")


def check_grad_attribute(name: object, flatten: bool, differentiable: bool) -> None:
    """Raise ValueError unless gradients may be read from that attribute."""
    if name not in GRAD_ATTRIBUTES:
        raise ValueError(f"grad_attribute={name!r} is not known; allowed: {', '.join(map(repr, GRAD_ATTRIBUTES))}")
    for other, value in (("flatten", flatten), ("differentiable", differentiable)):
        if value and name != "grad":
            raise ValueError(f"grad_attribute={name!r} does not go with {other}=True, which uses `grad`")


def check_reduce_norm(function: object, guards: bool) -> None:
    """Raise TypeError or ValueError unless it can add up norms, and some are taken."""
    if function is not None and not callable(function):
        raise TypeError(f"reduce_norm={function!r} must be a function of one tensor, or None")
    if function is not None and not guards:
        raise ValueError("reduce_norm is of use with max_grad_norm or skip_nonfinite, and neither is set")


def check_norm(total: object, device: torch.device) -> Tensor:
    """What reduce_norm returned; raises TypeError or ValueError unless it is what it was given. Reads no value."""
    if not isinstance(total, Tensor):
        raise TypeError(f"reduce_norm returned {total!r}, but must return a tensor")
    if (total.dtype, total.shape, total.device) != (torch.float64, (1,), device):
        raise ValueError(
            f"reduce_norm returned a tensor of {total.dtype} and shape {tuple(total.shape)} on {total.device}, "
            f"but must return one of torch.float64 and shape (1,) on {device}"
        )
    return total
