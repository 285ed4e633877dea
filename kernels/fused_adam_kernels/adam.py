"""The update kernel's addresses, masks, loads and stores, and its launcher. The arithmetic is in `math.py`."""

import torch
import triton
import triton.language as tl

from . import table
from .codecs import INTERPRET, to_storage
from .launch import Launcher
from .math import adam_update

# Elements per program and per turn of its tail loop. The interpreter pays 3-7 ms per program whatever its size.
# Turns of 256 keep 36 kB of misaligned fp32 rows in flight per multiprocessor (sm_90: 9 programs of 56 registers),
# turns of 128 keep 16; an H200 needs 25 (4.8 TB/s for 0.7 us over 132). 2048 elements in 4 warps would save 5 of 55
# instructions per element, where there is time for 217.
BLOCK = 8192 if INTERPRET.value else 1024
TAIL = BLOCK if INTERPRET.value else 256
NUM_WARPS = 4

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


@triton.jit
def aligned(address, DTYPE: tl.constexpr, HINT: tl.constexpr):
    """A pointer that promises `HINT` bytes. The promise must follow the cast: before it, it is lost."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), HINT)


@triton.jit
def update_span(
    p_ptr, g_ptr, m_ptr, v_ptr, v_max_ptr, offs, ok, step_size, rbc2, w1, w2, b2, eps, coupled, decay, grad_multiplier,
    COMPUTE: tl.constexpr, AMSGRAD: tl.constexpr,
):  # fmt: skip
    """Load, update and store the elements `offs` of one parameter where `ok`."""
    p = tl.load(p_ptr + offs, mask=ok, other=0.0).to(COMPUTE)
    g = tl.load(g_ptr + offs, mask=ok, other=0.0).to(COMPUTE)
    m = tl.load(m_ptr + offs, mask=ok, other=0.0).to(COMPUTE)
    v = tl.load(v_ptr + offs, mask=ok, other=0.0).to(COMPUTE)
    if AMSGRAD:
        v_max = tl.load(v_max_ptr + offs, mask=ok, other=0.0).to(COMPUTE)
    else:
        v_max = v
    p, m, v, v_max = adam_update(
        p, g, m, v, v_max, step_size, rbc2, w1, w2, b2, eps, coupled, decay, grad_multiplier, AMSGRAD
    )
    # A step of size zero leaves parameters as they are: p - 0 would turn -0.0 into 0.0.
    if (step_size != 0) | (decay != 0):
        tl.store(p_ptr + offs, to_storage(p, p_ptr.dtype.element_ty), mask=ok)
    tl.store(m_ptr + offs, to_storage(m, m_ptr.dtype.element_ty), mask=ok)
    tl.store(v_ptr + offs, to_storage(v, v_ptr.dtype.element_ty), mask=ok)
    if AMSGRAD:
        tl.store(v_max_ptr + offs, to_storage(v_max, v_max_ptr.dtype.element_ty), mask=ok)


@triton.jit
def adam_kernel(
    rows_ptr,  # *i64 [P, ROW]     addresses of p, g, m, v, v_max; numel (columns named in table.py)
    blocks_ptr,  # *i32 [B, 2]       which row, which BLOCK of it
    scalars_ptr,  # *f32 or *f64 [P, SCALARS]  this step's values, written by the prologue
    PARAM: tl.constexpr,  # element types behind the addresses
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    PARAM_HINT: tl.constexpr,  # bytes of alignment to promise, so that all loads share one layout
    GRAD_HINT: tl.constexpr,
    STATE_HINT: tl.constexpr,
    AMSGRAD: tl.constexpr,  # keep the running maximum of v
    BLOCK: tl.constexpr,  # elements per program
    TAIL: tl.constexpr,  # elements per turn of the loop over what vectors cannot take
):
    """One program updates one chunk of one parameter (or of several that lie one behind the other)."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(blocks_ptr + 2 * pid).to(tl.int64)
    start = tl.load(blocks_ptr + 2 * pid + 1).to(tl.int64) * BLOCK
    row_ptr = rows_ptr + row * table.ROW
    s_ptr = scalars_ptr + row * table.SCALARS
    # A skipped step has no elements.
    n = tl.where(tl.load(s_ptr + table.SKIP) == 0, tl.load(row_ptr + table.NUMEL), 0)
    p_addr = tl.load(row_ptr + table.PARAM)
    g_addr = tl.load(row_ptr + table.GRAD)
    m_addr = tl.load(row_ptr + table.EXP_AVG)
    v_addr = tl.load(row_ptr + table.EXP_AVG_SQ)
    v_max_addr = tl.load(row_ptr + table.MAX_EXP_AVG_SQ)

    step_size = tl.load(s_ptr + table.STEP_SIZE)
    rbc2 = tl.load(s_ptr + table.RBC2)
    w1 = tl.load(s_ptr + table.W1)
    w2 = tl.load(s_ptr + table.W2)
    b2 = tl.load(s_ptr + table.B2)
    eps = tl.load(s_ptr + table.EPSILON)
    coupled = tl.load(s_ptr + table.COUPLED)
    decay = tl.load(s_ptr + table.DECAY)
    grad_multiplier = tl.load(s_ptr + table.GRAD_MULTIPLIER)
    COMPUTE: tl.constexpr = scalars_ptr.dtype.element_ty

    # Vectors take whole groups of 16 elements of aligned rows: a bound that the compiler sees is a multiple of 16.
    misaligned = (p_addr | g_addr | m_addr | v_addr | v_max_addr) & 15
    body_end = tl.where(misaligned == 0, n, 0) // 16 * 16
    body = start + tl.arange(0, BLOCK)
    update_span(
        aligned(p_addr, PARAM, PARAM_HINT), aligned(g_addr, GRAD, GRAD_HINT), aligned(m_addr, STATE, STATE_HINT),
        aligned(v_addr, STATE, STATE_HINT), aligned(v_max_addr, STATE, STATE_HINT), body, body < body_end,
        step_size, rbc2, w1, w2, b2, eps, coupled, decay, grad_multiplier, COMPUTE, AMSGRAD,
    )  # fmt: skip

    end = tl.minimum(start + BLOCK, n)
    for first in range(tl.maximum(start, body_end), end, TAIL):
        tail = first + tl.arange(0, TAIL).to(tl.int64)
        update_span(
            p_addr.to(tl.pointer_type(PARAM)), g_addr.to(tl.pointer_type(GRAD)), m_addr.to(tl.pointer_type(STATE)),
            v_addr.to(tl.pointer_type(STATE)), v_max_addr.to(tl.pointer_type(STATE)), tail, tail < end,
            step_size, rbc2, w1, w2, b2, eps, coupled, decay, grad_multiplier, COMPUTE, AMSGRAD,
        )  # fmt: skip


def hints(*dtypes: torch.dtype) -> list[int]:
    """Bytes of alignment to promise per dtype, so that every operand takes as many elements per thread.

    With 16 bytes for all, bf16 beside fp32 would take 8 elements to 4, and meet it through shared memory.
    """
    widest = max(dtype.itemsize for dtype in dtypes)
    return [16 * dtype.itemsize // widest for dtype in dtypes]


def adam_step(param: torch.dtype, grad: torch.dtype, state: torch.dtype, amsgrad: bool) -> Launcher:
    """One Adam step in place, in one launch: call it with the number of blocks, rows, blocks and scalars.

    Args:
        param, grad, state: element types behind the addresses of the rows that `blocks` names.
        amsgrad: keep the running maximum of the second moment.

    rows: int64, shape (P, ROW): parameters of one device. Rows that no block names are left alone.
    blocks: int32, shape (B, 2): (row, chunk) pairs; each chunk of BLOCK elements once.
    scalars: float32, or float64 for float64 parameters; shape (P, SCALARS), from `prologue`.
    Writes parameters and moments; reads gradients and never writes them.
    """
    types = [TYPES[dtype] for dtype in (param, grad, state)]
    return Launcher(adam_kernel, [*types, *hints(param, grad, state), amsgrad, BLOCK, TAIL], NUM_WARPS)
