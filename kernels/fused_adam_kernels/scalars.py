"""The prologue: step counters and hyper-parameters -> this step's scalars, one row per parameter.

Everything is float64 until the one rounding on the store. The twin on the host is
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
    """b^t in float64, by squaring; t up to 2^25 - 1.

    exp2 and log2 differ between machines. Products do not.
    """
    result = b * 0 + 1
    for i in tl.static_range(25):
        result = tl.where(((t >> i) & 1) == 1, result * b, result)
        b = b * b
    return result


@triton.jit
def clip_coefficient(norm, max_norm):
    """min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_; 1 if max_norm is negative."""
    clip = max_norm / (norm + 1e-6)
    clip = tl.where(clip > 1.0, 1.0, clip)  # a NaN stays
    return tl.where(max_norm < 0, 1.0, clip)


@triton.jit
def judge(
    hyper_ptr, found_inf_ptr, square_sum_ptr, grad_scale, stats_ptr, SKIP_SPIKES: tl.constexpr
):
    """Return the clip coefficient of this step, and whether it is skipped. Keeps the statistics."""
    norm = tl.sqrt(tl.load(square_sum_ptr)) / grad_scale
    clip = clip_coefficient(norm, tl.load(hyper_ptr + table.HYPER_MAX_GRAD_NORM))
    finite = norm < float("inf")  # false for a NaN too
    limit = tl.load(hyper_ptr + table.HYPER_SKIP_GRAD_NORM)
    if SKIP_SPIKES:
        # A limit of NaN, which a user's rule may come to, skips no finite norm.
        unwanted = (norm > limit) | (finite == 0)
    else:
        unwanted = (limit != 0) & (finite == 0)
    skip = (tl.load(found_inf_ptr) != 0) | unwanted
    if tl.program_id(0) == 0:
        tl.store(stats_ptr + table.GRAD_NORM, norm)
        tl.store(stats_ptr + table.GRAD_SCALE, grad_scale)
        skipped = tl.load(stats_ptr + table.SKIPPED_STEPS)
        tl.store(stats_ptr + table.SKIPPED_STEPS, tl.where(skip, skipped + 1.0, skipped))
    return clip, skip


@triton.jit(
    do_not_specialize=["num_rows"],
    # The user's own tensors, which may be anywhere in memory.
    do_not_specialize_on_alignment=["found_inf_ptr", "grad_scale_ptr", "square_sum_ptr"],
)
def prologue_kernel(
    rows_ptr,  # *i64 [P, ROW]  addresses of the step counters, group numbers
    hyper_ptr,  # *f64 [G, HYPER]  hyper-parameters as the user set them
    scalars_ptr,  # *f32 or *f64 [P, SCALARS]  out: this step's values
    found_inf_ptr,  # *f32 [1]  not 0: skip this step
    grad_scale_ptr,  # *f32 [1]  the loss scale: what gradients were multiplied by
    square_sum_ptr,  # *f64 [1]  sum of squares of all gradients as they are in memory
    stats_ptr,  # *f64 [STATS]  out: the norm before clipping, skipped steps, the loss scale
    num_rows: tl.int32,  # P
    BLOCK: tl.constexpr,  # rows per program
    SKIP_SPIKES: tl.constexpr,  # skip finite norms above the limit, too, which may be any number
    EMA: tl.constexpr,  # whether some launch averages weights
    LAYOUT: tl.constexpr,  # of the tables, for Triton's cache alone
):
    """Advance every step counter by one and write its parameter's scalars.

    A skipped step advances no counter. A step without overflow check, loss scale or clipping gets
    0, 1 and 0 in their place, so that one variant serves all steps.
    """
    grad_scale = tl.load(grad_scale_ptr).to(tl.float64)
    clip, skip = judge(hyper_ptr, found_inf_ptr, square_sum_ptr, grad_scale, stats_ptr, SKIP_SPIKES)

    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    row_ptr = rows_ptr + row * table.ROW
    step_ptr = tl.load(row_ptr + table.STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
    if not skip:
        tl.store(step_ptr, step, mask=mask)
    t = tl.minimum(step, LAST_STEP).to(tl.int32)

    hyper = hyper_ptr + tl.load(row_ptr + table.GROUP, mask=mask, other=0) * table.HYPER
    lr = tl.load(hyper + table.HYPER_LR, mask=mask, other=0.0)
    beta1 = tl.load(hyper + table.HYPER_BETA1, mask=mask, other=0.0)
    beta2 = tl.load(hyper + table.HYPER_BETA2, mask=mask, other=0.0)
    eps = tl.load(hyper + table.HYPER_EPS, mask=mask, other=0.0)
    weight_decay = tl.load(hyper + table.HYPER_WEIGHT_DECAY, mask=mask, other=0.0)
    decoupled = tl.load(hyper + table.HYPER_DECOUPLED, mask=mask, other=0.0) != 0
    maximize = tl.load(hyper + table.HYPER_MAXIMIZE, mask=mask, other=0.0) != 0

    out = scalars_ptr + row * table.SCALARS
    COMPUTE: tl.constexpr = scalars_ptr.dtype.element_ty
    step_size = lr / (1.0 - power(beta1, t))
    tl.store(out + table.STEP_SIZE, step_size.to(COMPUTE), mask=mask)
    rsqrt_bc2 = 1.0 / tl.sqrt(1.0 - power(beta2, t))
    tl.store(out + table.RSQRT_BC2, rsqrt_bc2.to(COMPUTE), mask=mask)
    tl.store(out + table.ONE_MINUS_BETA1, (1.0 - beta1).to(COMPUTE), mask=mask)
    tl.store(out + table.ONE_MINUS_BETA2, (1.0 - beta2).to(COMPUTE), mask=mask)
    tl.store(out + table.BETA2, beta2.to(COMPUTE), mask=mask)
    tl.store(out + table.EPS, eps.to(COMPUTE), mask=mask)
    # Weight decay is either coupled (L2) or decoupled (LR_WD). The other one is 0.
    l2 = tl.where(decoupled, 0.0, weight_decay)
    tl.store(out + table.L2, l2.to(COMPUTE), mask=mask)
    lr_wd = tl.where(decoupled, lr * weight_decay, 0.0)
    tl.store(out + table.LR_WD, lr_wd.to(COMPUTE), mask=mask)
    sign = tl.where(maximize, -1.0, 1.0).to(tl.float64)
    tl.store(out + table.GRAD_MULTIPLIER, (sign / grad_scale * clip).to(COMPUTE), mask=mask)
    if EMA:
        ema_decay = tl.load(hyper + table.HYPER_EMA_DECAY, mask=mask, other=0.0)
        tl.store(out + table.ONE_MINUS_EMA_DECAY, (1.0 - ema_decay).to(COMPUTE), mask=mask)
    tl.store(out + table.SKIP, tl.where(skip, 1.0, 0.0).to(COMPUTE), mask=mask)
    tl.store(out + table.STEP_NUMBER, t.to(COMPUTE), mask=mask)


def prologue(skip_spikes: bool = False, ema: bool = False) -> Launcher:
    """Advance the step counters and fill `scalars` for this step.

    Call it with `programs(P)` and the arguments below, where P is the number of rows.

    Args:
        skip_spikes: skip a step whose norm is above HYPER_SKIP_GRAD_NORM. Otherwise that column
            says whether norms that are not finite are skipped.
        ema: compute the scalar of the weights' average, too.

    Arguments of the launcher:
        rows: int64, shape (P, ROW): addresses of the step counters (float32) and group numbers.
        hyper: float64, shape (G, HYPER). Says whether gradients are clipped, and by which norm a
            step is skipped.
        scalars: float32 or float64, shape (P, SCALARS): written.
        found_inf: float32, one element. Not 0: the step is skipped, counters included.
        grad_scale: float32, one element: gradients are divided by it as they are read.
        square_sum: float64, one element: sum of squares of all gradients as they are in memory.
        stats: float64, shape (STATS,): norm and loss scale are written, the skipped steps are
            counted.
        num_rows: P.
    """
    return Launcher(prologue_kernel, [BLOCK, skip_spikes, ema, table.LAYOUT])


def programs(num_rows: int) -> int:
    """How many programs the prologue takes for that many rows."""
    return int(triton.cdiv(num_rows, BLOCK))
