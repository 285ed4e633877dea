"""One Adam update on registers. No addresses here; the torch twin is
`fused_adam/numerics/formula.py`.
"""

import triton
import triton.language as tl


@triton.jit
def exact_sqrt(x):
    """Correctly rounded square root: plain `tl.sqrt` is approximate in float32, and exact in
    float64.
    """
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def exact_div(x, y):
    """Correctly rounded division: plain `/` is approximate in float32, and exact in float64."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def adam_update(
    p,
    g,
    m,
    v,
    v_max,
    step_size,
    rbc2,
    w1,
    w2,
    b2,
    eps,
    coupled,
    decay,
    grad_multiplier,
    AMSGRAD: tl.constexpr,
):
    """One step of Adam: every operation rounds once, in this order (Kingma & Ba 2015, algorithm 1).

    p, g, m, v, v_max: registers of one float type. The rest are this step's scalars of the same
    type: step_size = lr / (1 - beta1^t), rbc2 = 1 / sqrt(1 - beta2^t), w1 = 1 - beta1, w2 = 1 -
    beta2, b2 = beta2, coupled = weight decay added to the gradient, decay = lr * weight decay of
    AdamW (Loshchilov & Hutter 2019).
    """
    g = g * grad_multiplier
    # A decay of zero is absent, not multiplied: 0 * inf would turn an infinite p into NaN. Then
    # -0.0 is added, which changes nothing (a literal -0.0 becomes 0.0 before Triton 3.9). So a
    # choice stands between product and sum: else ptxas 12.9 (Triton 3.6) fuses 16 of 63 additions
    # per thread on Blackwell, whether fusion is on or off (inspect).
    nothing = tl.zeros_like(p) * -1.0
    l2 = nothing
    if coupled != 0:
        l2 = coupled * p
    g = g + l2
    m = m + w1 * (g - m)
    v = b2 * v + (w2 * g) * g
    if AMSGRAD:
        v_max = tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)
        x = v_max
    else:
        x = v
    u = exact_div(step_size * m, exact_sqrt(x) * rbc2 + eps)
    # p rounds once for decay and update together: a tiny decay is not lost.
    decayed = nothing
    if decay != 0:
        decayed = decay * p
    u = decayed + u
    p = p - u
    return p, m, v, v_max
