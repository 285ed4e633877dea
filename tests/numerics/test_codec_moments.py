"""The codec of 8-bit moments: exactness, rounding without bias, zeros and poison."""

import math

import pytest
import torch
from codec_values import awkward, bits_of, float_of, groups

from fused_adam.numerics import codecs


def finite_groups():
    """Groups whose moments are finite, and related as those of a step are: |m| / sqrt(v) <= 10."""
    m, v = groups()
    fine = (v < 1e38).all(1) & (m.abs() <= 10 * v.sqrt()).all(1)
    assert fine.sum() > 200
    return m[fine].view(-1), v[fine].view(-1)


def encode(m, v, noise):
    """All elements with the same noise."""
    return codecs.encode_moments(m, v, torch.full(m.shape, noise, dtype=torch.int32))


def step_of(v_scale):
    """In bits of float32: twice the lowest bit that is set."""
    lattice = v_scale.view(torch.int16).to(torch.int32) << 16
    return 2 * (lattice & -lattice)


def test_inverse_is_within_4e_5_on_average_exact():
    x = torch.arange(0x3F800000, 0x40800000, 5, dtype=torch.int32)  # two binades: all there is
    error = codecs.inverse(x).double() * x.view(torch.float32).double() - 1
    assert error.abs().max() < 4e-5 and abs(error.mean()) < 1e-5


def test_root_is_between_the_square_root_and_7_percent_more():
    v = awkward()
    v = v[(v > 2.0**-126) & v.isfinite()]
    excess = codecs.root(bits_of(v)).view(torch.float32).double() / v.double().sqrt() - 1
    assert -1e-7 < excess.min() and excess.max() < 0.0607
    assert (codecs.root(torch.zeros(1, dtype=torch.int32)).view(torch.float32) > 0).all()


def test_codes_of_m_use_their_range():
    """Largest ratios have code 126 or 127, never 128: it would wrap."""
    m, v = finite_groups()
    for noise in (0, 0x80, 0xFF):
        m_code, _, m_scale, _ = encode(m, v, noise)
        assert int(m_code.min()) >= -127
        tops = m_code.view(-1, 32).int().abs().amax(1)
        assert (tops[m_scale.float() > 2.0**-92] >= 125).all()  # a bfloat16 scale is up to 1 % high


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 6)])
def test_rounding_is_exactly_unbiased(rows):
    """All 65,536 noises of groups with fine, middle and coarse steps: the means are the values, and
    each has two codes at most, which are neighbours.
    """
    generator = torch.Generator().manual_seed(1)
    spread = torch.tensor([[0.1], [0.7], [1.5], [3.0], [6.0], [9.0]])[rows]
    v = torch.exp(spread * torch.randn(len(spread), 32, generator=generator)).view(-1)
    m = v.sqrt() * torch.randn(v.shape, generator=generator)
    ratio = m.double() / codecs.root(bits_of(v)).view(torch.float32).double()
    v_sum, ratio_sum = torch.zeros(2, v.numel(), dtype=torch.float64)
    codes = []
    for noise in torch.arange(65536, dtype=torch.int32).view(64, 1024, 1):
        wide = noise.expand(1024, v.numel()).reshape(-1)
        m_code, v_code, m_scale, v_scale = codecs.encode_moments(
            m.repeat(1024), v.repeat(1024), wide
        )
        _, v_back = codecs.decode_moments(m_code, v_code, m_scale, v_scale)
        v_sum += v_back.view(1024, -1).double().sum(0)
        ratios = m_code.double() * codecs.spread(m_scale.double())
        ratio_sum += ratios.view(1024, -1).sum(0)
        codes.append(torch.stack([m_code.int(), v_code.int()]).view(2, 1024, -1).aminmax(dim=1))
    lowest = torch.stack([code.min for code in codes]).amin(0)
    highest = torch.stack([code.max for code in codes]).amax(0)
    assert (highest - lowest <= 1).all() and (highest - lowest == 1).float().mean() > 0.9
    # The chance of going up has a resolution of 2^-16, and a float32 one of 2^-24.
    step = codecs.spread(step_of(v_scale[: v.numel() // 32])) / 2**23  # in binades
    assert ((v_sum / 65536 / v.double() - 1).abs() <= step / 2**16 + 2.0**-23).all()
    # Two inverses of 4e-5, and half of 1/256 of a code.
    code = codecs.spread(m_scale[: v.numel() // 32].double())
    assert ((ratio_sum / 65536 - ratio).abs() < 8e-5 * ratio.abs() + code / 512).all()


def test_m_follows_where_v_is_rounded_to():
    """The ratio stays within a code, however far v is rounded."""
    m, v = finite_groups()
    for noise in (0, 0x7F00, 0xFFFF):
        stored = encode(m, v, noise)
        back_m, back_v = codecs.decode_moments(*stored)
        ratios = [
            x.double() / codecs.root(bits_of(y)).view(torch.float32).double()
            for x, y in ((m, v), (back_m, back_v))
        ]
        code = codecs.spread(stored[2].double())
        assert ((ratios[0] - ratios[1]).abs() <= 1.01 * code + 1e-4 * ratios[0].abs()).all()


@pytest.mark.parametrize("noise", [0, 0xFFFF])
def test_no_positive_v_decodes_to_zero(noise):
    """All magnitudes in one group, and spans up to all of float32: codes are in 1..255."""
    v = torch.nn.functional.pad(float_of(torch.arange(1, 0x7F7F0000, 99991)), (0, 31))
    v = (
        v[: v.numel() // 32 * 32].view(32, -1).T.reshape(-1).contiguous()
    )  # 32 magnitudes to a group
    for m in (torch.zeros_like(v), v.sqrt()):
        stored = encode(m, v, noise)
        assert torch.equal(codecs.decode_moments(*stored)[1] > 0, v > 0)
    for span in range(0, 62 << 23, 0x23456):  # to 2^62
        v = float_of((torch.linspace(0, 1, 32) * span).long() + 0x2F000001)
        back = codecs.decode_moments(*encode(v.sqrt(), v, noise))[1]
        assert ((back / v - 1).abs() < 0.25).all()


def test_a_span_of_all_of_float32_raises_the_smallest():
    """Beyond 2^63 the smallest become the smallest that the group reaches: updates shrink."""
    v = torch.ones(32)
    v[5], v[6] = 1e-38, 1e-17
    m, back = codecs.decode_moments(*encode(v.sqrt(), v, 0x8000))
    assert ((back[6:] / v[6:] - 1).abs() < 0.25).all()
    assert 1e-38 < back[5] < 2.0**-60 and (m.abs() <= 1.1 * back.sqrt()).all()


def test_elements_without_momentum_do_not_widen_the_group_for_ever():
    """One of 1e-15 among 1: with momentum the steps are coarse, without it they are 2^-4 of a
    binade, and it is raised to 2^-15. Zeros do not count, and where all are idle none is raised.
    """
    v = torch.exp(0.1 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
    v[3] = 1e-15
    m = v.sqrt()
    nearest = 0x8000

    def error(m, v):
        back = codecs.decode_moments(*encode(m, v, nearest))[1]
        return back, float((back / v - 1).abs()[4:].max())

    back, coarse = error(m, v)
    assert coarse > 0.05 and abs(back[3] / v[3] - 1) < 0.15
    m[3] = 0
    back, fine = error(m, v)
    assert fine < 2.0**-5 and 2.0**-17 < back[3] < 2.0**-13
    v[3] = 0
    back, finest = error(m, v)
    assert finest < 2.0**-7 and back[3] == 0
    v[3] = 1e-15
    back, _ = error(torch.zeros(32), v)
    assert abs(back[3] / v[3] - 1) < 0.15


def test_zeros_stay_zeros():
    zeros = torch.zeros(64)
    for noise in (0, 0xFFFF):
        for x in codecs.decode_moments(*encode(zeros, zeros, noise)):
            assert (x == 0).all()
        m, v = zeros.clone(), zeros.clone()
        m[:32], v[:40] = 1.0, 2.0
        m[0], v[1] = 0.0, 0.0  # beside others that are not
        back_m, back_v = codecs.decode_moments(*encode(m, v, noise))
        assert torch.equal(back_v == 0, v == 0) and (back_m[m == 0] == 0).all()
    fresh = torch.zeros(64, dtype=torch.uint8)  # zeroed memory is a valid state
    scales = torch.zeros(2, 2, dtype=torch.bfloat16)
    for x in codecs.decode_moments(fresh.view(torch.int8), fresh, *scales):
        assert (x == 0).all()


@pytest.mark.parametrize("moment", ["m", "v"])
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf, -math.inf, 3e38])
def test_poison_stays_in_its_group_and_shows(poison, moment):
    """m of its group is NaN and stays so, v stays finite, and no bit is a payload's."""
    clean, poisoned = torch.ones(96), torch.ones(96)
    poisoned[40] = poison
    if moment == "v" and poison < 0:
        return
    m, v = (poisoned, clean) if moment == "m" else (clean, poisoned)
    stored = encode(m, v, 7)
    for code, expected in zip(stored, encode(clean, clean, 7), strict=True):
        size = code.numel() // 3
        assert torch.equal(bits_of(code)[:size], bits_of(expected)[:size])
        assert torch.equal(bits_of(code)[-size:], bits_of(expected)[-size:])
    back_m, back_v = codecs.decode_moments(*stored)
    if (moment, poison) != ("m", 3e38):  # that is finite, and so is its ratio
        assert back_m[32:64].isnan().all() and back_v.isfinite().all()
        again = codecs.decode_moments(*encode(back_m, back_v, 7))
        assert again[0][32:64].isnan().all() and again[1].isfinite().all()
    other = poisoned.clone().view(torch.int32)
    if math.isnan(poison):
        other[40] = 0x7F812345  # a NaN with another payload
        other = other.view(torch.float32)
        m, v = (other, clean) if moment == "m" else (clean, other)
        for left, right in zip(encode(m, v, 7), stored, strict=True):
            assert torch.equal(bits_of(left), bits_of(right))


def test_what_is_decoded_encodes_to_itself():
    """v is on the lattice already: no noise moves it, unless its group has another step now."""
    m, v = finite_groups()
    stored = encode(m, v, 0x8000)
    m, v = codecs.decode_moments(*stored)
    for noise in (0, 0xFFFF):
        again = encode(m, v, noise)
        # Not those at the limit of 2^63, where the smallest of a group are raised.
        step, before = step_of(again[3]), step_of(stored[3])
        kept = codecs.spread((step <= before) & (before < 1 << 21))
        kept &= (m != 0) | (v == 0)  # others have become idle, and may be raised
        assert kept.float().mean() > 0.5
        assert torch.equal(codecs.decode_moments(*again)[1][kept], v[kept])
