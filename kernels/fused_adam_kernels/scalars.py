"""The prologue: step counters and hyper-parameters -> this step's scalars, one row per parameter.

Everything is float64 until the one rounding on the store. The Python twin is
`fused_adam/numerics/scalars.py`.
"""

import triton
import triton.language as tl

from . import table
from .launch import Launcher

BLOCK = 128
LAST_STEP = tl.constexpr(2**24)  # a float32 counter stops here: 2^24 + 1 is not a float32


@triton.jit
def power(b, t):
    """b^t by squaring, in float64: exp2 and log2 differ between machines, these products do not."""
    r = b * 0 + 1
    for i in tl.static_range(25):
        r = tl.where(((t >> i) & 1) == 1, r * b, r)
        b = b * b
    return r


@triton.jit
def clip_coefficient(norm, max_norm):
    """What gradients of this norm are multiplied by, as in torch's clip_grad_norm_; one if max_norm
    is negative.
    """
    clip = max_norm / (norm + 1e-6)
    clip = tl.where(clip > 1.0, 1.0, clip)  # a NaN stays one
    return tl.where(max_norm < 0, 1.0, clip)


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=[
        "found_inf_ptr",
        "grad_scale_ptr",
        "square_sum_ptr",
    ],  # the user's own tensors
)
def prologue_kernel(
    rows_ptr,  # *i64 [P, ROW]      addresses of the step counters, group numbers
    hyper_ptr,  # *f64 [G, HYPER]    hyper-parameters as the user set them
    scalars_ptr,  # *f32 or *f64 [P, SCALARS]  out: this step's values
    found_inf_ptr,  # *f32 [1]: not zero means that this step is skipped
    grad_scale_ptr,  # *f32 [1]: what gradients were multiplied by
    square_sum_ptr,  # *f64 [1]: of all gradients
    stats_ptr,  # *f64 [STATS]  out: the norm before clipping, and the number of skipped steps
    num_rows: tl.int32,  # P
    BLOCK: tl.constexpr,  # rows per program
):
    """Advance every step counter by one and write its parameter's scalars; on a skipped step
    advance none.

    What a step does without is there all the same, as 0, 1 and 0: one variant serves them all.
    """
    grad_scale = tl.load(grad_scale_ptr).to(tl.float64)
    norm = tl.sqrt(tl.load(square_sum_ptr)) / grad_scale
    clip = clip_coefficient(norm, tl.load(hyper_ptr + table.MAX_GRAD_NORM))
    finite = norm < float("inf")
    skip = (tl.load(found_inf_ptr) != 0) | (
        (tl.load(hyper_ptr + table.SKIP_NONFINITE) != 0) & (finite == 0)
    )
    if tl.program_id(0) == 0:
        tl.store(stats_ptr + table.GRAD_NORM, norm)
        skipped = tl.load(stats_ptr + table.SKIPPED_STEPS)
        tl.store(stats_ptr + table.SKIPPED_STEPS, tl.where(skip, skipped + 1.0, skipped))
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = row < num_rows
    row_ptr = rows_ptr + row * table.ROW
    step_ptr = tl.load(row_ptr + table.STEP, mask=ok, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=ok, other=0.0) + 1.0
    if not skip:
        tl.store(step_ptr, step, mask=ok)
    t = tl.minimum(step, LAST_STEP).to(tl.int32)

    hyper = hyper_ptr + tl.load(row_ptr + table.GROUP, mask=ok, other=0) * table.HYPER
    lr = tl.load(hyper + table.LR, mask=ok, other=0.0)
    beta1 = tl.load(hyper + table.BETA1, mask=ok, other=0.0)
    beta2 = tl.load(hyper + table.BETA2, mask=ok, other=0.0)
    eps = tl.load(hyper + table.EPS, mask=ok, other=0.0)
    wd = tl.load(hyper + table.WEIGHT_DECAY, mask=ok, other=0.0)
    decoupled = tl.load(hyper + table.DECOUPLED, mask=ok, other=0.0) != 0
    maximize = tl.load(hyper + table.MAXIMIZE, mask=ok, other=0.0) != 0

    out = scalars_ptr + row * table.SCALARS
    dtype: tl.constexpr = scalars_ptr.dtype.element_ty
    tl.store(out + table.STEP_SIZE, (lr / (1.0 - power(beta1, t))).to(dtype), mask=ok)
    tl.store(out + table.RBC2, (1.0 / tl.sqrt(1.0 - power(beta2, t))).to(dtype), mask=ok)
    tl.store(out + table.W1, (1.0 - beta1).to(dtype), mask=ok)
    tl.store(out + table.W2, (1.0 - beta2).to(dtype), mask=ok)
    tl.store(out + table.B2, beta2.to(dtype), mask=ok)
    tl.store(out + table.EPSILON, eps.to(dtype), mask=ok)
    tl.store(out + table.COUPLED, tl.where(decoupled, 0.0, wd).to(dtype), mask=ok)
    tl.store(out + table.DECAY, tl.where(decoupled, lr * wd, 0.0).to(dtype), mask=ok)
    sign = tl.where(maximize, -1.0, 1.0).to(tl.float64)
    tl.store(out + table.GRAD_MULTIPLIER, (sign / grad_scale * clip).to(dtype), mask=ok)
    tl.store(out + table.SKIP, tl.where(skip, 1.0, 0.0).to(dtype), mask=ok)
    tl.store(out + table.STEP_NUMBER, t.to(dtype), mask=ok)


def prologue() -> Launcher:
    """Advance the step counters and fill `scalars` for this step: call it with `programs(P)` and
    the arguments below.

    rows: int64, shape (P, ROW): the counters' addresses (float32 each) and group numbers.
    hyper: float64, shape (G, HYPER).
    scalars: float32 or float64, shape (P, SCALARS): written.
    found_inf: float32, one element: not zero skips the step, counters included.
    grad_scale: float32, one element: gradients are divided by it as they are read.
    square_sum: float64, one element: of all gradients as they are in memory. Gradients are clipped
        and a step with non-finite ones skipped as `hyper` says.
    stats: float64, shape (STATS,): the norm is written, the skipped steps are counted.
    P: how many rows there are.
    """
    return Launcher(prologue_kernel, [BLOCK])


def programs(num_rows: int) -> int:
    """How many programs the prologue takes for that many rows."""
    return int(triton.cdiv(num_rows, BLOCK))
