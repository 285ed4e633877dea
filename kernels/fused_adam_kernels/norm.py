"""Sum of squares of all gradients, in float64 and in an order that only the parameters decide.

A gradient is cut into chunks; each of LANES lanes adds its elements of a chunk one after the other;
lanes are added by halving. Neither launch shape, tile size nor number of threads takes part. The
torch twin is `fused_adam/numerics/norm.py`.
"""

import torch
import triton
import triton.language as tl

from . import table
from .adam import TYPES
from .launch import Launcher

LANES = table.NORM_LANES
CHUNK = table.NORM_CHUNK
LEVELS = LANES.bit_length() - 1


@triton.jit
def halving_sum(x, LANES: tl.constexpr, LEVELS: tl.constexpr):
    """x[i] + x[i + half] until one is left: sums of two, which have no order. Shape (1,)."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [2, LANES >> (level + 1)]), axis=0)
    return x


@triton.jit
def square_sum_kernel(
    rows_ptr,  # *i64 [P, ROW]     addresses of the gradients, and their numel
    blocks_ptr,  # *i32 [B, 3]       which row, which CHUNK of it, where its sum belongs
    partials_ptr,  # *f64 [C]          out: one sum per chunk of every gradient, in the order of the parameters
    GRAD: tl.constexpr,  # element type behind the addresses
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program adds the squares of one chunk of one gradient."""
    block_ptr = blocks_ptr + 3 * tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + tl.load(block_ptr).to(tl.int64) * table.ROW
    start = tl.load(block_ptr + 1).to(tl.int64) * CHUNK
    n = tl.load(row_ptr + table.GRAD_NUMEL)
    g_ptr = tl.load(row_ptr + table.GRAD).to(tl.pointer_type(GRAD))
    lane = tl.arange(0, LANES).to(tl.int64)
    total = tl.zeros([LANES], tl.float64)
    for first in range(start, tl.minimum(start + CHUNK, n), LANES):
        g = tl.load(g_ptr + first + lane, mask=first + lane < n, other=0.0).to(tl.float64)
        total = total + g * g
    one = tl.arange(0, 1)
    tl.store(partials_ptr + tl.load(block_ptr + 2) + one, halving_sum(total, LANES, LEVELS))


@triton.jit(do_not_specialize=["num_partials"])
def total_kernel(
    partials_ptr,  # *f64 [C]
    total_ptr,  # *f64 [1]   out
    num_partials: tl.int32,  # C
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program adds all partial sums: lanes one after the other, then by halving."""
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for first in range(0, num_partials, LANES):
        total = total + tl.load(
            partials_ptr + first + lane, mask=first + lane < num_partials, other=0.0
        )
    tl.store(total_ptr + tl.arange(0, 1), halving_sum(total, LANES, LEVELS))


def square_sum(grad: torch.dtype) -> Launcher:
    """Squares of gradients of one dtype, a sum per chunk: call it with the number of blocks, rows,
    blocks, partials.

    rows: int64, shape (P, ROW): addresses and sizes of the gradients.
    blocks: int32, shape (B, 3): which row, which chunk of it, where its sum belongs.
    partials: float64, shape (C,): one place per chunk of any gradient, written where `blocks` say.
    """
    return Launcher(square_sum_kernel, [TYPES[grad], LANES, LEVELS, CHUNK])


def total() -> Launcher:
    """The sum of all partial sums: call it with 1, partials, total (float64, shape (1,), written),
    and their number.

    Not finite if and only if a gradient is not (float64 gradients beyond 1e154 count as infinite).
    """
    return Launcher(total_kernel, [LANES, LEVELS])
