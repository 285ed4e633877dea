"""Sum of squares of all gradients, in float64 and in an order that only the parameters decide.

A gradient is cut into chunks. Each of LANES lanes adds its elements of a chunk one after the other,
then the lanes are added by halving. The order does not depend on launch shape, tile size or number
of threads. The torch twin is `fused_adam/numerics/norm.py`.
"""

import torch
import triton
import triton.language as tl

from . import table
from .adam import TYPES
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
def square_sum_kernel(
    rows_ptr,  # *i64 [P, ROW]  addresses of the gradients, and their numel
    blocks_ptr,  # *i32 [B, 3]  which row, which CHUNK of it, index of its sum in partials
    partials_ptr,  # *f64 [C]  out: one sum per chunk of every gradient, in the parameters' order
    GRAD: tl.constexpr,  # element type behind the addresses
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNK: tl.constexpr,
    LAYOUT: tl.constexpr,  # of the tables, for Triton's cache alone
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
    return Launcher(square_sum_kernel, [TYPES[grad], LANES, LEVELS, CHUNK, table.LAYOUT])


def total() -> Launcher:
    """The sum of all partial sums: call it with 1, partials, total and the number of partials.

    It is finite if and only if all gradients are. (Float64 gradients beyond 1e154 count as
    infinite.)

    Arguments of the launcher:
        partials: float64, shape (C,), written by `square_sum`.
        total: float64, shape (1,): written.
        num_partials: C.
    """
    return Launcher(total_kernel, [LANES, LEVELS])
