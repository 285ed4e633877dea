"""The update kernel's addresses, masks, loads and stores, and its launcher. The arithmetic is in
`math.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import table
from .codecs import (
    GROUP,
    decode_m,
    decode_v,
    encode_m,
    encode_v,
    load_weight,
    random_word,
    random_words,
    spread_to_threads,
    state_noise,
    stochastic_bf16,
    store_weight,
    to_compute,
    to_storage,
)
from .config import launch_config
from .formula import adam_update
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


@triton.jit
def aligned(address, DTYPE: tl.constexpr, HINT: tl.constexpr):
    """A pointer that promises `HINT` bytes. The promise must follow the cast: before it, it is
    lost.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), HINT)


@triton.jit
def update_span(
    p_ptr, g_ptr, m_ptr, v_ptr, v_max_ptr, extra_ptr, m_scale_ptr, v_scale_ptr, first, limit, seed, step, ordinal,
    origin, step_size, rbc2, w1, w2, b2, eps, coupled, decay, grad_multiplier,
    BODY: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, COMPUTE: tl.constexpr,
    WEIGHTS: tl.constexpr, STATES: tl.constexpr, AMSGRAD: tl.constexpr,
):  # fmt: skip
    """Load, update and store N elements of one parameter, from `first` to `limit` at most.

    In the BODY one random draw serves four elements; the tail has too few per thread, and draws for
    each: same bits.
    """
    offs = first + tl.arange(0, N).to(tl.int64)
    ok = offs < limit
    p = tl.load(p_ptr + offs, mask=ok, other=0.0)
    g = to_compute(tl.load(g_ptr + offs, mask=ok, other=0.0), COMPUTE)
    m = tl.load(m_ptr + offs, mask=ok, other=0)
    v = tl.load(v_ptr + offs, mask=ok, other=0)
    if WEIGHTS == "master32" or WEIGHTS == "split32" or WEIGHTS == "split24":
        extra = tl.load(extra_ptr + offs, mask=ok, other=0)
    else:
        extra = p
    p = load_weight(p, extra, WEIGHTS, COMPUTE)
    if STATES == "int8":
        groups = first // GROUP + tl.arange(0, N // GROUP).to(tl.int64)
        groups_ok = groups * GROUP < limit
        m = decode_m(
            m, to_compute(tl.load(m_scale_ptr + groups, mask=groups_ok, other=0.0), COMPUTE)
        )
        v = decode_v(
            v, to_compute(tl.load(v_scale_ptr + groups, mask=groups_ok, other=0.0), COMPUTE)
        )
    else:
        m = to_compute(m, COMPUTE)
        v = to_compute(v, COMPUTE)
    if AMSGRAD:
        v_max = to_compute(tl.load(v_max_ptr + offs, mask=ok, other=0.0), COMPUTE)
    else:
        v_max = v
    p, m, v, v_max = adam_update(
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
        AMSGRAD,
    )
    if WEIGHTS == "split24" or WEIGHTS == "sr" or STATES == "bf16" or STATES == "int8":
        if BODY:
            words = random_words(seed, first, step, ordinal, origin, N)
        else:
            words = random_word(seed, offs, step, ordinal, origin)
    else:
        words = 0
    # A step of size zero leaves parameters as they are: p - 0 would turn -0.0 into 0.0.
    if (step_size != 0) | (decay != 0):
        visible, beside = store_weight(p, words, WEIGHTS, p_ptr.dtype.element_ty)
        tl.store(p_ptr + offs, visible, mask=ok)
        if WEIGHTS == "master32" or WEIGHTS == "split32" or WEIGHTS == "split24":
            tl.store(extra_ptr + offs, beside, mask=ok)
    if STATES == "int8":
        m, m_scale = encode_m(m)
        v, v_scale = encode_v(v, state_noise(words))
        # The thread that has a group's first elements stores its scale.
        spans = first + SPAN * tl.arange(0, N // SPAN).to(tl.int64)
        spans_ok = (spans % GROUP == 0) & (spans < limit)
        m_scale = spread_to_threads(m_scale, N, SPAN)
        v_scale = spread_to_threads(v_scale, N, SPAN)
        tl.store(m_scale_ptr + spans // GROUP, to_storage(m_scale, tl.bfloat16), mask=spans_ok)
        tl.store(v_scale_ptr + spans // GROUP, to_storage(v_scale, tl.bfloat16), mask=spans_ok)
    elif STATES == "bf16":
        m = to_storage(m, tl.bfloat16)
        v = stochastic_bf16(v, state_noise(words))
    else:
        m = to_storage(m, m_ptr.dtype.element_ty)
        v = to_storage(v, v_ptr.dtype.element_ty)
    tl.store(m_ptr + offs, m, mask=ok)
    tl.store(v_ptr + offs, v, mask=ok)
    if AMSGRAD:
        tl.store(v_max_ptr + offs, to_storage(v_max, v_max_ptr.dtype.element_ty), mask=ok)


@triton.jit
def adam_kernel(
    rows_ptr,  # *i64 [P, ROW]     addresses of p, g, m, v, ...; numel (columns named in table.py)
    blocks_ptr,  # *i32 [B, 2]       which row, which BLOCK of it
    scalars_ptr,  # *f32 or *f64 [P, SCALARS]  this step's values, written by the prologue
    WEIGHTS: tl.constexpr,  # how weights and moments are stored: a recipe's two halves, or "native"
    STATES: tl.constexpr,
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
    SPAN: tl.constexpr,  # elements per thread and access
    AMSGRAD: tl.constexpr,  # keep the running maximum of v
    BLOCK: tl.constexpr,  # elements per program
    TAIL: tl.constexpr,  # elements per turn of the loop over what vectors cannot take; 0: no loop, for `inspect`
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
    extra_addr = tl.load(row_ptr + table.EXTRA)
    m_scale_ptr = tl.load(row_ptr + table.EXP_AVG_SCALE).to(tl.pointer_type(tl.bfloat16))
    v_scale_ptr = tl.load(row_ptr + table.EXP_AVG_SQ_SCALE).to(tl.pointer_type(tl.bfloat16))
    seed = tl.load(row_ptr + table.SEED)
    ordinal = tl.load(row_ptr + table.ORDINAL).to(tl.int32)
    origin = tl.load(row_ptr + table.ORIGIN)
    step = tl.load(s_ptr + table.STEP_NUMBER).to(tl.int32)

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

    # Vectors take whole groups of 32 elements of aligned rows: a bound that the compiler sees is a
    # multiple of 32. (And rows whose random bits come in whole fours.)
    misaligned = (p_addr | g_addr | m_addr | v_addr | v_max_addr | extra_addr) & 15 | (origin & 3)
    body_end = tl.where(misaligned == 0, n, 0) // 32 * 32
    update_span(
        aligned(p_addr, PARAM, PARAM_HINT), aligned(g_addr, GRAD, GRAD_HINT), aligned(m_addr, M, MOMENT_HINT),
        aligned(v_addr, V, MOMENT_HINT), aligned(v_max_addr, V_MAX, V_MAX_HINT), aligned(extra_addr, EXTRA, EXTRA_HINT),
        m_scale_ptr, v_scale_ptr, start, body_end, seed, step, ordinal,
        origin, step_size, rbc2, w1, w2, b2, eps, coupled, decay, grad_multiplier,
        True, BLOCK, SPAN, COMPUTE, WEIGHTS, STATES, AMSGRAD,
    )  # fmt: skip

    if TAIL > 0:
        end = tl.minimum(start + BLOCK, n)
        for first in range(tl.maximum(start, body_end), end, TAIL):
            update_span(
                p_addr.to(tl.pointer_type(PARAM)), g_addr.to(tl.pointer_type(GRAD)), m_addr.to(tl.pointer_type(M)),
                v_addr.to(tl.pointer_type(V)), v_max_addr.to(tl.pointer_type(V_MAX)),
                extra_addr.to(tl.pointer_type(EXTRA)), m_scale_ptr, v_scale_ptr, first, end, seed, step, ordinal,
                origin, step_size, rbc2, w1, w2, b2, eps, coupled, decay, grad_multiplier,
                False, TAIL, SPAN, COMPUTE, WEIGHTS, STATES, AMSGRAD,
            )  # fmt: skip


def hints(*dtypes: torch.dtype) -> list[int]:
    """Bytes of alignment to promise per dtype, so that every operand takes as many elements per
    thread.

    With 16 bytes for all, bf16 beside fp32 would take 8 elements to 4, and meet it through shared
    memory.
    """
    widest = max(dtype.itemsize for dtype in dtypes)
    return [16 * dtype.itemsize // widest for dtype in dtypes]


def storage_types(
    param: torch.dtype, weights: str, states: str
) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
    """Element types of the first and second moment, the maximum of the second, and what is beside
    the parameter.
    """
    m, v, v_max = {
        "native": (param, param, param),
        "fp32": (torch.float32,) * 3,
        "bf16": (torch.bfloat16,) * 3,
        "int8": (torch.int8, torch.uint8, torch.bfloat16),
    }[states]
    # Where nothing is beside the parameter, a type that promises nothing: none is loaded.
    extra = {"master32": torch.float32, "split32": torch.int16, "split24": torch.int8}.get(
        weights, param
    )
    return m, v, v_max, extra


def constants(
    param: torch.dtype, grad: torch.dtype, weights: str, states: str, amsgrad: bool
) -> dict[str, Any]:  # by name
    """The update kernel's compile-time arguments, in its order."""
    m, v, v_max, extra = storage_types(param, weights, states)
    used = (param, grad, m, v_max if amsgrad else m, extra)
    config = launch_config(param, grad, weights, states)
    return {
        "WEIGHTS": weights,
        "STATES": states,
        **{
            name: TYPES[dtype]
            for name, dtype in zip(
                ("PARAM", "GRAD", "M", "V", "V_MAX", "EXTRA"),
                (param, grad, m, v, v_max, extra),
                strict=True,
            )
        },
        **dict(
            zip(
                ("PARAM_HINT", "GRAD_HINT", "MOMENT_HINT", "V_MAX_HINT", "EXTRA_HINT"),
                hints(*used),
                strict=True,
            )
        ),
        "SPAN": 16 // max(dtype.itemsize for dtype in used),
        "AMSGRAD": amsgrad,
        "BLOCK": config.block,
        "TAIL": config.tail,
    }


def adam_step(
    param: torch.dtype, grad: torch.dtype, weights: str, states: str, amsgrad: bool
) -> Launcher:
    """One Adam step in place, in one launch: call it with the number of blocks, rows, blocks and
    scalars.

    Args:
        param, grad: element types behind the addresses of the rows that `blocks` names.
        weights, states: how weights and moments are stored there: the two halves of a recipe, or
            "native" both.
        amsgrad: keep the running maximum of the second moment.

    rows: int64, shape (P, ROW): parameters of one device. Rows that no block names are left alone.
    blocks: int32, shape (B, 2): (row, chunk) pairs; each chunk of `launch_config(...).block`
        elements once.
    scalars: float32, or float64 for float64 parameters; shape (P, SCALARS), from `prologue`.
    Writes parameters and what is stored for them; reads gradients and never writes them.
    """
    config = launch_config(param, grad, weights, states)
    arguments = list(constants(param, grad, weights, states, amsgrad).values())
    return Launcher(adam_kernel, arguments, config.num_warps, config.max_registers)
