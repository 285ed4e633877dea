"""Checks of the optimizer's own arguments: what each may be, and which can be combined.

torch checks the arguments that torch.optim.Adam has, too.
"""

from __future__ import annotations

import contextlib
import copy
import math
import operator
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import distributed
from .numerics.scalars import as_number, is_number
from .precision import as_seed, parse
from .torch_private import is_traceable_wrapper_subclass

STREAM_BYTES = 256 << 20  # takes 5 ms at 50 GB/s: long next to a launch, short next to a step
# 1024 elements, the least that a buffer has to hold, take 24 kB with the largest state.
LEAST_STREAM_BYTES = 1 << 20
GRAD_ATTRIBUTES = ("grad", "main_grad", "decoupled_grad")


def refuse(name: str, value: object, other: str, reason: str) -> NoReturn:
    """Raise ValueError: "<name>=<value> cannot be combined with <other>, because <reason>"."""
    raise ValueError(f"{name}={value!r} cannot be combined with {other}, because {reason}")


def as_flag(name: str, value: Any) -> bool:
    """Return a boolean argument as a Python bool.

    Raises TypeError unless it is True or False, of Python or numpy.
    """
    # numpy is not imported for the question: its arrays are known by their attributes.
    is_numpy = getattr(getattr(value, "dtype", None), "kind", "") == "b" and value.shape == ()
    if not (isinstance(value, bool) or is_numpy):
        raise TypeError(f"{name}={value!r} must be True or False")
    return bool(value)


def as_state_device(value: Any) -> str | None:
    """Return where state lies: "cpu", or None for the parameters' device.

    Raises ValueError unless it is one of the two; `torch.device("cpu")` is.
    """
    if value is None or value == "cpu" or value == torch.device("cpu"):
        return None if value is None else "cpu"
    raise ValueError(
        f"state_device={value!r} must be 'cpu', for pinned memory of the host, or None, for the "
        "parameters' device"
    )


def as_stream_bytes(value: Any) -> int:
    """Return the size of a buffer as a Python int. Raises ValueError unless it is large enough."""
    number = 0
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    if number < LEAST_STREAM_BYTES:
        raise ValueError(
            f"stream_bytes={value!r} must be a whole number of bytes from {LEAST_STREAM_BYTES} "
            "(1 MiB) on"
        )
    return number


def as_max_grad_norm(value: Any) -> float | None:
    """Return the largest norm as a Python float, or None.

    inf is allowed: as in `torch.nn.utils.clip_grad_norm_`, the norm is measured and finite
    gradients are left alone. Raises ValueError unless it is above 0.
    """
    if value is None:
        return None
    number = _as_float(value)
    if not number > 0:
        raise ValueError(
            f"max_grad_norm={value!r} must be a number above 0, or None for no clipping"
        )
    return number


def as_skip_grad_norm(value: Any) -> float | Tensor | None:
    """Return the norm above which steps are skipped: a Python float, the user's tensor, or None.

    A tensor may change at any time, so its value is not looked at. Raises ValueError unless it is a
    real float of shape () that has a value, and unless a number is above 0.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        if _is_scalar(value):
            return value
    else:
        number = _as_float(value)
        if number > 0:
            return number
    raise ValueError(
        f"skip_grad_norm={value!r} must be a number above 0, a float tensor of shape () on the "
        "parameters' device, or None to skip no spikes"
    )


def as_ema_decay(value: Any) -> float | Tensor | None:
    """Return the decay of the weights' averages: a Python float, the user's tensor, or None.

    0 makes the average the weight itself, where a warm-up of the decay begins. 1 would keep the
    first weight for ever. A tensor may change at any time, so its value is not looked at.

    Raises ValueError unless it is a real float of shape () that has a value, and unless a number is
    at least 0 and below 1.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        if _is_scalar(value):
            return value
    else:
        number = _as_float(value)
        if 0 <= number < 1:
            return number
    raise ValueError(
        f"ema_decay={value!r} must be a number of at least 0 and below 1, a float tensor of shape "
        "() on the parameters' device, or None for no average"
    )


def _is_scalar(tensor: Tensor) -> bool:
    """Whether it is a real float of shape () that has a value here."""
    is_scalar = tensor.dtype.is_floating_point and tensor.shape == () and not tensor.is_meta
    return is_scalar and not distributed.is_sharded(tensor)


def _as_float(value: Any) -> float:
    """A value as a Python float; NaN, which is within no bounds, if it is no number."""
    # Python's bools, numpy's and torch's are numbers, but not what anybody means here.
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    if is_number(value) and not is_bool:
        with contextlib.suppress(OverflowError):  # an int beyond what a float holds
            return as_number(value)
    return math.nan


def check_combinations(
    flatten: bool,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    skip_grad_norm: float | Tensor | None,
    grad_attribute: object,
    differentiable: bool,
    cautious: bool,
    ema_decay: float | Tensor | None,
    state_device: str | None,
) -> None:
    """Raise ValueError if these arguments of one optimizer cannot be combined."""
    if grad_attribute not in GRAD_ATTRIBUTES:
        allowed = ", ".join(map(repr, GRAD_ATTRIBUTES))
        raise ValueError(f"grad_attribute={grad_attribute!r} is not known; allowed: {allowed}")
    if grad_attribute != "grad":
        for other, value in (("flatten", flatten), ("differentiable", differentiable)):
            if value:
                refuse("grad_attribute", grad_attribute, f"{other}=True", "that reads `grad`")
    if differentiable and flatten:
        reason = "flat gradients are overwritten in place"
        refuse("flatten", flatten, "differentiable=True", reason)
    if differentiable and max_grad_norm is not None:
        refuse("max_grad_norm", max_grad_norm, "differentiable=True", "that step is torch's")
    if differentiable and skip_nonfinite:
        refuse("skip_nonfinite", skip_nonfinite, "differentiable=True", "that step is torch's")
    if differentiable and skip_grad_norm is not None:
        refuse("skip_grad_norm", skip_grad_norm, "differentiable=True", "that step is torch's")
    if differentiable and cautious:
        refuse("cautious", cautious, "differentiable=True", "that step is torch's")
    if differentiable and ema_decay is not None:
        refuse("ema_decay", ema_decay, "differentiable=True", "that step is torch's")
    if differentiable and state_device is not None:
        refuse("state_device", state_device, "differentiable=True", "that step is torch's")


def check_cautious(group: Mapping[str, Any], decoupled: object) -> None:
    """Raise TypeError unless the group's `cautious` is True or False, or it has none.

    Raises ValueError if it is True and the decay is not `decoupled`.
    """
    cautious = as_flag("cautious", group.get("cautious", False))
    if cautious and not decoupled:
        reason = (
            "coupled (L2) decay is part of the gradient; use FusedAdamW, or FusedAdam with "
            "decoupled_weight_decay=True"
        )
        refuse("cautious", cautious, "decoupled_weight_decay=False", reason)


def complete_group(
    group: dict[str, Any],
    number: int,
    names: Sequence[object],
    precision: str | None,
    seed: int,
    cautious: bool,
    ema_decay: float | Tensor | None,
    backend: str,
) -> None:
    """Give a param group the optimizer's own options unless it has them, and check it.

    Args:
        group: the group, to which "precision", "seed", "cautious" and "ema_decay" are added.
        number: its position among the groups.
        names: the names of its parameters, or their positions.
        precision, seed, cautious, ema_decay, backend: the optimizer's arguments.

    Raises TypeError or ValueError if a parameter or option of the group cannot be stepped.
    """
    if cautious:
        group.setdefault("cautious", cautious)
    if "cautious" in group:
        check_cautious(group, group["decoupled_weight_decay"])
        group["cautious"] = bool(group["cautious"])
        if group["cautious"] and group["differentiable"]:
            refuse("cautious", True, "differentiable=True", "that step is torch's")
    if ema_decay is not None:
        group.setdefault("ema_decay", ema_decay)
    if "ema_decay" in group:
        group["ema_decay"] = as_ema_decay(group["ema_decay"])
        if group["ema_decay"] is not None and group["differentiable"]:
            refuse("ema_decay", group["ema_decay"], "differentiable=True", "that step is torch's")
    # Without a recipe, groups stay as torch has them: so do their checkpoints and their repr.
    if precision is not None:
        group.setdefault("precision", precision)
    recipe = parse(group.get("precision"))
    for name, param in zip(names, group["params"], strict=True):
        # A wrapper subclass has no memory of its own: its values lie in tensors within it.
        if is_traceable_wrapper_subclass(param) and not distributed.is_sharded(param):
            raise TypeError(
                f"a parameter is a {type(param).__name__}, but must be a plain tensor or a DTensor"
            )
        distributed.check(param)
        recipe.check(param.dtype, f"parameter {name!r} of param group {number}")
    # Only recipes draw random bits, so other groups get no seed.
    if recipe.weights is None:
        return
    group["seed"] = as_seed(group.get("seed", seed))
    if backend == "compiled":
        reason = "compiled steps know no recipes"
        refuse("precision", group["precision"], f"backend={backend!r}", reason)
    if group["differentiable"]:
        refuse("precision", group["precision"], "differentiable=True", "that step is torch's")


def check_reduce_norm(function: object, needs_norm: bool) -> None:
    """Raise TypeError or ValueError unless `reduce_norm` may be set to this."""
    if function is None:
        return
    if not callable(function):
        raise TypeError(f"reduce_norm={function!r} must be a function of one tensor, or None")
    if not needs_norm:
        raise ValueError(
            "reduce_norm is of use with max_grad_norm, skip_nonfinite or skip_grad_norm, and none "
            "of them is set"
        )


def check_norm(total: object, device: torch.device) -> Tensor:
    """Return what reduce_norm returned, without reading its value.

    Raises TypeError or ValueError unless it is a tensor like the one that reduce_norm was given:
    float64, shape (1,), on the device.
    """
    if not isinstance(total, Tensor):
        raise TypeError(f"reduce_norm returned {total!r}, but must return a tensor")
    if (total.dtype, total.shape, total.device) != (torch.float64, (1,), device):
        raise ValueError(
            f"reduce_norm returned a tensor of {total.dtype} and shape {tuple(total.shape)} on "
            f"{total.device}, but must return one of torch.float64 and shape (1,) on {device}"
        )
    return total


class ReduceNorm:
    """Carries `reduce_norm` through a pickle or a copy of the optimizer.

    A copied optimizer gets a copy of the function. It shares a function that cannot be copied, as
    one that holds a process group. A function that cannot be pickled is found before pickle fails,
    because pickle's own error would not lead to the optimizer.
    """

    _probing = False  # whether a pickle is only made to see if it can be

    def __init__(self, function: Callable[[Tensor], Tensor] | None) -> None:
        self.function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> ReduceNorm:
        # In a memo of its own: a copy that fails halfway must not leave its halves to others.
        attempt = dict(memo)
        try:
            copied = ReduceNorm(copy.deepcopy(self.function, attempt))
        except Exception:
            return self
        memo.update(attempt)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # The function may be a method of an object that holds the optimizer, so the probe may come
        # here again: once is enough.
        if self.function is not None and not ReduceNorm._probing:
            ReduceNorm._probing = True
            try:
                pickle.Pickler(_NullFile()).dump(self.function)
            except Exception as error:
                raise pickle.PicklingError(
                    f"reduce_norm={self.function!r} cannot be pickled ({type(error).__name__}: "
                    f"{error}): make it a function at the top level of a module, or set "
                    "reduce_norm = None before and set it again after; state_dict() never contains "
                    "it"
                ) from error
            finally:
                ReduceNorm._probing = False
        return ReduceNorm, (self.function,)


class _NullFile:
    """A file that forgets what is written."""

    def write(self, data: Any) -> int:
        return len(data)
