"""The Adam formula in plain torch: specification, oracle of the kernel's bits, and CPU path.

The Triton twin `fused_adam_kernels/formula.py` has the same names in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..precision import CODED, Recipe
from . import codecs

# Elements per pass. Temporaries of this size stay in the cache, and are too small for malloc to
# return them to the system after each operation. Measured on 2 cores: half as many elements take
# 1.5 times as long (threads wait for each other), twice as many up to 3.7 times (7 page faults per
# Ki of elements).
CHUNK = 1 << 17


class Scalars(NamedTuple):
    """One parameter's scalars for this step, computed by `scalars.py`; each has shape ()."""

    step_size: Tensor  # lr / (1 - beta1^t)
    rsqrt_bc2: Tensor  # 1 / sqrt(1 - beta2^t)
    one_minus_beta1: Tensor
    one_minus_beta2: Tensor
    beta2: Tensor
    eps: Tensor
    l2: Tensor  # coupled weight decay, added to the gradient (Adam); 0 if there is none
    lr_wd: Tensor  # decoupled weight decay, lr * weight_decay (AdamW); 0 if there is none
    grad_multiplier: Tensor  # clip coefficient / loss scale; negative if maximizing


def load_scalars(scalars: Tensor) -> Scalars:
    """One row of the table of scalars, shape (SCALARS,), by name. SKIP and STEP_NUMBER stay out."""
    return Scalars(*scalars.unbind()[: len(Scalars._fields)])


def _numpy_or_none() -> Any:
    """numpy, if it is installed and torch can share memory with it."""
    try:
        import numpy

        torch.zeros(1).numpy()
    except (ImportError, RuntimeError):  # RuntimeError: built for another numpy, or without it
        return None
    return numpy


_NUMPY = _numpy_or_none()


def exact_sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square root of float32; within an ulp for float64.

    `torch.sqrt` on CPU is off by an ulp on 17 % of float32 inputs. numpy's is the processor's own
    instruction, which rounds correctly; float64 is the detour where there is no numpy. float64
    itself has no wider type to go through.
    """
    # Tensors of other classes, such as fake ones, may have no memory.
    if _NUMPY is not None and type(x) is Tensor and x.is_cpu and x.dtype == torch.float32:
        root = torch.empty_like(x)
        with _NUMPY.errstate(invalid="ignore"):  # NaN of what is negative: as torch, silently
            _NUMPY.sqrt(x.numpy(), out=root.numpy())
        return root
    # In place: a second float64 temporary takes a whole step from 1.5 to 2.8 ms per 256Ki elements
    # (page faults).
    return x.to(torch.float64, copy=True).sqrt_().to(x.dtype)


def adam_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    s: Scalars,
    has_l2: bool,
    has_lr_wd: bool,
    cautious: bool,
    sqrt: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the new (p, m, v, v_max). Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019.

    g     = grad_multiplier * g + l2 * p
    m     = m + (1 - beta1) * (g - m)
    v     = beta2 * v + (1 - beta2) * g^2
    v_max = max(v_max, v)                             (AMSGrad only; otherwise p is updated with v)
    p     = p - (lr_wd * p + step_size * m / (sqrt(v_max) * rsqrt_bc2 + eps))
    cautious: lr_wd * p only where it has the sign of the other term        (arXiv 2510.12402)

    Every operation rounds once, in the order written below, so CPU and GPU agree bit for bit.

    Args:
        p, g, m, v, v_max: parameter, gradient, moments, and AMSGrad's maximum or None; one shape
            and float type. Not changed.
        s: Scalars of the same type.
        has_l2, has_lr_wd: whether `s.l2` and `s.lr_wd` are not zero. As Python values they cost
            nothing to test, and torch.compile needs no branch.
        cautious: decay a parameter only where the update moves it towards zero.
        sqrt: a correctly rounded square root.
    """
    # Below, every tensor of this function's own is reused in place: a temporary that stays in the
    # cache is worth more than a new one.
    g = g * s.grad_multiplier

    # A weight decay of 0 must be absent, not multiplied: 0 * inf would turn an infinite p into NaN.
    if has_l2:
        g.add_(s.l2 * p)

    m = (g - m).mul_(s.one_minus_beta1).add_(m)
    v = (s.one_minus_beta2 * g).mul_(g).add_(s.beta2 * v)
    if v_max is not None:
        v_max = torch.maximum(v_max, v)
    second_moment = v if v_max is None else v_max
    update = (s.step_size * m).div_(sqrt(second_moment).mul_(s.rsqrt_bc2).add_(s.eps))

    # Decay and update are subtracted together, so p rounds once and a tiny decay is not lost.
    if has_lr_wd:
        decay = s.lr_wd * p
        if cautious:
            # A product of the two could underflow. Where p is 0, so is the decay, whatever is
            # decided.
            towards_zero = torch.where(p < 0, -update, update) > 0
            decay = torch.where(towards_zero, decay, -0.0)
        update.add_(decay)
    return p - update, m, v, v_max


def adam_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    scalars: Tensor,
    has_l2: bool,
    has_lr_wd: bool,
    cautious: bool,
    store_param: bool,
    sqrt: Callable[[Tensor], Tensor],
) -> None:
    """Load, update and store: p, m, v and v_max in place, each rounded once to its own dtype.

    Args:
        p, g, m, v, v_max: flat tensors of one size, of any float dtypes. g is only read.
        scalars: shape (SCALARS,), in the order of `table.py` and the type of the arithmetic.
        has_l2, has_lr_wd: whether these scalars are not zero.
        cautious: as for `adam_update`.
        store_param: False for a step of size zero, which leaves parameters as they are: p - 0 would
            turn -0.0 into 0.0.
        sqrt: a correctly rounded square root.
    """
    compute, s = scalars.dtype, load_scalars(scalars)
    old_p, grad, old_m, old_v = [memory.to(compute) for memory in (p, g, m, v)]
    old_v_max = None if v_max is None else v_max.to(compute)
    new_p, new_m, new_v, new_v_max = adam_update(
        old_p, grad, old_m, old_v, old_v_max, s, has_l2, has_lr_wd, cautious, sqrt
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
    has_l2: bool,
    has_lr_wd: bool,
    cautious: bool,
    store_param: bool,
    bits: Tensor,
) -> None:
    """`adam_step` on what a recipe stores. The arithmetic is float32.

    Args:
        memory: name -> flat tensor: `param`, `grad` and the recipe's own entries, each of N
            elements (scales: N / 32). N is a multiple of 32 if there are scales. Everything but
            the gradient is written in place.
        scalars, has_l2, has_lr_wd, cautious, store_param: as for `adam_step`.
        bits: int32, shape (N,): one word of random bits per element; shape (0,) if the recipe needs
            no random bits.
    """
    param, grad = memory["param"], memory["grad"]
    # Moments of 8-bit codes are entries of other names, so that nobody takes codes for values.
    (m_code, m_scale_name), (v_code, v_scale_name) = CODED.values()
    m_stored = memory[m_code] if m_code in memory else memory["exp_avg"]
    v_stored = memory[v_code] if v_code in memory else memory["exp_avg_sq"]
    m_scale, v_scale = memory.get(m_scale_name), memory.get(v_scale_name)
    v_max_stored = memory.get("max_exp_avg_sq")
    extra = memory.get("master_weight", memory.get("remainder"))

    p, g = codecs.load_weight(recipe.weights, param, extra), grad.float()
    m, v = codecs.load_moments(m_stored, v_stored, m_scale, v_scale)
    v_max = None if v_max_stored is None else v_max_stored.float()
    s = load_scalars(scalars)
    p, m, v, v_max = adam_update(p, g, m, v, v_max, s, has_l2, has_lr_wd, cautious, exact_sqrt)

    if store_param:
        new_p, new_extra = codecs.store_weight(recipe.weights, p, bits)
        param.copy_(new_p)
        if extra is not None and new_extra is not None:
            extra.copy_(new_extra)
    stored = (m_stored, v_stored, m_scale, v_scale, v_max_stored)
    values = (*codecs.store_moments(recipe.states, m, v, bits), v_max)
    for tensor, value in zip(stored, values, strict=True):
        if tensor is not None and value is not None:
            tensor.copy_(value)
