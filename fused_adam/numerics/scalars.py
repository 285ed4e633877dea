"""Step counters and hyper-parameters -> this step's scalars, on the host.

Python's floats are float64, like everything in the Triton twin `fused_adam_kernels/scalars.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adam_kernels import table


class HyperParams(NamedTuple):
    """One param group's values, in the order of the HYPER columns of `table.py`.

    The last two belong to the optimizer and are equal in all groups. Flags are 0.0 or 1.0.
    """

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor
    weight_decay: float | Tensor
    decoupled: float
    maximize: float
    ema_decay: float | Tensor  # 0 without an average
    max_grad_norm: float  # negative: no clipping
    # Larger norms are skipped; inf: only what is not finite; 0: nothing. A tensor is a user's own
    # limit, of any value.
    skip_grad_norm: float | Tensor


Hyper = Sequence[HyperParams]  # one per param group

LAST_STEP = 2**24  # a float32 counter stops here: 2^24 + 1 is not a float32


def is_number(value: object) -> bool:
    """Whether a param group may hold this as a number: a real one, or a tensor or array of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, Real):
        return True
    # Recognise an array by its attributes, so that numpy need not be imported.
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return kind in ("b", "i", "u", "f") and getattr(value, "size", 0) == 1


def as_number(value: Any) -> float:
    """A real number, or the element of a tensor or array of one, as a Python float."""
    # float() of an array refuses shape (1,); item() takes every shape of one element.
    return float(value.item() if hasattr(value, "item") else value)


def hyper(
    group: dict[str, Any],
    max_grad_norm: float | None = None,
    skip_grad_norm: float | Tensor | None = None,
) -> HyperParams:
    """A param group's hyper-parameters as numbers.

    Tensors stay tensors, because reading one would wait for its device. Everything else that a
    group may hold, such as numpy's numbers and arrays of one element, becomes a Python float.
    """
    ema_decay = group.get("ema_decay")
    if ema_decay is None:
        ema_decay = 0.0
    values = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], ema_decay)
    # Almost always floats already, and this is part of every step.
    lr, beta1, beta2, eps, weight_decay, ema_decay = [
        x if x.__class__ is float or isinstance(x, Tensor) else as_number(x) for x in values
    ]
    decoupled = float(bool(group["decoupled_weight_decay"]))
    maximize = float(bool(group["maximize"]))
    limit = -1.0 if max_grad_norm is None else max_grad_norm
    skip = 0.0 if skip_grad_norm is None else skip_grad_norm
    # By position: names would take 0.3 us longer.
    return HyperParams(
        lr, beta1, beta2, eps, weight_decay, decoupled, maximize, ema_decay, limit, skip
    )


def power(b: float, t: int) -> float:
    """b^t in float64, by squaring and in the kernel's order.

    `**` differs between machines. Products do not.
    """
    result = 1.0
    for i in range(t.bit_length()):
        if (t >> i) & 1:
            result = result * b
        b = b * b
    return result


def clip_coefficient(norm: float, max_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_; 1 if max_norm is negative."""
    clip = max_norm / (norm + 1e-6)
    # In this form a NaN stays.
    return 1.0 if max_norm < 0 or clip > 1.0 else clip


class GradTransform(NamedTuple):
    """What happens to a step's gradients as they are read: one-element tensors, on any device.

    Attributes:
        found_inf: not 0: the step is skipped. (GradScaler adds it up over devices, so it may be
            more than 1.)
        grad_scale: the loss scale, by which gradients are divided.
        square_sum: float64, sum of squares of all gradients as they are in memory. None if they are
            neither clipped nor checked.
        stats: float64, shape (STATS,): the last norm before clipping, how many steps were skipped,
            and the last loss scale.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    square_sum: Tensor | None = None
    stats: Tensor | None = None

    def record(self, skip_grad_norm: float | Tensor | None) -> None:
        """Record norm and skip of a step that updates nothing on this rank, without a host sync.

        The prologue does this for every other step.

        Args:
            skip_grad_norm: the norm above which a step is skipped; None: no step is.
        """
        assert self.square_sum is not None and self.stats is not None
        norm = self.square_sum[0].sqrt()
        grad_scale = torch.ones_like(norm)
        if self.grad_scale is not None:
            grad_scale = self.grad_scale.to(norm.device, torch.float64).reshape(())
        norm = norm / grad_scale
        skip = torch.zeros_like(norm, dtype=torch.bool)
        if isinstance(skip_grad_norm, Tensor):
            skip_grad_norm = skip_grad_norm.to(norm.device, torch.float64)
        if skip_grad_norm is not None:
            skip = ~norm.isfinite() | (norm > skip_grad_norm)
        if self.found_inf is not None:
            skip = skip | (self.found_inf.to(norm.device).reshape(()) != 0)
        self.stats[table.GRAD_NORM], self.stats[table.GRAD_SCALE] = norm, grad_scale
        self.stats[table.SKIPPED_STEPS] += skip

    def read(self, max_norm: float, skip_grad_norm: float | Tensor) -> GradTransformValues:
        """Copy the values to the host, which waits for their devices.

        Args:
            max_norm: largest gradient norm; negative: no clipping.
            skip_grad_norm: as in `HyperParams`.
        """
        skip = self.found_inf is not None and float(self.found_inf) != 0
        grad_scale = 1.0 if self.grad_scale is None else float(self.grad_scale)
        if self.square_sum is None:
            return GradTransformValues(grad_scale, 0.0, 1.0, skip)
        norm = math.sqrt(float(self.square_sum)) / grad_scale
        if isinstance(skip_grad_norm, Tensor) or skip_grad_norm != 0:
            # A limit of NaN, which a user's rule may come to, skips no finite norm.
            skip = skip or norm > float(skip_grad_norm) or not math.isfinite(norm)
        return GradTransformValues(grad_scale, norm, clip_coefficient(norm, max_norm), skip)


class GradTransformValues(NamedTuple):
    """A GradTransform as numbers on the host."""

    grad_scale: float
    grad_norm: float  # of the unscaled gradients, before clipping
    clip: float  # clip coefficient
    skip: bool


def scalars(step: float, hyper: HyperParams, grads: GradTransformValues) -> list[float]:
    """One parameter's scalars for step number `step` (from 1): one row of the table, in float64."""
    lr, beta1, beta2 = float(hyper.lr), float(hyper.beta1), float(hyper.beta2)
    weight_decay = float(hyper.weight_decay)
    t = int(min(step, LAST_STEP))
    sign = -1.0 if hyper.maximize else 1.0

    out = [0.0] * table.SCALARS
    out[table.STEP_SIZE] = lr / (1.0 - power(beta1, t))
    out[table.RSQRT_BC2] = 1.0 / math.sqrt(1.0 - power(beta2, t))
    out[table.ONE_MINUS_BETA1] = 1.0 - beta1
    out[table.ONE_MINUS_BETA2] = 1.0 - beta2
    out[table.BETA2] = beta2
    out[table.EPS] = float(hyper.eps)
    # Weight decay is either coupled (L2) or decoupled (LR_WD). The other one is 0.
    out[table.L2] = 0.0 if hyper.decoupled else weight_decay
    out[table.LR_WD] = lr * weight_decay if hyper.decoupled else 0.0
    out[table.ONE_MINUS_EMA_DECAY] = 1.0 - float(hyper.ema_decay)
    out[table.GRAD_MULTIPLIER] = sign / grads.grad_scale * grads.clip
    out[table.SKIP] = float(grads.skip)
    out[table.STEP_NUMBER] = float(t)
    return out
