"""The formula in plain torch: the specification, the oracle of the kernel's bits, and the CPU path.

The Triton twin is `fused_adam_kernels/formula.py`: same names, same order, every operation rounds
once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..precision import Recipe
from . import codecs

# Elements per pass: temporaries stay in the cache, and are too small for malloc to give back after
# each operation. Measured on 2 cores: half as many take 1.5 times as long (threads wait for each
# other), twice as many up to 3.7 times (7 page faults per Ki of elements).
CHUNK = 1 << 17


def exact_sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square root: `torch.sqrt` on CPU is off by an ulp on 17 % of float32
    inputs.

    float64 has no wider type to go through: there the result is within an ulp.
    """
    # In place: a second float64 temporary takes a whole step from 1.5 to 2.8 ms per 256Ki elements
    # (page faults).
    return x.to(torch.float64, copy=True).sqrt_().to(x.dtype)


def adam_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    scalars: Tensor,
    coupled_decay: bool,
    decoupled_decay: bool,
    sqrt: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One step of Adam on values of one float type (Kingma & Ba 2015, algorithm 1; Loshchilov &
    Hutter 2019).

    Args:
        p, g, m, v, v_max: parameter, gradient, moments, AMSGrad's maximum or None; one shape and
            dtype.
        scalars: shape (SCALARS,), same dtype: this step's values in the order of `table.py`.
        coupled_decay, decoupled_decay: whether the scalars `coupled` and `decay` are not zero.
        sqrt: a correctly rounded square root.

    Returns the new p, m, v, v_max; changes nothing.
    """
    step_size, rbc2, w1, w2, b2, eps, coupled, decay, grad_multiplier, *_ = scalars.unbind()
    # In place where it is ours: a temporary that stays in the cache is worth more than one that is
    # new.
    g = g * grad_multiplier
    # A decay of zero is absent, not multiplied: 0 * inf would turn an infinite p into NaN.
    if coupled_decay:
        g.add_(coupled * p)
    m = (g - m).mul_(w1).add_(m)
    v = (w2 * g).mul_(g).add_(b2 * v)
    if v_max is not None:
        v_max = torch.maximum(v_max, v)
    x = v if v_max is None else v_max
    u = (step_size * m).div_(sqrt(x).mul_(rbc2).add_(eps))
    # p rounds once for decay and update together: a tiny decay is not lost.
    if decoupled_decay:
        u.add_(decay * p)
    return p - u, m, v, v_max


def adam_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    scalars: Tensor,
    coupled_decay: bool,
    decoupled_decay: bool,
    store_param: bool,
    sqrt: Callable[[Tensor], Tensor],
) -> None:
    """Load, update and store: p, m, v, v_max in place, each rounded once to its own dtype; g is
    only read.

    `store_param` is False for a step of size zero, which leaves parameters as they are: p - 0 would
    turn -0.0 into 0.0.
    """
    dtype = scalars.dtype
    new_p, new_m, new_v, new_v_max = adam_update(
        p.to(dtype),
        g.to(dtype),
        m.to(dtype),
        v.to(dtype),
        None if v_max is None else v_max.to(dtype),
        scalars,
        coupled_decay,
        decoupled_decay,
        sqrt,
    )
    if store_param:
        p.copy_(new_p)
    m.copy_(new_m)
    v.copy_(new_v)
    if v_max is not None and new_v_max is not None:
        v_max.copy_(new_v_max)


def recipe_step(
    recipe: Recipe,
    memory: dict[str, Tensor],
    scalars: Tensor,
    coupled_decay: bool,
    decoupled_decay: bool,
    store_param: bool,
    words: Tensor,
) -> None:
    """`adam_step` on what a recipe stores.

    Args:
        memory: name -> flat tensor, all of N elements, a multiple of 32 where there are groups:
            `param` and `grad`, and the recipe's own entries. Written in place, the gradient
            excepted.
        words: int32, shape (N,): random bits, one word per element; none if the recipe takes none.
    """
    entries = {name.removesuffix("_code"): memory[name] for name in memory}
    extra = memory.get("master_weight", memory.get("remainder"))
    v_max = memory.get("max_exp_avg_sq")
    scales = (memory.get("exp_avg_scale"), memory.get("exp_avg_sq_scale"))
    m, v = codecs.load_moments(entries["exp_avg"], entries["exp_avg_sq"], *scales)
    p, m, v, new_v_max = adam_update(
        codecs.load_weight(recipe.weights, memory["param"], extra),
        memory["grad"].float(),
        m,
        v,
        None if v_max is None else v_max.float(),
        scalars,
        coupled_decay,
        decoupled_decay,
        exact_sqrt,
    )
    if store_param:
        visible, new_extra = codecs.store_weight(recipe.weights, p, words)
        memory["param"].copy_(visible)
        if extra is not None and new_extra is not None:
            extra.copy_(new_extra)
    stored = codecs.store_moments(recipe.states, m, v, words)
    for name, value in zip(("exp_avg", "exp_avg_sq"), stored[:2], strict=True):
        entries[name].copy_(value)
    for name, scale in zip(("exp_avg_scale", "exp_avg_sq_scale"), stored[2:], strict=True):
        if scale is not None:
            memory[name].copy_(scale)
    if v_max is not None and new_v_max is not None:
        v_max.copy_(new_v_max)
