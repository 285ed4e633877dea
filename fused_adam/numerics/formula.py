"""The Adam formula in plain torch: specification, oracle of the kernel's bits, and CPU path.

The Triton twin `fused_adam_kernels/formula.py` has the same names in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
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
    one_minus_ema_decay: Tensor  # of the average of the weights


def load_scalars(scalars: Tensor) -> Scalars:
    """One row of the table of scalars, shape (SCALARS,), by name. SKIP and STEP_NUMBER stay out."""
    return Scalars(*scalars.unbind()[: len(Scalars._fields)])


class Flags(NamedTuple):
    """What a step does not leave out. Python values: torch.compile needs no branch for them."""

    has_multiplier: bool  # the gradient's is not 1
    has_l2: bool
    has_lr_wd: bool
    cautious: bool  # decay a parameter only where the update moves it towards zero
    # A step of size zero leaves parameters as they are: p - 0 would turn -0.0 into 0.0.
    store_param: bool

    @staticmethod
    def of(scalars: Tensor, cautious: bool) -> Flags:
        """From one row of scalars, rounded to the arithmetic's dtype, as the kernel sees them.

        Args:
            cautious: whether the param group is. Without a decay that chooses nothing, so
                torch.compile gets no variant of its own.
        """
        s: Any = Scalars(*scalars.tolist()[: len(Scalars._fields)])
        has_lr_wd = s.lr_wd != 0
        return Flags(
            has_multiplier=s.grad_multiplier != 1,
            has_l2=s.l2 != 0,
            has_lr_wd=has_lr_wd,
            cautious=cautious and has_lr_wd,
            store_param=s.step_size != 0 or has_lr_wd,
        )


def _numpy_or_none() -> Any:
    """numpy, if it is installed and torch can share memory with it."""
    try:
        import numpy

        torch.zeros(1).numpy()
    except (ImportError, RuntimeError):  # RuntimeError: built for another numpy, or without it
        return None
    return numpy


_NUMPY = _numpy_or_none()


def silent() -> AbstractContextManager[None]:
    """numpy without warnings of overflows and NaN in this thread: as torch."""
    manager: AbstractContextManager[None] = _NUMPY.errstate(all="ignore")
    return manager


def exact_sqrt(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Correctly rounded square root of float32; within an ulp for float64.

    `torch.sqrt` on CPU is off by an ulp on 17 % of float32 inputs. numpy's is the processor's own
    instruction, which rounds correctly; float64 is the detour where there is no numpy. float64
    itself has no wider type to go through.

    Args:
        out: what to write and return, of x's shape and type; None for a new tensor.
    """
    # Tensors of other classes, such as fake ones, may have no memory.
    if _NUMPY is not None and type(x) is Tensor and x.is_cpu and x.dtype == torch.float32:
        root = torch.empty_like(x) if out is None else out
        with _NUMPY.errstate(invalid="ignore"):  # NaN of what is negative: as torch, silently
            _NUMPY.sqrt(x.numpy(), out=root.numpy())
        return root
    # In place: a second float64 temporary takes a whole step from 1.5 to 2.8 ms per 256Ki elements
    # (page faults).
    root = x.to(torch.float64, copy=True).sqrt_().to(x.dtype)
    return root if out is None else out.copy_(root)


class Functions(NamedTuple):
    """What `adam_update` computes with: functions of torch, or of numpy, which have these names.

    Each takes arrays of one library. All but `where` take `out`: an array for the result, or None
    for a new one.
    """

    add: Callable[..., Any]
    subtract: Callable[..., Any]
    multiply: Callable[..., Any]
    maximum: Callable[..., Any]
    where: Callable[..., Any]
    sqrt: Callable[..., Any]  # correctly rounded


EAGER = Functions(torch.add, torch.subtract, torch.multiply, torch.maximum, torch.where, exact_sqrt)
# Inductor's square root is correctly rounded.
COMPILED = EAGER._replace(sqrt=torch.sqrt)
# numpy's functions are the processor's own instructions, which round correctly. A call costs 0.3 us
# where torch's costs 1 us, and never waits for other threads. None without numpy.
NUMPY = _NUMPY and Functions(
    _NUMPY.add, _NUMPY.subtract, _NUMPY.multiply, _NUMPY.maximum, _NUMPY.where, _NUMPY.sqrt
)


class Scratch(NamedTuple):
    """Memory for what `adam_update` computes on the way: arrays of the operands' size.

    None: new memory each time.
    """

    grad: Any = None
    first: Any = None
    second: Any = None


NO_SCRATCH = Scratch()


def adam_update(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    v_max: Any,
    ema: Any,
    s: Scalars,
    flags: Flags,
    functions: Functions,
    scratch: Scratch = NO_SCRATCH,
) -> None:
    """Update p, m, v, v_max and ema in place.

    Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019.

    g     = grad_multiplier * g + l2 * p
    m     = m + (1 - beta1) * (g - m)
    v     = beta2 * v + (1 - beta2) * g^2
    v_max = max(v_max, v)                             (AMSGrad only; otherwise p is updated with v)
    p     = p - (lr_wd * p + step_size * m / (sqrt(v_max) * rsqrt_bc2 + eps))
    cautious: lr_wd * p only where it has the sign of the other term        (arXiv 2510.12402)
    ema   = ema + (1 - ema_decay) * (p - ema)                         (with an average only)

    Every operation rounds once, in the order written below, so CPU and GPU agree bit for bit.

    Args:
        p, g, m, v, v_max, ema: parameter, gradient, moments, AMSGrad's maximum or None, and the
            average of the parameter or None; tensors or numpy arrays of one shape and float type. g
            is only read.
        s: Scalars of the same type.
        flags: of these scalars.
        functions: of the library that the operands come from.
        scratch: arrays of the same library, which are overwritten.
    """
    add, subtract, multiply, maximum, where, sqrt = functions
    # Below, nearly all is computed in place: memory that stays in the cache is worth more than new.
    if flags.has_multiplier:
        g = multiply(g, s.grad_multiplier, out=scratch.grad)

    # A weight decay of 0 must be absent, not multiplied: 0 * inf would turn an infinite p into NaN.
    if flags.has_l2:
        g = add(g, multiply(p, s.l2, out=scratch.first), out=scratch.grad)

    change = subtract(g, m, out=scratch.first)
    change *= s.one_minus_beta1
    m += change
    square = multiply(g, s.one_minus_beta2, out=scratch.first)
    square *= g
    v *= s.beta2
    v += square
    if v_max is not None:
        maximum(v_max, v, out=v_max)
    if flags.store_param:
        second_moment = v if v_max is None else v_max
        denominator = sqrt(second_moment, out=scratch.first)
        denominator *= s.rsqrt_bc2
        denominator += s.eps
        update = multiply(m, s.step_size, out=scratch.second)
        update /= denominator

        # Decay and update are subtracted together, so p rounds once and a tiny decay is not lost.
        if flags.has_lr_wd:
            decay = multiply(p, s.lr_wd, out=scratch.first)
            if flags.cautious:
                # A product of the two could underflow. Where p is 0, so is the decay, whatever is
                # decided.
                towards_zero = where(p < 0, -update, update) > 0
                decay = where(towards_zero, decay, -0.0)
            update += decay
        p -= update
    if ema is not None:
        change = subtract(p, ema, out=scratch.first)
        change *= s.one_minus_ema_decay
        ema += change


def adam_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    ema: Tensor | None,
    scalars: Tensor,
    flags: Flags,
    functions: Functions,
) -> None:
    """Load, update and store: p, m, v, v_max and ema in place, each rounded once to its own dtype.

    Args:
        p, g, m, v, v_max: flat tensors of one size, of any float dtypes. g is only read.
        ema: of the scalars' type, or None.
        scalars: shape (SCALARS,), in the order of `table.py` and the type of the arithmetic.
        flags: of these scalars.
        functions: torch's, as for `adam_update`.
    """
    compute, s = scalars.dtype, load_scalars(scalars)
    grad = g.to(compute)
    # What is of this type already is updated where it is.
    wide_p, wide_m, wide_v = [memory.to(compute) for memory in (p, m, v)]
    wide_v_max = None if v_max is None else v_max.to(compute)
    adam_update(wide_p, grad, wide_m, wide_v, wide_v_max, ema, s, flags, functions)
    if flags.store_param:
        p.copy_(wide_p)
    m.copy_(wide_m)
    v.copy_(wide_v)
    if v_max is not None and wide_v_max is not None:
        v_max.copy_(wide_v_max)


def recipe_step(
    recipe: Recipe,
    memory: dict[str, Tensor],
    scalars: Tensor,
    flags: Flags,
    bits: Tensor,
) -> None:
    """`adam_step` on what a recipe stores. The arithmetic is float32.

    Args:
        memory: name -> flat tensor: `param`, `grad` and the recipe's own entries, each of N
            elements (scales: N / 32). N is a multiple of 32 if there are scales. Everything but
            the gradient is written in place.
        scalars, flags: as for `adam_step`.
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
    ema = memory.get("ema")
    s = load_scalars(scalars)
    adam_update(p, g, m, v, v_max, ema, s, flags, EAGER)

    if flags.store_param:
        new_p, new_extra = codecs.store_weight(recipe.weights, p, bits)
        param.copy_(new_p)
        if extra is not None and new_extra is not None:
            extra.copy_(new_extra)
    stored = (m_stored, v_stored, m_scale, v_scale, v_max_stored)
    values = (*codecs.store_moments(recipe.states, m, v, bits), v_max)
    for tensor, value in zip(stored, values, strict=True):
        if tensor is not None and value is not None:
            tensor.copy_(value)
