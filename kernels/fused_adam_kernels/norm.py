"""Sum of squares of all gradients, in an order that only the parameters decide.

A gradient is cut into chunks. Each of LANES lanes adds its elements of a chunk one after the other,
then the lanes are added by halving. The order does not depend on launch shape, tile size or number
of threads. The torch twin is `fused_adam/numerics/norm.py`.

A lane squares and adds in float32 and keeps what every addition rounds off in a second float32. So
the sum of the squares is nearly that of float64, without float64 per element: consumer GPUs have
1/64 of their rate in it, and a B300 1/60. Only lanes and chunks are added in float64. Gradients in
float64 stay in float64.
"""

import torch
import triton
import triton.language as tl

from . import table
from .adam import TYPES, multiple
from .codecs import to_compute
from .launch import Launcher

LANES = table.NORM_LANES
CHUNK = table.NORM_CHUNK
LEVELS = LANES.bit_length() - 1  # halvings until one lane is left


@triton.jit
def halving_sum(x, LANES: tl.constexpr, LEVELS: tl.constexpr):
    """Add x[i] + x[i + half] until one element is left. Shape (1,)."""
    # tl.sum over two elements: a sum of more has an order that the compiler chooses.
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [2, LANES >> (level + 1)]), axis=0)
    return x


@triton.jit
def add_square(total, error, g):
    """Return total + g * g, and `error` plus what that sum rounded off (two-sum: Knuth 1969).

    The square itself is rounded to float32. float64 sums need no error.
    """
    square = g * g
    if g.dtype == tl.float32:
        # Changes no bit, but separates product and sum: without it ptxas 12.9 (Triton 3.6) fuses
        # them on Blackwell, even with fusion switched off (see `inspect.py`).
        square = tl.maximum(square, 0.0, propagate_nan=tl.PropagateNan.ALL)
    bigger = total + square
    if g.dtype != tl.float64:
        part = bigger - total
        error = error + ((total - (bigger - part)) + (square - part))
    return bigger, error


@triton.jit
def square_sum_kernel(
    rows_ptr,  # *i64 [P, ROW]  addresses of the gradients, and their numel
    blocks_ptr,  # *i32 [B, 3]  which row, which CHUNK of it, index of its sum in partials
    partials_ptr,  # *f64 [C]  out: one sum per chunk of every gradient, in the parameters' order
    GRAD: tl.constexpr,  # element type behind the addresses
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,  # 0: only whole turns of aligned gradients, for `inspect.py`
    LAYOUT: tl.constexpr,  # of the tables, for Triton's cache alone
):
    """One program adds the squares of one chunk of one gradient."""
    block_ptr = blocks_ptr + 3 * tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + tl.load(block_ptr).to(tl.int64) * table.ROW
    start = tl.load(block_ptr + 1).to(tl.int64) * CHUNK
    end = tl.minimum(start + CHUNK, tl.load(row_ptr + table.GRAD_NUMEL))
    address = tl.load(row_ptr + table.GRAD)
    COMPUTE: tl.constexpr = tl.float64 if GRAD == tl.float64 else tl.float32
    lane = tl.arange(0, LANES).to(tl.int64)
    total = tl.zeros([LANES], COMPUTE)
    error = tl.zeros([LANES], COMPUTE)

    # The body: whole turns of all lanes, by vector accesses, if the gradient is aligned.
    turns = tl.where(address & 15 == 0, end - start, 0) // LANES
    body_end = start + turns * LANES
    body_ptr = multiple(address, GRAD, 16)
    for first in range(start, body_end, LANES):
        g = to_compute(tl.load(body_ptr + first + lane), COMPUTE)
        total, error = add_square(total, error, g)
    # The tail: what is left, at any alignment.
    if TAIL > 0:
        tail_ptr = address.to(tl.pointer_type(GRAD))
        for first in range(body_end, end, LANES):
            g = tl.load(tail_ptr + first + lane, mask=first + lane < end, other=0.0)
            total, error = add_square(total, error, to_compute(g, COMPUTE))

    # An infinite sum has no error, but two-sum gives a NaN for it.
    lanes = total.to(tl.float64) + tl.where(total < float("inf"), error, 0.0).to(tl.float64)
    one = tl.arange(0, 1)
    tl.store(partials_ptr + tl.load(block_ptr + 2) + one, halving_sum(lanes, LANES, LEVELS))


@triton.jit(do_not_specialize=["num_partials"])
def total_kernel(
    partials_ptr,  # *f64 [C]
    total_ptr,  # *f64 [1]  out
    num_partials: tl.int32,  # C
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program adds all partial sums: each lane its own in order, then the lanes by halving."""
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for first in range(0, num_partials, LANES):
        mask = first + lane < num_partials
        total = total + tl.load(partials_ptr + first + lane, mask=mask, other=0.0)
    tl.store(total_ptr + tl.arange(0, 1), halving_sum(total, LANES, LEVELS))


def square_sum(grad: torch.dtype) -> Launcher:
    """Sums of squares of gradients of one dtype, one sum per chunk.

    Call it with `len(blocks)` and the arguments below.

    Arguments of the launcher:
        rows: int64, shape (P, ROW): addresses and sizes of the gradients.
        blocks: int32, shape (B, 3): (row, chunk of the row, index of its sum in partials).
        partials: float64, shape (C,): one element per chunk of any gradient. Written where `blocks`
            say.
    """
    return Launcher(square_sum_kernel, [TYPES[grad], LANES, LEVELS, CHUNK, 1, table.LAYOUT])


def total() -> Launcher:
    """The sum of all partial sums: call it with 1, partials, total and the number of partials.

    It is infinite or NaN if a gradient is. Finite gradients overflow it from 2e18 on, as they do
    torch's own norm in float32 (float64 ones: from 1e153 on).

    Arguments of the launcher:
        partials: float64, shape (C,), written by `square_sum`.
        total: float64, shape (1,): written.
        num_partials: C.
    """
    return Launcher(total_kernel, [LANES, LEVELS])
