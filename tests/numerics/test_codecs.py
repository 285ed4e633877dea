"""Codecs: exactness, unbiasedness, and the same bits from the torch and the Triton twin."""

import math
import sys

import pytest
import quality
import torch
import triton
import triton.language as tl
from process import outside_the_interpreter

from fused_adam.numerics import codecs
from fused_adam_kernels import codecs as jit

CPU = torch.device("cpu")
LARGEST = torch.finfo(torch.bfloat16).max
# Triton's interpreter computes with numpy, which warns of the NaN and overflow these tests are
# about.
adversarial = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def float_of(bits):
    """int64 or a list of ints -> the float32 values with these bits."""
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits_of(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(left, right):
    """Equal bits, where a NaN equals any NaN."""
    left, right = left.cpu(), right.cpu()
    if left.dtype.is_floating_point:
        both = left.isnan() & right.isnan()
        left, right = left.masked_fill(both, 0), right.masked_fill(both, 0)
    return left.dtype == right.dtype and torch.equal(bits_of(left), bits_of(right))


def awkward():
    """float32 of every kind, both signs: specials, subnormals, ties, neighbours of every binade's
    edge, noise.
    """
    edge = torch.arange(0, 256).repeat_interleave(9) << 23
    edges = edge + torch.tensor([-0x8001, -0x8000, -0x101, -1, 0, 1, 0x80, 0x8000, 0x8001]).repeat(
        256
    )
    specials = [
        0,
        1,
        2,
        0xFF,
        0x100,
        0x7FFF,
        0x8000,
        0x8001,
        0x7FFFFF,
        0x7F7F0000,
        0x7F7F7FFF,
        0x7F7F8000,
        0x7F7FFEFF,
    ]
    specials += [
        0x7F7FFF00,
        0x7F7FFF01,
        0x7F7FFF80,
        0x7F7FFFFF,
        0x7F800000,
        0x7F800001,
        0x7F80FFFF,
        0x7FC00000,
    ]
    ties = torch.arange(0x3F80, 0x3FC0).repeat_interleave(3) * 0x10000 + torch.tensor(
        [0x7FFF, 0x8000, 0x8001]
    ).repeat(64)
    noise = torch.randint(0, 1 << 31, (5000,), generator=torch.Generator().manual_seed(0))
    positive = torch.cat(
        [edges.clamp(0, 0x7FFFFFFF), torch.tensor([*specials, 0x7FFFFFFF]), ties, noise]
    )
    return float_of(torch.cat([positive, positive + (1 << 31)]))


def noise_for(x, seed=0):
    """Two different halves per element, with both extremes among them."""
    words = codecs.random_words(seed, 0, 1, 0, x.numel(), CPU)
    words[::7] = 0
    words[1::7] = -1
    return words


# --- Random bits


def philox_by_hand(seed, c0, c1, c2, c3):
    """Philox-4x32-10 in Python's own integers, as the paper writes it."""
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        x, y = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (y >> 32) ^ c1 ^ k0, y & 0xFFFFFFFF, (x >> 32) ^ c3 ^ k1, x & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # from Random123's kat_vectors
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(key, counter, expected):
    words = codecs.philox(key[0] | key[1] << 32, *(torch.tensor([c]) for c in counter))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


SEEDS = [0, -1, 2**63 - 1, 0x123456789ABCDEF]
PLACES = [
    (0, 1, 0),
    (2**32 - 8, 2**24, 3),
    (2**34 + 4, 77, 2**31 - 1),
]  # first element, step, ordinal


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "step", "ordinal"), PLACES)
def test_words_are_keyed_by_element_step_and_ordinal(first, step, ordinal, seed):
    words = codecs.random_words(seed, first, step, ordinal, 16, CPU)
    for i in range(16):
        quad = (first + i) // 4
        expected = philox_by_hand(seed, quad & 0xFFFFFFFF, quad >> 32, step, ordinal)[
            (first + i) % 4
        ]
        assert int(words[i]) & 0xFFFFFFFF == expected
    for start in range(1, 9):  # whoever begins in the middle of a draw gets the same words
        assert torch.equal(
            codecs.random_words(seed, first + start, step, ordinal, 7, CPU),
            words[start : start + 7],
        )


def test_the_users_generator_is_not_touched():
    before = torch.get_rng_state()
    codecs.random_words(1, 0, 1, 0, 1000, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@triton.jit
def words_kernel(
    quads_ptr, singles_ptr, seed_ptr, first_ptr, step, ordinal, origin_ptr, N: tl.constexpr
):
    offs = tl.arange(0, N)
    seed, first, origin = tl.load(seed_ptr), tl.load(first_ptr), tl.load(origin_ptr)
    tl.store(quads_ptr + offs, jit.random_words(seed, first, step, ordinal, origin, N))
    tl.store(singles_ptr + offs, jit.random_word(seed, first + offs, step, ordinal, origin))


@adversarial
@pytest.mark.parametrize("origin", [0, 8, 2**31 + 3, 2**34 - 4, 2**34 + 4, 7 << 40])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "step", "ordinal"), PLACES)
def test_twins_draw_the_same_words(first, step, ordinal, seed, origin, kernel_device):
    quads, singles = torch.zeros(2, 1024, dtype=torch.int32, device=kernel_device)
    seed_first_origin = torch.tensor([[seed], [first], [origin]], device=kernel_device)
    places = (*seed_first_origin[:2], step, ordinal, seed_first_origin[2])
    words_kernel[(1,)](quads, singles, *places, N=1024, enable_fp_fusion=False)
    expected = codecs.random_words(seed, first, step, ordinal, 1024, CPU, origin)
    assert same(singles, expected)
    if origin % 4 == 0:  # others take the tail's path
        assert same(quads, expected)


@pytest.mark.parametrize("cut", [1, 4, 30, 2**33 + 2])
def test_words_are_the_same_however_a_parameter_is_cut(cut):
    whole = codecs.random_words(5, cut, 3, 2, 100, CPU)
    assert torch.equal(codecs.random_words(5, 0, 3, 2, 100, CPU, cut), whole)
    assert torch.equal(codecs.random_words(5, 40, 3, 2, 60, CPU, cut), whole[40:])


def test_torchs_default_dtype_does_not_matter():
    """For what a user may have set it to: float64."""
    x = awkward()[:8192]
    expected = [
        *codecs.encode_m(x),
        *codecs.encode_v(x.abs(), noise_for(x) & 0xFFFF),
        *codecs.split24(x, noise_for(x)),
    ]
    torch.set_default_dtype(torch.float64)
    try:
        found = [
            *codecs.encode_m(x),
            *codecs.encode_v(x.abs(), noise_for(x) & 0xFFFF),
            *codecs.split24(x, noise_for(x)),
        ]
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


def check_split32(x):
    visible, remainder = codecs.split32(x)
    assert visible.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert same(codecs.join32(visible, remainder), x)
    assert torch.equal(visible.isnan(), x.isnan())
    tie = (bits_of(x) & 0xFFFF) == 0x8000
    nearest = x.to(torch.bfloat16)
    assert same(visible[~tie], nearest[~tie])
    assert (visible[tie].float().abs() > x[tie].abs())[~x[tie].isnan()].all()  # away from zero


def every_low_half(high):
    return float_of(high * 65536 + torch.arange(65536))


def test_split32_loses_nothing():
    """All 65536 low halves, under the first and the last high half of every binade, both signs."""
    for exponent in range(256):
        for sign in (0, 0x8000):
            for mantissa in (0, 0x7F):
                check_split32(every_low_half(sign | exponent << 7 | mantissa))


@pytest.mark.long
def test_split32_loses_nothing_of_any_float32():
    for high in range(0, 65536, 16):
        check_split32(float_of(torch.arange(high * 65536, (high + 16) * 65536)))


def test_split24_is_one_of_two_neighbours_in_proportion():
    """For every noise and kind of value, it goes up exactly as often as the dropped bits say."""
    x = awkward()
    x = x[x.isfinite() & (x.abs() <= codecs.TOP_CELL_24)]
    up = torch.zeros(x.numel(), dtype=torch.int32)
    low_bits = bits_of(x) & 0xFF
    for noise in range(256):
        back = bits_of(
            codecs.join24(
                *codecs.split24(x, torch.full(x.shape, noise | 0xAB00, dtype=torch.int32))
            )
        )
        went_up = back != bits_of(x) - low_bits
        assert (back == bits_of(x) - low_bits + 256 * went_up).all()
        up += went_up
    assert torch.equal(up, low_bits)


def test_split24_at_the_top():
    """Nothing finite overflows: what is above the largest pair stays at it. Infinities and NaN
    stay.
    """
    x = float_of([0x7F7FFF00, 0x7F7FFF01, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000])
    expected = float_of([0x7F7FFF00, 0x7F7FFF00, 0x7F7FFF00, 0xFF7FFF00, 0x7F800000, 0xFF800000])
    for noise in (0, 1, 255):
        assert same(
            codecs.join24(*codecs.split24(x, torch.full((6,), noise, dtype=torch.int32))), expected
        )
        visible, remainder = codecs.split24(
            float_of([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]), torch.tensor(noise)
        )
        assert visible.isnan().all() and codecs.join24(visible, remainder).isnan().all()


def test_stochastic_rounding_is_exactly_unbiased():
    """For every noise and kind of value, it goes up exactly as often as the dropped bits say."""
    x = torch.cat(
        [awkward()[::97], float_of([1, 0x8000, 0x7F7EFFFF, 0x807FFFFF, 0x3F7FFFFF, 0xBF800001])]
    )
    x = x[x.isfinite() & (x.abs() < LARGEST)]
    assert (x.abs() < 1e-38).any() and (x.abs() > 1e38).any()
    low_bits = bits_of(x) & 0xFFFF
    down = x.view(torch.int32) - low_bits
    up = torch.zeros(x.numel(), dtype=torch.int64)
    for noise in torch.arange(65536, dtype=torch.int32).view(-1, 64, 1):
        went_up = bits_of(codecs.stochastic_bf16(x, noise).float()) != down
        assert (bits_of(codecs.stochastic_bf16(x, noise).float()) == down + 65536 * went_up).all()
        up += went_up.sum(0)
    assert torch.equal(up, low_bits.long())


def test_stochastic_rounding_at_the_top_and_of_what_is_exact():
    exact = torch.arange(65536).to(torch.int16).view(torch.bfloat16)
    top = float_of([0x7F7F0001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7F7FFF, 0xFF7F8000])
    for noise in (0, 0x8000, 0xFFFF):
        assert same(
            codecs.stochastic_bf16(exact.float(), torch.tensor(noise, dtype=torch.int32)), exact
        )
        assert same(
            codecs.stochastic_bf16(top, torch.tensor(noise, dtype=torch.int32)),
            top.to(torch.bfloat16),
        )


@pytest.mark.parametrize("x", [1.00123, -1.00123, 1e-40, 1.999, LARGEST * 0.999, 2**-126 * 1.001])
def test_random_words_leave_no_bias(x):
    """A million draws from consecutive elements: the mean is within four standard deviations."""
    words = codecs.random_words(5, 0, 9, 2, 1_000_000, CPU)
    value = torch.full((1_000_000,), x)
    share = float(bits_of(value[:1]) & 0xFFFF) / 65536
    for noise in (codecs.weight_noise(words), codecs.state_noise(words)):
        up = bits_of(codecs.stochastic_bf16(value, noise).float()) != (bits_of(value) & ~0xFFFF)
        assert (
            abs(float(up.double().mean()) - share) <= 4 * (share * (1 - share) / 1_000_000) ** 0.5
        )


def drift(relative_update, store, steps=2000, numel=8192):
    """What is left of `steps` equal updates, as the mean of displacement / (steps * update) - 1."""
    start = 1 + torch.arange(numel) / numel * 0.9
    start = codecs.join24(*codecs.split24(start, torch.tensor(0)))
    update = start * relative_update
    w = start
    for step in range(steps):
        w = store(w - update, step)
    exact = start.double() - steps * update.double()
    return float(((w.double() - exact) / (steps * update.double())).mean())


@pytest.mark.parametrize("exponent", [-16, -18, -20, -22])
def test_split24_moves_without_bias(exponent):
    def stochastic(w, step):
        noise = codecs.weight_noise(codecs.random_words(0, 0, step, 0, w.numel(), CPU))
        return codecs.join24(*codecs.split24(w, noise))

    assert abs(drift(2.0**exponent, stochastic)) < 1e-2


def test_rounding_to_nearest_stalls():
    """The same measure tells the peers' way apart."""
    assert (
        drift(2.0**-18, lambda w, step: codecs.join24(*codecs.split24(w, torch.tensor(128)))) > 0.9
    )


def test_decay_alone_shrinks_weights_stored_stochastically():
    """bfloat16 rounded to nearest stays where it is: the factor is 1.0."""
    start = (1 + torch.arange(4096) / 4096).bfloat16()
    w, nearest = start.clone(), start.clone()
    for step in range(2000):
        noise = codecs.weight_noise(codecs.random_words(0, 0, step, 0, 4096, CPU))
        w = codecs.stochastic_bf16(w.float() - 1e-4 * w.float(), noise)
        nearest = (nearest.float() - 1e-4 * nearest.float()).bfloat16()
    factor = float((w.double() / start.double()).mean())
    assert factor == pytest.approx((1 - 1e-4) ** 2000, rel=1e-2)
    assert torch.equal(nearest, start)


# --- 8-bit moments


def groups():
    """Groups of 32 of every kind; the two first ones are NaN's and infinity's."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(32, generator=generator) * 10.0**e for e in range(-45, 39)]
    rows += [torch.exp(4 * torch.randn(32, generator=generator)) for _ in range(64)]
    poisoned = torch.ones(3, 32)
    poisoned[0, 5], poisoned[1, 7], poisoned[2, 9] = math.nan, math.inf, -math.inf
    one_large = torch.zeros(1, 32)
    one_large[0, 3] = 3.4e38  # above the largest finite bfloat16
    codes_m = torch.arange(0, 128).square() / 16129.0  # decoded values and their neighbours
    codes_v = (torch.arange(0, 256) / 255.0) ** 4
    near = [
        torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1).abs()])
        for x in (codes_m, codes_v)
    ]
    near = torch.cat(near).view(-1, 32)
    near[:, 0] = 1.0
    # Where m's code changes, and its neighbours, for scales whose reciprocals round.
    change = (torch.arange(128) * torch.arange(1, 129) + 0.5) / 16129.0
    scales = (1 + torch.rand(16, 1, generator=generator)).bfloat16().float()
    change = (scales * change).view(-1)
    change = torch.stack(
        [change, torch.nextafter(change, change + 1), torch.nextafter(change, change - 1)]
    )
    change = change.view(3, 16, 4, 32)
    change[..., 0] = scales
    near = torch.cat([near, change.view(-1, 32)])
    return torch.cat(
        [
            poisoned,
            torch.zeros(1, 32),
            one_large,
            torch.stack(rows),
            near,
            awkward()[:9984].view(-1, 32),
        ]
    )


@triton.jit
def moments_kernel(
    m_ptr,
    v_ptr,
    words_ptr,
    m_code_ptr,
    m_scale_ptr,
    m_back_ptr,
    v_code_ptr,
    v_scale_ptr,
    v_back_ptr,
    N: tl.constexpr,
):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    span = tl.program_id(0) * (N // 8) + tl.arange(0, N // 8)
    code, scale = jit.encode_m(tl.load(m_ptr + offs))
    tl.store(m_code_ptr + offs, code)
    tl.store(m_scale_ptr + span // 4, jit.spread_to_threads(scale, N, 8), mask=span % 4 == 0)
    tl.store(m_back_ptr + offs, jit.decode_m(code, scale))
    words = tl.load(words_ptr + offs).to(tl.uint32, bitcast=True)
    code, scale = jit.encode_v(tl.load(v_ptr + offs), jit.state_noise(words))
    tl.store(v_code_ptr + offs, code)
    tl.store(v_scale_ptr + span // 4, jit.spread_to_threads(scale, N, 8), mask=span % 4 == 0)
    tl.store(v_back_ptr + offs, jit.decode_v(code, scale))


@adversarial
def test_twins_encode_moments_to_the_same_bits(kernel_device):
    m = groups().view(-1)
    m = torch.nn.functional.pad(m, (0, 32768 - m.numel()))
    v = m.abs()
    words = noise_for(m, seed=4)
    out = []
    for code in (torch.int8, torch.uint8):
        out += [
            torch.empty(32768, dtype=code),
            torch.empty(1024, dtype=torch.bfloat16),
            torch.empty(32768),
        ]
    out = [x.to(kernel_device) for x in out]
    inputs = (x.to(kernel_device) for x in (m, v, words))
    # One program for all would take the compiler 40 s.
    moments_kernel[(32,)](*inputs, *out, N=1024, enable_fp_fusion=False)
    m_code, m_scale = codecs.encode_m(m)
    v_code, v_scale = codecs.encode_v(v, codecs.state_noise(words))
    expected = [
        m_code,
        m_scale,
        codecs.decode_m(m_code, m_scale),
        v_code,
        v_scale,
        codecs.decode_v(v_code, v_scale),
    ]
    for left, right in zip(out, expected, strict=True):
        assert same(left, right)


COMPILE = """
import collections, json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from test_codecs import moments_kernel, words_kernel, weights_kernel

found = {}
for kernel, types in {
    moments_kernel: "*fp32 *fp32 *i32 *i8 *bf16 *fp32 *u8 *bf16 *fp32",
    weights_kernel: "*fp32 *i32 *bf16 *bf16 *bf16 *i16 *fp32 *bf16 *i8 *fp32",
    words_kernel: "*i32 *i32 *i64 *i64 i32 i32 *i64",
}.items():
    signature = dict(zip(kernel.arg_names, [*types.split(), "constexpr"]))
    source = ASTSource(kernel, signature, {(len(signature) - 1,): 128})
    options = {"num_warps": 4, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    for name in re.findall(r"^\\s*(?:@%p\\d+ )?([a-z][\\w.]*)", ptx, re.M):
        if re.search("fma|approx|full|ex2|lg2|rcp|div|sqrt|f64", name):
            found[name] = found.get(name, 0) + 1
print(json.dumps(found))
"""


def test_a_gpu_rounds_as_the_interpreter_does():
    """For sm_90, one element per thread: nothing is approximate but the guesses, one root for m and
    two for v.
    """
    found = outside_the_interpreter("-c", f"import sys; sys.path[:0] = {sys.path!r}\n{COMPILE}")
    assert found == {"sqrt.approx.ftz.f32": 3, "div.rn.f32": 2}


def finite_groups():
    x = groups()
    return x[(x.abs() <= LARGEST).all(1)]


def test_scales_are_rounded_up():
    x = groups().abs()
    x = x[x.isfinite().all(1)]
    scale = codecs.group_scale(x.view(-1)).float()
    top = x.abs().amax(1)
    low, high = top < 2.0**-92, top > LARGEST
    assert low.any() and high.any()
    assert (scale[low] == 2.0**-92).all() and scale[high].isnan().all()
    between = ~low & ~high
    assert (scale >= top)[between].all()
    below = (bits_of(scale) - 0x10000).view(torch.float32)
    assert (below < top)[between].all()


def test_m_is_nearest():
    x = finite_groups()
    code, scale = codecs.encode_m(x.view(-1))
    assert int(code.min()) == -127 and int(code.max()) == 127
    tried = [codecs.decode_m(torch.full_like(code, c), scale).double() for c in range(-127, 128)]
    error = (codecs.decode_m(code, scale).double() - x.view(-1)).abs()
    best = torch.stack([(t - x.view(-1)).abs() for t in tried]).amin(0)
    largest = codecs.spread(scale.double())
    # Beside a change of code both errors are equal but for four roundings, each of 2^-24 at most,
    # twice.
    assert (error <= best + largest * 2.0**-21).all()


def test_v_is_one_of_two_neighbours_in_proportion():
    """64 noises spread evenly for every kind of value: the mean is the value, but for what 64
    cannot resolve.
    """
    v = finite_groups().abs()
    total, v = torch.zeros(v.numel(), dtype=torch.float64), v.view(-1)
    codes, scale = [], codecs.group_scale(v)
    for noise in range(512, 65536, 1024):
        code, _ = codecs.encode_v(v, torch.full(v.shape, noise, dtype=torch.int32))
        codes.append(code.int())
        total += codecs.decode_v(code, scale).double()
    lowest, highest = torch.stack(codes).amin(0), torch.stack(codes).amax(0)
    assert (highest - lowest <= 1).all()
    low, high = (
        codecs.decode_v(c.to(torch.uint8), scale).double() for c in (highest - 1, lowest + 1)
    )
    smallest = codecs.decode_v(torch.ones_like(code), scale).double()
    kept = v > smallest
    assert kept.float().mean() > 0.5
    unit_error = codecs.spread(scale.double()) * 2.0**-22
    gap = torch.maximum(high - total / 64, total / 64 - low)
    assert ((total / 64 - v).abs() <= gap / 64 + unit_error)[kept].all()
    assert (lowest == 1)[(v > 0) & ~kept].all()
    assert (highest == 0)[v == 0].all()


@pytest.mark.parametrize("noise", [0, 0xFFFF])
def test_no_positive_v_decodes_to_zero(noise):
    v = torch.nn.functional.pad(float_of(torch.arange(1, 0x7F7F0000, 99991)), (0, 31))
    v = (
        v[: v.numel() // 32 * 32].view(32, -1).T.reshape(-1).contiguous()
    )  # 32 magnitudes to a group
    code, scale = codecs.encode_v(v, torch.tensor(noise, dtype=torch.int32))
    assert torch.equal(codecs.decode_v(code, scale) > 0, v > 0)


def test_zeros_stay_zeros():
    zeros = torch.zeros(64)
    assert (codecs.decode_m(*codecs.encode_m(zeros)) == 0).all()
    assert (codecs.decode_v(*codecs.encode_v(zeros, torch.tensor(0xFFFF))) == 0).all()
    fresh = torch.zeros(64, dtype=torch.uint8)  # zeroed memory is a valid state
    assert (
        codecs.decode_m(fresh.view(torch.int8), torch.zeros(2, dtype=torch.bfloat16)) == 0
    ).all()
    assert (codecs.decode_v(fresh, torch.zeros(2, dtype=torch.bfloat16)) == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_group_and_shows(poison):
    x = torch.ones(96)
    x[40] = poison
    for back in (
        codecs.decode_m(*codecs.encode_m(x)),
        codecs.decode_v(*codecs.encode_v(x.abs(), torch.tensor(7))),
    ):
        assert not back[32:64].isfinite().any()
        assert (back[:32] == 1).all() and (back[64:] == 1).all()


def test_what_is_decoded_encodes_to_itself():
    """Storing m without a change drifts nowhere."""
    code = torch.arange(-127, 128, dtype=torch.int8)
    code = torch.cat([code, code[-1:]])
    for scale in (1.0, 0.3, 1e-9, 1e20):
        scale = torch.full((8,), scale).bfloat16()
        code[::32] = 127
        again, scale_again = codecs.encode_m(codecs.decode_m(code, scale))
        assert same(again, code) and same(scale_again, scale)


# --- What the moments become over thousands of steps


@pytest.mark.parametrize("drop", [False, True], ids=["stationary", "gradients drop"])
@pytest.mark.parametrize("store", [quality.bf16, quality.int8], ids=lambda f: f.__name__)
def test_second_moments_do_not_go_stale(store, drop):
    found = quality.update_quality(store, 1.0, drop=drop)
    assert 0.98 <= found["v_ratio"] <= 1.02
    assert (
        found["largest"] <= 5 * found["largest_fp32"]
    )  # no zero in v, in groups whose v spans many decades


def test_nearest_second_moments_go_stale():
    """The same measure tells the peers' way apart."""
    assert quality.update_quality(quality.nearest_bf16, 1.0, drop=True)["v_ratio"] > 2


@pytest.mark.parametrize("store", [quality.bf16, quality.int8], ids=lambda f: f.__name__)
def test_error_does_not_depend_on_the_gradients_scale(store):
    errors = [
        quality.update_quality(store, 0.5, std=10.0**-e, steps=300)["rmse"] for e in range(3, 10)
    ]
    assert max(errors) <= 1.1 * min(errors)
