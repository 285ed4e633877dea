"""Codecs of weights: exactness, and rounding without bias."""

import pytest
import torch
from codec_values import CPU, awkward, bits_of, float_of, same

from fused_adam.numerics import codecs

LARGEST = torch.finfo(torch.bfloat16).max


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
