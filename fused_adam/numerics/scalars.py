"""Step counters and hyper-parameters -> this step's scalars, on the host. The Triton twin has the
same name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fused_adam_kernels import table

# Per param group, the values of `table.py`'s hyper columns.
Hyper = Sequence[tuple[float | Tensor, ...]]

LAST_STEP = 2**24  # a float32 counter stops here: 2^24 + 1 is not a float32


def is_number(value: object) -> bool:
    """Whether a param group may hold this as a number: a real one, or a tensor or array of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, Real):
        return True
    # An array is known by what it has: numpy is not imported for that.
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return kind in ("b", "i", "u", "f") and getattr(value, "size", 0) == 1


def as_number(value: Any) -> float:
    """A real number, or the element of a tensor or array of one, as a Python float."""
    # float() of an array refuses shape (1,); item() takes every shape of one element.
    return float(value.item() if hasattr(value, "item") else value)


def hyper(
    group: dict[str, Any], max_grad_norm: float | None = None, skip_nonfinite: bool = False
) -> tuple[float | Tensor, ...]:
    """A param group's values in the order of the columns of `table.py`.

    Tensors stay tensors and are not read; whatever else a group holds, such as numpy's numbers and
    arrays of one element, becomes a Python float.
    """
    beta1, beta2 = group["betas"]
    values = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
    return (
        # Almost always floats already, and this is part of every step.
        *(x if x.__class__ is float or isinstance(x, Tensor) else as_number(x) for x in values),
        float(bool(group["decoupled_weight_decay"])),
        float(bool(group["maximize"])),
        -1.0 if max_grad_norm is None else max_grad_norm,
        float(skip_nonfinite),
    )


def power(b: float, t: int) -> float:
    """b^t by squaring, in float64 and in this order: `**` differs between machines, these products
    do not.
    """
    r = 1.0
    for i in range(t.bit_length()):
        if (t >> i) & 1:
            r = r * b
        b = b * b
    return r


@dataclass(frozen=True, slots=True)
class GradTransform:
    """What a step's gradients go through: one-element tensors, on any device.

    found_inf: not zero means that the step is skipped. (It is a sum over devices: torch's kernels
        test for one.)
    grad_scale: what gradients were multiplied by.
    square_sum: float64, of all gradients as they are in memory, if they are clipped or checked.
    stats: float64, shape (STATS,): the last norm before clipping, and how many steps were skipped.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    square_sum: Tensor | None = None
    stats: Tensor | None = None

    def record(self, skip_nonfinite: bool) -> None:
        """Note norm and skip of a step that has nothing to update here, as a prologue would; waits
        for no device.
        """
        assert self.square_sum is not None and self.stats is not None
        norm = self.square_sum[0].sqrt()
        if self.grad_scale is not None:
            norm = norm / self.grad_scale.to(norm.device, torch.float64).reshape(())
        skip = ~norm.isfinite() if skip_nonfinite else torch.zeros_like(norm, dtype=torch.bool)
        if self.found_inf is not None:
            skip = skip | (self.found_inf.to(norm.device).reshape(()) != 0)
        self.stats[table.GRAD_NORM] = norm
        self.stats[table.SKIPPED_STEPS] += skip

    def read(self, max_norm: float, skip_nonfinite: bool) -> GradTransformValues:
        """Bring it all to the host: it waits for the device, if there is one."""
        skip = self.found_inf is not None and float(self.found_inf) != 0
        grad_scale = 1.0 if self.grad_scale is None else float(self.grad_scale)
        if self.square_sum is None:
            return GradTransformValues(grad_scale, 0.0, 1.0, skip)
        norm = math.sqrt(float(self.square_sum)) / grad_scale
        skip = skip or (skip_nonfinite and not math.isfinite(norm))
        return GradTransformValues(grad_scale, norm, clip_coefficient(norm, max_norm), skip)


@dataclass(frozen=True, slots=True)
class GradTransformValues:
    """A guard as numbers: gradients are divided by grad_scale and multiplied by clip, or the step
    is skipped.
    """

    grad_scale: float
    grad_norm: float
    clip: float
    skip: bool


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by, as in torch's clip_grad_norm_; one if max_norm
    is negative.
    """
    clip = max_norm / (norm + 1e-6)
    return 1.0 if max_norm < 0 or clip > 1.0 else clip


def scalars(
    step: float, values: tuple[float | Tensor, ...], seen: GradTransformValues
) -> tuple[float, ...]:
    """One parameter's scalars for step number `step` (from 1), in float64, in the order of
    `table.py`.
    """
    lr, beta1, beta2, eps, wd, decoupled, maximize, *_ = map(float, values)
    t = int(min(step, LAST_STEP))
    return (
        lr / (1.0 - power(beta1, t)),
        1.0 / math.sqrt(1.0 - power(beta2, t)),
        1.0 - beta1,
        1.0 - beta2,
        beta2,
        eps,
        0.0 if decoupled else wd,
        lr * wd if decoupled else 0.0,
        (-1.0 if maximize else 1.0) / seen.grad_scale * seen.clip,
        0.0,
        float(t),
    )
