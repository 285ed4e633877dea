"""Step counters and hyper-parameters -> this step's scalars, on the host. The Triton twin has the same name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Per param group, the values of `table.py`'s hyper columns.
Hyper = Sequence[tuple[float | Tensor, ...]]

LAST_STEP = 2**24  # a float32 counter stops here: 2^24 + 1 is not a float32


def hyper(group: dict[str, Any]) -> tuple[float | Tensor, ...]:
    """A param group's values in the order of the columns of `table.py`; tensors stay tensors, nothing is read."""
    beta1, beta2 = group["betas"]
    return (
        group["lr"],
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        float(group["decoupled_weight_decay"]),
        float(group["maximize"]),
    )


def power(b: float, t: int) -> float:
    """b^t by squaring, in float64 and in this order: `**` differs between machines, these products do not."""
    r = 1.0
    for i in range(t.bit_length()):
        if (t >> i) & 1:
            r = r * b
        b = b * b
    return r


@dataclass(frozen=True, slots=True)
class Amp:
    """What a GradScaler hands over: one-element tensors, on its device.

    found_inf: not zero means that the step is skipped. (It is a sum over devices: torch's kernels test for one.)
    grad_scale: what gradients were multiplied by.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None


def scalars(step: float, values: tuple[float | Tensor, ...], grad_scale: float = 1.0) -> tuple[float, ...]:
    """One parameter's scalars for step number `step` (from 1), in float64, in the order of `table.py`."""
    lr, beta1, beta2, eps, wd, decoupled, maximize = map(float, values)
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
        (-1.0 if maximize else 1.0) / grad_scale,
        0.0,
    )
