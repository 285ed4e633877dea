"""Codecs: the same bits from the torch and the Triton twin, as compiled for a GPU too, and under
any default dtype.
"""

import sys

import pytest
import torch
import triton
import triton.language as tl
from codec_values import CPU, PLACES, SEEDS, awkward, groups, noise_for, same
from process import outside_the_interpreter

from fused_adam.numerics import codecs
from fused_adam_kernels import codecs as jit

# Triton's interpreter computes with numpy, which warns of the NaN and overflow these tests are
# about.
adversarial = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


# --- Random bits


@triton.jit
def words_kernel(
    together_ptr,
    singles_ptr,
    seed_ptr,
    first_ptr,
    step,
    ordinal,
    origin_ptr,
    SHARE: tl.constexpr,
    N: tl.constexpr,
):
    offs = tl.arange(0, N)
    seed, first, origin = tl.load(seed_ptr), tl.load(first_ptr), tl.load(origin_ptr)
    together = jit.random_words(seed, first, step, ordinal, origin, N, SHARE)
    tl.store(together_ptr + offs, together)
    tl.store(singles_ptr + offs, jit.random_word(seed, first + offs, step, ordinal, origin, SHARE))


@adversarial
@pytest.mark.parametrize("share", [4, 8])
@pytest.mark.parametrize("origin", [0, 8, 2**31 + 3, 2**34 - 4, 2**34 + 4, 7 << 40])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "step", "ordinal"), PLACES)
def test_twins_draw_the_same_words(first, step, ordinal, seed, origin, share, kernel_device):
    together, singles = torch.zeros(2, 1024, dtype=torch.int32, device=kernel_device)
    seed_first_origin = torch.tensor([[seed], [first], [origin]], device=kernel_device)
    places = (*seed_first_origin[:2], step, ordinal, seed_first_origin[2])
    words_kernel[(1,)](together, singles, *places, SHARE=share, N=1024, enable_fp_fusion=False)
    expected = codecs.random_words(seed, first, step, ordinal, 1024, CPU, origin, share)
    assert same(singles, expected)
    if origin % share == first % share == 0:  # others take the tail's path
        assert same(together, expected)


def test_torchs_default_dtype_does_not_matter():
    """For what a user may have set it to: float64."""
    x, bits = awkward()[:8192], noise_for(awkward()[:8192])

    def everything():
        moments = codecs.encode_moments(x, x.abs(), bits & 0xFFFF)
        return [
            *moments,
            *codecs.decode_moments(*moments),
            *codecs.split24(x, bits),
            codecs.random_words(1, 0, 1, 0, 64, CPU, share=8),
        ]

    expected = everything()
    torch.set_default_dtype(torch.float64)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for left, right in zip(found, expected, strict=True):
        assert same(left, right)


# --- Weights


@triton.jit
def weights_kernel(
    x_ptr, words_ptr, nearest_ptr, sr_ptr,
    visible32_ptr, low32_ptr, back32_ptr,
    visible24_ptr, low24_ptr, back24_ptr,
    N: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    words = tl.load(words_ptr + offs).to(tl.uint32, bitcast=True)
    tl.store(nearest_ptr + offs, jit.to_storage(x, tl.bfloat16))
    tl.store(sr_ptr + offs, jit.stochastic_bf16(x, jit.weight_noise(words)))
    visible, low = jit.split32(x)
    tl.store(visible32_ptr + offs, visible)
    tl.store(low32_ptr + offs, low)
    tl.store(back32_ptr + offs, jit.join32(visible, low))
    visible, low = jit.split24(x, jit.weight_noise(words))
    tl.store(visible24_ptr + offs, visible)
    tl.store(low24_ptr + offs, low)
    tl.store(back24_ptr + offs, jit.join24(visible, low))


@adversarial
def test_twins_round_weights_to_the_same_bits(kernel_device):
    x = awkward()
    x = torch.nn.functional.pad(x, (0, 16384 - x.numel()), value=1.0)
    words = noise_for(x)
    bf16, i16, i8, f32 = torch.bfloat16, torch.int16, torch.int8, torch.float32
    out = [
        torch.empty(x.numel(), dtype=t, device=kernel_device)
        for t in (bf16, bf16, bf16, i16, f32, bf16, i8, f32)
    ]
    weights_kernel[(16,)](
        x.to(kernel_device), words.to(kernel_device), *out, N=1024, enable_fp_fusion=False
    )
    noise = codecs.weight_noise(words)
    split32, split24 = codecs.split32(x), codecs.split24(x, noise)
    expected = [x.to(bf16), codecs.stochastic_bf16(x, noise), *split32, codecs.join32(*split32)]
    expected += [*split24, codecs.join24(*split24)]
    for left, right in zip(out, expected, strict=True):
        assert same(left, right)


# --- 8-bit moments


@triton.jit
def moments_kernel(
    m_ptr,
    v_ptr,
    words_ptr,
    m_code_ptr,
    v_code_ptr,
    m_scale_ptr,
    v_scale_ptr,
    m_back_ptr,
    v_back_ptr,
    N: tl.constexpr,
):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    span = tl.program_id(0) * (N // 8) + tl.arange(0, N // 8)
    words = tl.load(words_ptr + offs).to(tl.uint32, bitcast=True)
    m_code, v_code, m_scale, v_scale = jit.encode_moments(
        tl.load(m_ptr + offs), tl.load(v_ptr + offs), jit.state_noise(words), 1.0
    )
    m, v = jit.decode_moments(m_code, v_code, m_scale, v_scale)
    tl.store(m_code_ptr + offs, m_code)
    tl.store(v_code_ptr + offs, v_code)
    for_groups = span % 4 == 0
    m_scale, v_scale = jit.spread_to_threads(m_scale, N, 8), jit.spread_to_threads(v_scale, N, 8)
    tl.store(m_scale_ptr + span // 4, jit.to_storage(m_scale, tl.bfloat16), mask=for_groups)
    tl.store(v_scale_ptr + span // 4, jit.to_storage(v_scale, tl.bfloat16), mask=for_groups)
    tl.store(m_back_ptr + offs, m)
    tl.store(v_back_ptr + offs, v)


@adversarial
def test_twins_encode_moments_to_the_same_bits(kernel_device):
    m, v = (torch.nn.functional.pad(x.view(-1), (0, -x.numel() % 1024)) for x in groups())
    words = noise_for(m, seed=4)
    numel = m.numel()
    out = [
        torch.empty(numel, dtype=torch.int8),
        torch.empty(numel, dtype=torch.uint8),
        *(torch.empty(numel // 32, dtype=torch.bfloat16) for _ in range(2)),
        *torch.empty(2, numel),
    ]
    out = [x.to(kernel_device) for x in out]
    inputs = (x.to(kernel_device) for x in (m, v, words))
    # One program for all would take the compiler 40 s.
    moments_kernel[(numel // 1024,)](*inputs, *out, N=1024, enable_fp_fusion=False)
    stored = codecs.encode_moments(m, v, codecs.state_noise(words))
    for left, right in zip(out, (*stored, *codecs.decode_moments(*stored)), strict=True):
        assert same(left, right)


COMPILE = """
import collections, json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from test_codec_twins import moments_kernel, words_kernel, weights_kernel

found = {}
for kernel, types in {
    moments_kernel: "*fp32 *fp32 *i32 *i8 *u8 *bf16 *bf16 *fp32 *fp32",
    weights_kernel: "*fp32 *i32 *bf16 *bf16 *bf16 *i16 *fp32 *bf16 *i8 *fp32",
    words_kernel: "*i32 *i32 *i64 *i64 i32 i32 *i64 constexpr",
}.items():
    signature = dict(zip(kernel.arg_names, [*types.split(), "constexpr"]))
    constants = {"N": 128, "SHARE": 8}
    places = {(i,): constants[name] for i, name in enumerate(signature) if name in constants}
    source = ASTSource(kernel, signature, places)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    for name in re.findall(r"^\\s*(?:@%p\\d+ )?([a-z][\\w.]*)", ptx, re.M):
        if re.search("fma|approx|full|ex2|lg2|rcp|div|sqrt|f64", name):
            found[name] = found.get(name, 0) + 1
print(json.dumps(found))
"""


def test_a_gpu_rounds_as_the_interpreter_does():
    """For sm_90: nothing is approximate or fused, not even a guess."""
    found = outside_the_interpreter("-c", f"import sys; sys.path[:0] = {sys.path!r}\n{COMPILE}")
    assert found == {}
