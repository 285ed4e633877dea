"""The optimizer's own arguments: what each may be, and which go together. What torch's may be,
torch checks.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .numerics.scalars import as_number, is_number

GRAD_ATTRIBUTES = ("grad", "main_grad", "decoupled_grad")


def as_flag(name: str, value: Any) -> bool:
    """The value of a boolean argument as a Python bool. Raises TypeError unless it is True or
    False.
    """
    # numpy's are known by what they have: numpy is not imported for that.
    numpys = getattr(getattr(value, "dtype", None), "kind", "") == "b" and value.shape == ()
    if not (isinstance(value, bool) or numpys):
        raise TypeError(f"{name}={value!r} must be True or False")
    return bool(value)


def as_max_grad_norm(value: Any) -> float | None:
    """The largest norm as a Python float, or None. Raises ValueError unless it is above 0.

    inf is allowed: as in `torch.nn.utils.clip_grad_norm_` the norm is measured, and finite
    gradients stay what they are.
    """
    if value is None:
        return None
    number = math.nan
    # A bool is a number for Python, whoever made it, but no norm.
    if (
        is_number(value)
        and not isinstance(value, bool)
        and "bool" not in str(getattr(value, "dtype", ""))
    ):
        with contextlib.suppress(OverflowError):  # an int beyond what a float holds
            number = as_number(value)
    if not number > 0:
        raise ValueError(
            f"max_grad_norm={value!r} must be a number above 0, or None for no clipping"
        )
    return number


def check_flatten(flatten: bool, differentiable: bool) -> None:
    """Raise ValueError unless parameters may be moved into flat buffers, or are not to be."""
    if flatten and differentiable:
        raise ValueError(
            "flatten=True cannot be combined with differentiable=True, because flat gradients are overwritten in place"
        )


def check_guards(max_grad_norm: float | None, skip_nonfinite: bool, differentiable: bool) -> None:
    """Raise ValueError unless this step may look at all gradients, or is not to."""
    if differentiable and (max_grad_norm is not None or skip_nonfinite):
        raise ValueError(
            "max_grad_norm and skip_nonfinite cannot be combined with differentiable=True, because that step is torch's"
        )


def check_grad_attribute(name: object, flatten: bool, differentiable: bool) -> None:
    """Raise ValueError unless gradients may be read from that attribute."""
    if name not in GRAD_ATTRIBUTES:
        raise ValueError(
            f"grad_attribute={name!r} is not known; allowed: {', '.join(map(repr, GRAD_ATTRIBUTES))}"
        )
    for other, value in (("flatten", flatten), ("differentiable", differentiable)):
        if value and name != "grad":
            raise ValueError(
                f"grad_attribute={name!r} cannot be combined with {other}=True, because that reads `grad`"
            )


def check_reduce_norm(function: object, needs_norm: bool) -> None:
    """Raise TypeError or ValueError unless it can add up norms, and some are taken."""
    if function is not None and not callable(function):
        raise TypeError(f"reduce_norm={function!r} must be a function of one tensor, or None")
    if function is not None and not needs_norm:
        raise ValueError(
            "reduce_norm is of use with max_grad_norm or skip_nonfinite, and neither is set"
        )


class ReduceNorm:
    """reduce_norm on its way through a pickle or a copy of the optimizer.

    A copied optimizer has a copy of the function, or shares it where it holds what cannot be
    copied, such as a process group. Pickle's own error would not lead to the optimizer, so what
    cannot be pickled is found here first.
    """

    _trying = False  # what is pickled only to see whether it can be

    def __init__(self, function: Callable[[Tensor], Tensor] | None) -> None:
        self.function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> ReduceNorm:
        attempt = dict(memo)  # a copy that fails halfway must not leave its halves to others
        try:
            copied = ReduceNorm(copy.deepcopy(self.function, attempt))
        except Exception:
            return self
        memo.update(attempt)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # The function may be a method of an object that holds the optimizer: once is enough.
        if self.function is not None and not ReduceNorm._trying:
            ReduceNorm._trying = True
            try:
                pickle.Pickler(_Nowhere()).dump(self.function)
            except Exception as error:
                raise pickle.PicklingError(
                    f"reduce_norm={self.function!r} cannot be pickled ({type(error).__name__}: {error}): make it a "
                    "function at the top level of a module, or set reduce_norm = None before and set it again after; "
                    "state_dict() never contains it"
                ) from error
            finally:
                ReduceNorm._trying = False
        return ReduceNorm, (self.function,)


class _Nowhere:
    """A file that forgets what is written."""

    def write(self, data: Any) -> int:
        return len(data)


def check_norm(total: object, device: torch.device) -> Tensor:
    """What reduce_norm returned; raises TypeError or ValueError unless it is what it was given.
    Reads no value.
    """
    if not isinstance(total, Tensor):
        raise TypeError(f"reduce_norm returned {total!r}, but must return a tensor")
    if (total.dtype, total.shape, total.device) != (torch.float64, (1,), device):
        raise ValueError(
            f"reduce_norm returned a tensor of {total.dtype} and shape {tuple(total.shape)} on {total.device}, "
            f"but must return one of torch.float64 and shape (1,) on {device}"
        )
    return total
