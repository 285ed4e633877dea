"""What is right: Adam in float64, written from the paper, and how far rounding may take a correct
optimizer from it. Tests and benchmark compare with it; it knows no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Hyper-parameters of Adam. `decoupled` decay makes it AdamW.

    clip: the gradients' largest global L2 norm, or None.
    capturable: the step will be captured in a CUDA graph.
    ema_decay: of averages of the weights, or None.
    """

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False
    clip: float | None = field(default=None, repr=False)
    capturable: bool = field(default=False, repr=False)
    ema_decay: float | None = field(default=None, repr=False)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of torch.optim.Adam."""
        names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
        own = {name: getattr(self, name) for name in names}
        return {**own, "decoupled_weight_decay": self.decoupled}


@dataclass(frozen=True)
class AdamWOptions(Options):
    """With the defaults of torch.optim.AdamW: what the benchmark asks every optimizer for."""

    lr: float = 1e-3
    weight_decay: float = 0.01
    decoupled: bool = True


# The formula.


def adam(param: Tensor, grads: Sequence[Tensor], o: Options) -> dict[str, Tensor]:
    """Step one parameter through `grads`, everything in float64; clipping is the caller's.

    Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019 for decoupled decay; Reddi et al. 2018
    for amsgrad, as torch computes it: the maximum of the uncorrected second moment.

    Returns param, exp_avg, exp_avg_sq and max_exp_avg_sq after the last gradient.
    """
    theta = param.detach().double()
    m, v, v_max = (torch.zeros_like(theta) for _ in range(3))
    beta1, beta2 = o.betas
    for t, grad in enumerate(grads, start=1):
        g = -grad.double() if o.maximize else grad.double()
        if o.decoupled:
            theta = theta - o.lr * o.weight_decay * theta
        else:
            g = g + o.weight_decay * theta
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        v_max = torch.maximum(v_max, v)
        v_hat = (v_max if o.amsgrad else v) / (1 - beta2**t)
        theta = theta - o.lr * (m / (1 - beta1**t)) / (v_hat.sqrt() + o.eps)
    return {"param": theta, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v_max}


def adam_model(
    params: Sequence[Tensor], steps: Sequence[Sequence[Tensor]], o: Options
) -> list[Tensor]:
    """The parameters of a whole model after `steps`, in float64, gradients clipped together.

    Args:
        params: at the start; unchanged.
        steps: per step one gradient per parameter.
    """
    clipped = [[grad.double() * clip_factor(grads, o.clip) for grad in grads] for grads in steps]
    return [
        adam(param, [grads[i] for grads in clipped], o)["param"] for i, param in enumerate(params)
    ]


def clip_factor(grads: Sequence[Tensor], max_norm: float | None) -> float:
    """What `clip_grad_norm_` multiplies these gradients by."""
    if max_norm is None:
        return 1.0
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    return min(1.0, max_norm / (norm + 1e-6))


def tolerance(
    dtype: torch.dtype, steps: int, o: Options, roundings: int = 1, largest: float = 4.0
) -> dict[str, float]:
    """How far from the float64 run rounding alone may take values after `steps` steps.

    With unit roundoff u, |param| at most P = `largest` and |grad| at most G below:
    - m keeps a share beta1 of its error and adds at most r roundings of u * G per step:
      r * u * G / (1 - beta1).
    - v adds at most r roundings of its own value per step:
      r * u * steps * G^2 / (1 - beta2) * (1 - beta2), and what the error of g brings (coupled
      decay of a rounded param): the same again.
    - p adds r roundings of u * P per step, and lr times the relative error of m / sqrt(v), whose
      size is bounded by Cauchy-Schwarz: |m| / sqrt(v) <= (1 - beta1) / sqrt((1 - beta2) *
      (1 - beta1^2 / beta2)), about 7.3.

    Args:
        dtype: of parameter and state.
        roundings: r, per stored value and step. Ours are 1; torch rounds after every operation: at
            most 4.
    """
    u = torch.finfo(dtype).eps / 2
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        u += 4 * torch.finfo(torch.float32).eps  # the arithmetic inside a step
    beta1, beta2 = o.betas
    P, G = largest, 2.0 + 4.0 * o.weight_decay
    ratio = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    relative = roundings * u * (1 / (1 - beta1) + steps)
    # A parameter's own roundings are those of storing it: half a unit each.
    stored = roundings * torch.finfo(dtype).eps / 2 * P
    return {
        "param": steps * (stored + o.lr * ratio * relative),
        "exp_avg": relative * G,
        "exp_avg_sq": 2 * relative * G * G * (1 - beta2**steps),
        "max_exp_avg_sq": 2 * relative * G * G * (1 - beta2**steps),
    }


# Two loss curves.
#
# The tolerance is derived, not picked. Two correct AdamWs hold the same formula and round
# differently. What moves every element of the model alike are the scalars of a step, of which each
# optimizer rounds two on its own to float32: the step size and the square root of the second bias
# correction. In the worst case all four errors of 2^-24 point one way, at every step: that is a
# learning rate off by a factor of 1 + 2^-22. The roundings of single elements are as large, but
# point in random directions and cancel: nudging every weight by one unit in its last place after
# every one of 300 steps moved the loss by 7e-7 at most, where torch's own single-tensor and fused
# AdamW came to differ by 1e-3 (at lr 2e-3).
#
# So a yardstick run, torch's own AdamW with the learning rate times 1 + 2^-22, measures what the
# allowed error does to this model on these batches, training's own amplification included. Its
# effect changes sign and size from step to step, so the largest difference so far counts, and never
# less than the last digits of the two losses compared. `MARGIN` is for what the yardstick leaves
# out: errors whose sign changes from step to step, the roundings of single elements and of the
# decay.

YARDSTICK_LR_FACTOR = 1 + 2**-22
MARGIN = 4.0


@dataclass(frozen=True)
class LossComparison:
    """Whether a loss curve agrees with the reference's.

    ratio: the largest |difference| / tolerance of all steps; they agree if it is at most 1.
    step: where that is, from 1; difference and tolerance: there, in nats.
    """

    ratio: float
    step: int
    difference: float
    tolerance: float

    @property
    def agree(self) -> bool:
        """Whether every step is within its tolerance."""
        return self.ratio <= 1


def resolution(loss: float) -> float:
    """The distance between neighbouring float32 numbers at this loss."""
    return math.ldexp(1.0, math.frexp(loss)[1] - 24) if math.isfinite(loss) else math.nan


def loss_tolerances(reference: Sequence[float], yardstick: Sequence[float]) -> list[float]:
    """How far a loss may lie from the reference's, per step, in nats: see above."""
    largest, tolerances = 0.0, []
    for expected, nudged in zip(reference, yardstick, strict=True):
        # Twice: weights that are equal but for their last bits give losses that differ by up to two
        # of their units (37 seeds).
        largest = max(largest, abs(nudged - expected), 2 * resolution(expected))
        tolerances.append(MARGIN * largest)
    return tolerances


def compare_losses(
    reference: Sequence[float], candidate: Sequence[float], yardstick: Sequence[float]
) -> LossComparison:
    """Compare two loss curves of equal length, in nats, one value per step.

    A loss that is not finite never agrees. Raises ValueError if the lengths differ or are 0.
    """
    if not len(reference) == len(candidate) == len(yardstick) > 0:
        raise ValueError(
            f"reference, candidate and yardstick have {len(reference)}, {len(candidate)} and "
            f"{len(yardstick)} losses; they need equally many, at least one"
        )
    worst = LossComparison(ratio=-1.0, step=0, difference=0.0, tolerance=0.0)
    limits = loss_tolerances(reference, yardstick)
    for step, (expected, loss, limit) in enumerate(
        zip(reference, candidate, limits, strict=True), start=1
    ):
        difference = abs(loss - expected)
        finite = math.isfinite(difference) and math.isfinite(limit)
        ratio = difference / limit if finite else math.inf
        if ratio > worst.ratio:
            worst = LossComparison(ratio, step, difference, limit)
    return worst
