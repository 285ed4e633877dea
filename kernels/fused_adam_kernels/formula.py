"""The Adam formula on registers, without addresses.

The torch twin `fused_adam/numerics/formula.py` has the same names in the same order.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Scalars(NamedTuple):
    """One parameter's scalars for this step, computed by the prologue (`scalars.py`)."""

    step_size: tl.tensor  # lr / (1 - beta1^t)
    rsqrt_bc2: tl.tensor  # 1 / sqrt(1 - beta2^t)
    one_minus_beta1: tl.tensor
    one_minus_beta2: tl.tensor
    beta2: tl.tensor
    eps: tl.tensor
    l2: tl.tensor  # coupled weight decay, added to the gradient (Adam); 0 if there is none
    lr_wd: tl.tensor  # decoupled weight decay, lr * weight_decay (AdamW); 0 if there is none
    grad_multiplier: tl.tensor  # clip coefficient / loss scale; negative if maximizing
    one_minus_ema_decay: tl.tensor  # of the average of the weights


@triton.jit
def exact_sqrt(x):
    """Correctly rounded square root: `tl.sqrt` is approximate in float32 and exact in float64."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def exact_div(x, y):
    """Correctly rounded division: `/` is approximate in float32 and exact in float64."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def add(x, y, one):
    """Return x + y, rounded once, where one of them may be a product; with -`one`: y - x.

    ptxas 12.9 (Triton 3.6) fuses products and sums on Blackwell, packed two by two, even with
    fusion switched off (see `inspect.py`). A sum that is a fused multiply-add already is left
    alone, and takes no longer. x times 1 is exact, so its bits are those of the sum.
    """
    return tl.fma(x, one, y)


@triton.jit
def hidden_one(ptr, DTYPE: tl.constexpr):
    """Return the 1 for `add`, from an address's highest bit: it is 0, which no compiler knows.

    A factor that it knew to be 1 would be dropped. Made from a loaded value instead of a kernel's
    argument, it costs fp32 and sr-bf16 7 instructions per thread (Triton 3.7, sm_90).
    """
    highest_bit = (ptr.to(tl.int64) >> 63).to(tl.int32)
    return (highest_bit + 0x3F800000).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def adam_update(
    p,
    g,
    m,
    v,
    v_max,
    ema,
    s,
    one,
    AMSGRAD: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    EMA: tl.constexpr,
):
    """Return the new (p, m, v, v_max, ema).

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
        p, g, m, v, v_max, ema: parameter, gradient, moments, AMSGrad's maximum and the average of
            the parameter; registers of one float type and shape.
        s: Scalars of the same type.
        one: from `hidden_one`.
        AMSGRAD: keep the running maximum of v. Otherwise v_max comes back unchanged.
        CAUTIOUS: decay a parameter only where the update moves it towards zero.
        EMA: average the new parameter. Otherwise ema comes back unchanged.
    """
    g = g * s.grad_multiplier

    # A weight decay of 0 must be absent, not multiplied: 0 * inf would turn an infinite p into NaN.
    # Adding -0.0 instead changes no bit. (The literal -0.0 becomes 0.0 before Triton 3.9.)
    negative_zero = tl.zeros_like(p) * -1.0
    l2_term = negative_zero
    if s.l2 != 0:
        l2_term = s.l2 * p
    g = add(g, l2_term, one)

    m = add(s.one_minus_beta1 * (g - m), m, one)
    v = add(s.beta2 * v, (s.one_minus_beta2 * g) * g, one)
    if AMSGRAD:
        # As torch.maximum: a NaN stays, where the default would drop it.
        v_max = tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)
        second_moment = v_max
    else:
        second_moment = v
    # Where v is 0, ptxas's root and quotient take their slow paths: about 41 more instructions per
    # element. Other operands there would cost every block selects, and an H100 waits for memory
    # anyway: 118 instructions of an element take 3.5 ps, its 28 bytes 9.7.
    # One division. Bias correction after the root needs only a product.
    update = exact_div(s.step_size * m, exact_sqrt(second_moment) * s.rsqrt_bc2 + s.eps)

    # Decay and update are subtracted together, so p rounds once and a tiny decay is not lost. The
    # branch keeps product and sum apart for ptxas; see `add`.
    decay_term = negative_zero
    if s.lr_wd != 0:
        decay_term = s.lr_wd * p
        if CAUTIOUS:
            # A product of the two could underflow. Where p is 0, so is the decay, whatever is
            # decided. (By the sign of m, ptxas 12.9 would fuse 16 additions.)
            towards_zero = tl.where(p < 0, -update, update) > 0
            decay_term = tl.where(towards_zero, decay_term, negative_zero)
    before = p
    p = p - (decay_term + update)
    if EMA:
        # A step of size zero stores no parameter. Where a moment is not finite, p is NaN by now.
        averaged = p
        if (s.step_size == 0) & (s.lr_wd == 0):
            averaged = before
        ema = add(s.one_minus_ema_decay * (averaged - ema), ema, one)
    return p, m, v, v_max, ema
