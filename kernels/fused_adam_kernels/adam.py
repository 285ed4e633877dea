"""The update kernel: addresses, masks, loads, stores, and its launcher.

The arithmetic is in `formula.py`, the roundings are in `codecs.py`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import table
from .codecs import (
    GROUP,
    decode_moments,
    elements_per_draw,
    encode_moments,
    has_extra,
    load_weight,
    random_word,
    random_words,
    spread_to_threads,
    state_noise,
    stochastic_bf16,
    store_weight,
    takes_random_bits,
    to_compute,
    to_storage,
)
from .config import launch_config
from .formula import Scalars, adam_update, hidden_one
from .launch import Launcher

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


class Pointers(NamedTuple):
    """Where the operands of one parameter are. What a recipe does not store is never loaded."""

    p: tl.tensor
    g: tl.tensor
    m: tl.tensor
    v: tl.tensor
    v_max: tl.tensor
    extra: tl.tensor  # master weight or remainder
    m_scale: tl.tensor
    v_scale: tl.tensor
    ema: tl.tensor  # average of the parameter


class RandomKey(NamedTuple):
    """What keys the random bits of one parameter at one step; see `codecs.draw`."""

    seed: tl.tensor  # i64
    param_index: tl.tensor  # i32: position of the parameter in the optimizer
    global_offset: tl.tensor  # i64: where the local shard begins in the full parameter
    step: tl.tensor  # i32


@triton.jit
def load_addresses(row_ptr, EMA: tl.constexpr):
    """Where the operands of one row are, as numbers."""
    p = tl.load(row_ptr + table.PARAM)
    # Without an average its column is not read. The address of p says no more about alignment.
    ema = p
    if EMA:
        ema = tl.load(row_ptr + table.EMA)
    return Pointers(
        p=p,
        g=tl.load(row_ptr + table.GRAD),
        m=tl.load(row_ptr + table.EXP_AVG),
        v=tl.load(row_ptr + table.EXP_AVG_SQ),
        v_max=tl.load(row_ptr + table.MAX_EXP_AVG_SQ),
        extra=tl.load(row_ptr + table.EXTRA),
        m_scale=tl.load(row_ptr + table.EXP_AVG_SCALE),
        v_scale=tl.load(row_ptr + table.EXP_AVG_SQ_SCALE),
        ema=ema,
    )


@triton.jit
def typed(
    at,  # Pointers, as numbers
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    V_MAX: tl.constexpr,
    EXTRA: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Pointers to elements of these types."""
    return Pointers(
        p=at.p.to(tl.pointer_type(PARAM)),
        g=at.g.to(tl.pointer_type(GRAD)),
        m=at.m.to(tl.pointer_type(M)),
        v=at.v.to(tl.pointer_type(V)),
        v_max=at.v_max.to(tl.pointer_type(V_MAX)),
        extra=at.extra.to(tl.pointer_type(EXTRA)),
        m_scale=at.m_scale.to(tl.pointer_type(tl.bfloat16)),
        v_scale=at.v_scale.to(tl.pointer_type(tl.bfloat16)),
        ema=at.ema.to(tl.pointer_type(COMPUTE)),
    )


@triton.jit
def multiple(address, DTYPE: tl.constexpr, HINT: tl.constexpr):
    """A pointer that promises to be a multiple of `HINT` bytes."""
    # The promise must follow the cast: before it, or in a caller, it is lost.
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), HINT)


@triton.jit
def aligned(
    at,  # Pointers, as numbers
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    V_MAX: tl.constexpr,
    EXTRA: tl.constexpr,
    COMPUTE: tl.constexpr,
    PARAM_HINT: tl.constexpr,
    GRAD_HINT: tl.constexpr,
    MOMENT_HINT: tl.constexpr,
    V_MAX_HINT: tl.constexpr,
    EXTRA_HINT: tl.constexpr,
    EMA_HINT: tl.constexpr,
):
    """As `typed`, with a promise to be multiples of so many bytes."""
    return Pointers(
        p=multiple(at.p, PARAM, PARAM_HINT),
        g=multiple(at.g, GRAD, GRAD_HINT),
        m=multiple(at.m, M, MOMENT_HINT),
        v=multiple(at.v, V, MOMENT_HINT),
        v_max=multiple(at.v_max, V_MAX, V_MAX_HINT),
        extra=multiple(at.extra, EXTRA, EXTRA_HINT),
        m_scale=at.m_scale.to(tl.pointer_type(tl.bfloat16)),
        v_scale=at.v_scale.to(tl.pointer_type(tl.bfloat16)),
        ema=multiple(at.ema, COMPUTE, EMA_HINT),
    )


@triton.jit
def load_scalars(ptr):
    """This step's scalars of one row."""
    return Scalars(
        step_size=tl.load(ptr + table.STEP_SIZE),
        rsqrt_bc2=tl.load(ptr + table.RSQRT_BC2),
        one_minus_beta1=tl.load(ptr + table.ONE_MINUS_BETA1),
        one_minus_beta2=tl.load(ptr + table.ONE_MINUS_BETA2),
        beta2=tl.load(ptr + table.BETA2),
        eps=tl.load(ptr + table.EPS),
        l2=tl.load(ptr + table.L2),
        lr_wd=tl.load(ptr + table.LR_WD),
        grad_multiplier=tl.load(ptr + table.GRAD_MULTIPLIER),
        one_minus_ema_decay=tl.load(ptr + table.ONE_MINUS_EMA_DECAY),
    )


@triton.jit
def load_key(row_ptr, s_ptr):
    """The key of one row's random bits at this step."""
    return RandomKey(
        seed=tl.load(row_ptr + table.SEED),
        param_index=tl.load(row_ptr + table.PARAM_INDEX).to(tl.int32),
        global_offset=tl.load(row_ptr + table.GLOBAL_OFFSET),
        step=tl.load(s_ptr + table.STEP_NUMBER).to(tl.int32),
    )


@triton.jit
def load_block(
    ptrs,
    first,
    limit,
    N: tl.constexpr,
    COMPUTE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STATES: tl.constexpr,
    AMSGRAD: tl.constexpr,
    EMA: tl.constexpr,
):
    """Return p, g, m, v, v_max (without AMSGrad: v) and ema (without an average: p) of a block as
    values of type COMPUTE.

    Arguments are those of `update_block`.
    """
    # 64 bits: a parameter may have more than 2^31 elements.
    offs = first + tl.arange(0, N).to(tl.int64)
    mask = offs < limit
    p = tl.load(ptrs.p + offs, mask=mask, other=0.0)
    g = to_compute(tl.load(ptrs.g + offs, mask=mask, other=0.0), COMPUTE)
    m = tl.load(ptrs.m + offs, mask=mask, other=0)
    v = tl.load(ptrs.v + offs, mask=mask, other=0)
    if has_extra(WEIGHTS):
        extra = tl.load(ptrs.extra + offs, mask=mask, other=0)
    else:
        extra = p
    p = load_weight(p, extra, WEIGHTS, COMPUTE)
    if STATES == "int8":
        groups = first // GROUP + tl.arange(0, N // GROUP).to(tl.int64)
        groups_mask = groups * GROUP < limit
        m_scale = to_compute(tl.load(ptrs.m_scale + groups, mask=groups_mask, other=0.0), COMPUTE)
        v_scale = to_compute(tl.load(ptrs.v_scale + groups, mask=groups_mask, other=0.0), COMPUTE)
        m, v = decode_moments(m, v, m_scale, v_scale)
    else:
        m = to_compute(m, COMPUTE)
        v = to_compute(v, COMPUTE)
    if AMSGRAD:
        v_max = to_compute(tl.load(ptrs.v_max + offs, mask=mask, other=0.0), COMPUTE)
    else:
        v_max = v
    if EMA:
        ema = tl.load(ptrs.ema + offs, mask=mask, other=0.0)
    else:
        ema = p
    return p, g, m, v, v_max, ema


@triton.jit
def block_bits(
    key,
    first,
    N: tl.constexpr,
    SHARED_DRAWS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STATES: tl.constexpr,
):
    """One word of random bits per element of a block, if its recipe rounds by them.

    It serves weight and state: 16 bits each.
    """
    SHARE: tl.constexpr = elements_per_draw(STATES)
    if not takes_random_bits(WEIGHTS, STATES):
        return 0
    elif SHARED_DRAWS:
        return random_words(key.seed, first, key.step, key.param_index, key.global_offset, N, SHARE)
    else:
        offs = first + tl.arange(0, N).to(tl.int64)
        return random_word(key.seed, offs, key.step, key.param_index, key.global_offset, SHARE)


@triton.jit
def store_block(
    ptrs,
    p,
    m,
    v,
    v_max,
    ema,
    bits,
    one,
    moves,  # whether the parameter is stored
    first,
    limit,
    N: tl.constexpr,
    VEC: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STATES: tl.constexpr,
    AMSGRAD: tl.constexpr,
    EMA: tl.constexpr,
):
    """Round a block to what is stored, by its random bits, and store it."""
    offs = first + tl.arange(0, N).to(tl.int64)
    mask = offs < limit
    if moves:
        new_p, new_extra = store_weight(p, bits, WEIGHTS, ptrs.p.dtype.element_ty)
        tl.store(ptrs.p + offs, new_p, mask=mask)
        if has_extra(WEIGHTS):
            tl.store(ptrs.extra + offs, new_extra, mask=mask)
    if STATES == "int8":
        m, v, m_scale, v_scale = encode_moments(m, v, state_noise(bits), one)
        # The thread that holds a group's first elements stores its scale. Stores by group instead
        # of by vector would move the scales between threads, through shared memory.
        vectors = first + VEC * tl.arange(0, N // VEC).to(tl.int64)
        vectors_mask = (vectors % GROUP == 0) & (vectors < limit)
        m_scale = to_storage(spread_to_threads(m_scale, N, VEC), tl.bfloat16)
        v_scale = to_storage(spread_to_threads(v_scale, N, VEC), tl.bfloat16)
        tl.store(ptrs.m_scale + vectors // GROUP, m_scale, mask=vectors_mask)
        tl.store(ptrs.v_scale + vectors // GROUP, v_scale, mask=vectors_mask)
    elif STATES == "bf16":
        # Nearest for m: it changes by a tenth of itself per step. v changes by a thousandth, which
        # rounding to nearest would lose; stochastic rounding keeps it on average.
        m = to_storage(m, tl.bfloat16)
        v = stochastic_bf16(v, state_noise(bits))
    else:
        m = to_storage(m, ptrs.m.dtype.element_ty)
        v = to_storage(v, ptrs.v.dtype.element_ty)
    tl.store(ptrs.m + offs, m, mask=mask)
    tl.store(ptrs.v + offs, v, mask=mask)
    if AMSGRAD:
        tl.store(ptrs.v_max + offs, to_storage(v_max, ptrs.v_max.dtype.element_ty), mask=mask)
    if EMA:
        tl.store(ptrs.ema + offs, ema, mask=mask)


@triton.jit
def update_block(
    ptrs,  # Pointers
    s,  # Scalars
    one,  # from `hidden_one`
    key,  # RandomKey
    first,  # i64: first element of the block
    limit,  # i64: end of the elements that may be updated
    SHARED_DRAWS: tl.constexpr,  # one draw for 4 or 8 elements; else one for each: same bits
    N: tl.constexpr,  # elements per block
    VEC: tl.constexpr,  # elements per thread and access
    COMPUTE: tl.constexpr,  # type of the arithmetic
    WEIGHTS: tl.constexpr,
    STATES: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    EMA: tl.constexpr,
):
    """Load, update and store elements [first, first + N) of one parameter, up to `limit`."""
    p, g, m, v, v_max, ema = load_block(
        ptrs, first, limit, N, COMPUTE, WEIGHTS, STATES, AMSGRAD, EMA
    )
    p, m, v, v_max, ema = adam_update(p, g, m, v, v_max, ema, s, one, AMSGRAD, CAUTIOUS, EMA)
    bits = block_bits(key, first, N, SHARED_DRAWS, WEIGHTS, STATES)
    # A step of size zero leaves parameters as they are: p - 0 would turn -0.0 into 0.0.
    moves = (s.step_size != 0) | (s.lr_wd != 0)
    store_block(
        ptrs, p, m, v, v_max, ema, bits, one, moves, first, limit, N, VEC, WEIGHTS, STATES,
        AMSGRAD, EMA,
    )  # fmt: skip


@triton.jit
def adam_kernel(
    rows_ptr,  # *i64 [P, ROW]  addresses of p, g, m, v, ...; numel (columns: table.py)
    blocks_ptr,  # *i32 [B, 2]  per program: which row, which BLOCK of it
    scalars_ptr,  # *f32 or *f64 [P, SCALARS]  this step's values, written by the prologue
    WEIGHTS: tl.constexpr,  # "native", "master32", "split32", "split24" or "sr"
    STATES: tl.constexpr,  # "native", "fp32", "bf16" or "int8"
    PARAM: tl.constexpr,  # element types behind the addresses
    GRAD: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    V_MAX: tl.constexpr,
    EXTRA: tl.constexpr,
    PARAM_HINT: tl.constexpr,  # bytes of alignment to promise, so that all loads share one layout
    GRAD_HINT: tl.constexpr,
    MOMENT_HINT: tl.constexpr,
    V_MAX_HINT: tl.constexpr,
    EXTRA_HINT: tl.constexpr,
    EMA_HINT: tl.constexpr,
    VEC: tl.constexpr,  # elements per thread and access
    AMSGRAD: tl.constexpr,  # keep the running maximum of v
    CAUTIOUS: tl.constexpr,  # decay only towards zero
    EMA: tl.constexpr,  # average the weights
    BLOCK: tl.constexpr,  # elements per program
    TAIL: tl.constexpr,  # elements per turn of the tail loop; 0: no loop, for `inspect.py`
    LAYOUT: tl.constexpr,  # of the tables, for Triton's cache alone
):
    """One program updates one block of one parameter, or of several coalesced ones."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(blocks_ptr + 2 * program).to(tl.int64)
    start = tl.load(blocks_ptr + 2 * program + 1).to(tl.int64) * BLOCK
    row_ptr = rows_ptr + row * table.ROW
    s_ptr = scalars_ptr + row * table.SCALARS
    # A skipped step has no elements.
    n = tl.where(tl.load(s_ptr + table.SKIP) == 0, tl.load(row_ptr + table.NUMEL), 0)
    at = load_addresses(row_ptr, EMA)
    key = load_key(row_ptr, s_ptr)
    s = load_scalars(s_ptr)
    COMPUTE: tl.constexpr = scalars_ptr.dtype.element_ty
    one = hidden_one(rows_ptr, COMPUTE)

    # The body: vector accesses, for rows whose operands are all aligned to 16 bytes and whose
    # random bits come in whole draws. The compiler vectorizes a masked access only if it sees that
    # the bound is a multiple of the vector: hence 32, which is also a group of 8-bit codes.
    addresses = at.p | at.g | at.m | at.v | at.v_max | at.extra | at.ema
    misaligned = addresses & 15 | (key.global_offset & (elements_per_draw(STATES) - 1))
    body_end = tl.where(misaligned == 0, n, 0) // 32 * 32
    body = aligned(
        at, PARAM, GRAD, M, V, V_MAX, EXTRA, COMPUTE,
        PARAM_HINT, GRAD_HINT, MOMENT_HINT, V_MAX_HINT, EXTRA_HINT, EMA_HINT,
    )  # fmt: skip
    # A misaligned row runs the body with an empty mask. A branch around it would take fp32 from 72
    # to 80 registers (6 programs at a time instead of 7), and spill up to 24 bytes more with random
    # bits (sm_90). fp32 and bf16 gain nothing from it: the memory's time is still the longer one.
    update_block(
        body, s, one, key, start, body_end, True, BLOCK, VEC, COMPUTE, WEIGHTS, STATES,
        AMSGRAD, CAUTIOUS, EMA,
    )  # fmt: skip

    # The tail: what is left, at any alignment. A block of TAIL elements has too few per thread to
    # draw random bits for four at once.
    if TAIL > 0:
        tail = typed(at, PARAM, GRAD, M, V, V_MAX, EXTRA, COMPUTE)
        end = tl.minimum(start + BLOCK, n)
        for first in range(tl.maximum(start, body_end), end, TAIL):
            update_block(
                tail, s, one, key, first, end, False, TAIL, VEC, COMPUTE, WEIGHTS, STATES,
                AMSGRAD, CAUTIOUS, EMA,
            )  # fmt: skip


class StorageTypes(NamedTuple):
    """Element types of what is stored for a parameter besides itself."""

    m: torch.dtype
    v: torch.dtype
    v_max: torch.dtype
    extra: torch.dtype  # master weight or remainder


def storage_types(param: torch.dtype, weights: str, states: str) -> StorageTypes:
    """What the two halves of a recipe store for parameters of this dtype."""
    m, v, v_max = {
        "native": (param, param, param),
        "fp32": (torch.float32, torch.float32, torch.float32),
        "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        "int8": (torch.int8, torch.uint8, torch.bfloat16),
    }[states]
    extras = {"master32": torch.float32, "split32": torch.int16, "split24": torch.int8}
    # Other recipes store and load nothing there. The parameter's type does not narrow its vectors.
    return StorageTypes(m, v, v_max, extras.get(weights, param))


def constants(
    param: torch.dtype,
    grad: torch.dtype,
    weights: str,
    states: str,
    amsgrad: bool,
    cautious: bool = False,
    ema: bool = False,
) -> dict[str, Any]:
    """The update kernel's compile-time arguments by name, in its order."""
    stored = storage_types(param, weights, states)
    # Without AMSGrad v_max is not loaded, so its type does not count.
    v_max = stored.v_max if amsgrad else stored.m
    compute = torch.float64 if param == torch.float64 else torch.float32
    operands = (param, grad, stored.m, v_max, stored.extra, *([compute] if ema else []))
    widest = max(dtype.itemsize for dtype in operands)
    # The promised alignment decides how many elements a thread takes per access, and must give the
    # same number for every operand. With 16 bytes for all, bf16 would take 8 elements next to the 4
    # of fp32, and the compiler would reconcile the two through shared memory.
    vec = 16 // widest
    config = launch_config(param, grad, weights, states, amsgrad)
    return {
        "WEIGHTS": weights,
        "STATES": states,
        "PARAM": TYPES[param],
        "GRAD": TYPES[grad],
        "M": TYPES[stored.m],
        "V": TYPES[stored.v],
        "V_MAX": TYPES[stored.v_max],
        "EXTRA": TYPES[stored.extra],
        "PARAM_HINT": vec * param.itemsize,
        "GRAD_HINT": vec * grad.itemsize,
        "MOMENT_HINT": vec * stored.m.itemsize,
        "V_MAX_HINT": vec * v_max.itemsize,
        "EXTRA_HINT": vec * stored.extra.itemsize,
        "EMA_HINT": vec * compute.itemsize,
        "VEC": vec,
        "AMSGRAD": amsgrad,
        "CAUTIOUS": cautious,
        "EMA": ema,
        "BLOCK": config.block,
        "TAIL": config.tail,
        "LAYOUT": table.LAYOUT,
    }


def adam_step(
    param: torch.dtype,
    grad: torch.dtype,
    weights: str,
    states: str,
    amsgrad: bool,
    cautious: bool = False,
    ema: bool = False,
) -> Launcher:
    """One Adam step in place, in one launch: `launcher(len(blocks), rows, blocks, scalars)`.

    Reads gradients and writes parameters and what is stored for them.

    Args:
        param, grad: element types behind the addresses of the rows that `blocks` names.
        weights, states: the two halves of a recipe, or "native" and "native".
        amsgrad: keep the running maximum of the second moment.
        cautious: decay a parameter only where the update moves it towards zero.
        ema: average the parameters.

    Arguments of the launcher:
        rows: int64, shape (P, ROW): parameters of one device. Rows that no block names stay as
            they are.
        blocks: int32, shape (B, 2): (row, block of the row) pairs. Each block of
            `launch_config(...).block` elements occurs once.
        scalars: shape (P, SCALARS), from the prologue: float32, or float64 for float64 parameters.
    """
    config = launch_config(param, grad, weights, states, amsgrad)
    arguments = list(constants(param, grad, weights, states, amsgrad, cautious, ema).values())
    return Launcher(adam_kernel, arguments, config.num_warps, config.max_registers)
