"""Adam in float64, written from the paper, and the tolerances that follow from rounding. Knows no
optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Hyper-parameters of one parity case."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False

    def arguments(self) -> dict[str, object]:
        """Keyword arguments of torch.optim.Adam."""
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "amsgrad": self.amsgrad,
            "maximize": self.maximize,
            "decoupled_weight_decay": self.decoupled,
        }


def adam(param: Tensor, grads: list[Tensor], o: Options) -> dict[str, Tensor]:
    """Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019 for decoupled decay; Reddi et al.
    2018 for amsgrad.

    Everything in float64; returns param, exp_avg, exp_avg_sq and max_exp_avg_sq after the last
    gradient.
    """
    theta = param.double()
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


def tolerance(dtype: torch.dtype, steps: int, o: Options, roundings: int = 1) -> dict[str, float]:
    """How far from the float64 run rounding alone may take values of size one after `steps` steps.

    With unit roundoff u and |param|, |grad| of about one (at most P and G below):
    - m keeps a share beta1 of its error and adds at most r roundings of u * G per step: r * u * G /
      (1 - beta1).
    - v adds at most r roundings of its own value per step: r * u * steps * G^2 / (1 - beta2) * (1 -
      beta2), and what the error of g brings (coupled decay of a rounded param): the same again.
    - p adds r roundings of u * P per step, and lr times the relative error of m / sqrt(v), whose
      size is bounded by Cauchy-Schwarz: |m| / sqrt(v) <= (1 - beta1) / sqrt((1 - beta2) * (1 -
      beta1^2 / beta2)), about 7.3.
    `roundings`: per stored value and step. Ours are 1; torch rounds after every operation: at most
        4.
    """
    u = torch.finfo(dtype).eps / 2
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        u += 4 * torch.finfo(torch.float32).eps  # the arithmetic inside a step
    beta1, beta2 = o.betas
    P, G = 4.0, 2.0 + 4.0 * o.weight_decay
    ratio = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    relative = roundings * u * (1 / (1 - beta1) + steps)
    return {
        "param": steps * (roundings * u * P + o.lr * ratio * relative),
        "exp_avg": relative * G,
        "exp_avg_sq": 2 * relative * G * G * (1 - beta2**steps),
        "max_exp_avg_sq": 2 * relative * G * G * (1 - beta2**steps),
    }
