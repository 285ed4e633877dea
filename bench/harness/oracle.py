"""AdamW in float64, written from the paper, and how far rounding may take a correct optimizer from
it.

No optimizer is known here; `parity.py` and `accuracy.py` hold them against this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """What every optimizer is asked to do: AdamW with these hyper-parameters.

    clip: the gradients' largest global L2 norm, or None. capturable: the step will be captured in a
        CUDA graph.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    amsgrad: bool = False
    clip: float | None = None
    capturable: bool = False


def clip_factor(grads: Sequence[Tensor], max_norm: float | None) -> float:
    """What `clip_grad_norm_` multiplies these gradients by."""
    if max_norm is None:
        return 1.0
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    return min(1.0, max_norm / (norm + 1e-6))


def adamw(
    params: Sequence[Tensor], steps: Sequence[Sequence[Tensor]], options: Options
) -> list[Tensor]:
    """The parameters after these steps, everything in float64.

    Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, decoupled decay; Reddi et al. 2018,
    AMSGrad as torch
    computes it: the maximum of the uncorrected second moment.

    Args:
        params: at the start, unchanged.
        steps: per step one gradient per parameter.
    """
    theta = [param.detach().double() for param in params]
    m, v, v_max = ([torch.zeros_like(p) for p in theta] for _ in range(3))
    beta1, beta2 = options.betas
    for t, grads in enumerate(steps, start=1):
        factor = clip_factor(grads, options.clip)
        for i, grad in enumerate(grads):
            g = grad.double() * factor
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            v_max[i] = torch.maximum(v_max[i], v[i])
            v_hat = (v_max[i] if options.amsgrad else v[i]) / (1 - beta2**t)
            theta[i] = theta[i] - options.lr * options.weight_decay * theta[i]
            theta[i] = theta[i] - options.lr * (m[i] / (1 - beta1**t)) / (
                v_hat.sqrt() + options.eps
            )
    return theta


def tolerance(
    param: torch.dtype, state: torch.dtype, steps: int, largest: float, options: Options
) -> float:
    """The largest |parameter - float64 run| that rounding explains after `steps` steps, parameters
    up to `largest`.

    With unit roundoff u: a parameter is rounded at most 4 times per step (torch's paths round after
    each operation), each by u * largest. The step is lr * |m| / sqrt(v), by Cauchy-Schwarz at most
    lr * 7.3 with the default betas; its relative error is that of m and v, each rounded at most 4
    times per step: (1 / (1 - beta1) + steps) * 4 u.
    """
    u_param = torch.finfo(param).eps / 2
    u_state = (
        torch.finfo(state).eps / 2 + 4 * torch.finfo(torch.promote_types(state, torch.float32)).eps
    )
    beta1, beta2 = options.betas
    reach = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    relative = 4 * u_state * (1 / (1 - beta1) + steps)
    return steps * (4 * u_param * largest + options.lr * reach * relative)
