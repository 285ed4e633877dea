"""Codecs' random bits: Philox, and what keys them."""

import itertools

import pytest
import torch
from codec_values import CPU, PLACES, SEEDS

from fused_adam.numerics import codecs


def philox_by_hand(seed, c0, c1, c2, c3, rounds=10):
    """Philox-4x32 in Python's own integers, as the paper writes it."""
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(rounds):
        x, y = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (y >> 32) ^ c1 ^ k0, y & 0xFFFFFFFF, (x >> 32) ^ c3 ^ k1, x & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


PI = ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))


@pytest.mark.parametrize(
    ("rounds", "key", "counter", "expected"),
    [  # from Random123's kat_vectors
        (10, (0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, (0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, *PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
        (7, (0, 0), (0, 0, 0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, (0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, *PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_philox_gives_the_published_answers(rounds, key, counter, expected):
    words = codecs.philox(key[0] | key[1] << 32, *(torch.tensor([c]) for c in counter), rounds)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "step", "ordinal"), PLACES)
def test_words_are_keyed_by_element_step_and_ordinal(first, step, ordinal, seed):
    words = codecs.random_words(seed, first, step, ordinal, 16, CPU)
    for i in range(16):
        quad = (first + i) // 4
        counter = quad & 0xFFFFFFFF, quad >> 32, step, ordinal
        assert int(words[i]) & 0xFFFFFFFF == philox_by_hand(seed, *counter)[(first + i) % 4]
    for start in range(1, 9):  # whoever begins in the middle of a draw gets the same words
        assert torch.equal(
            codecs.random_words(seed, first + start, step, ordinal, 7, CPU),
            words[start : start + 7],
        )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "step", "ordinal"), PLACES)
def test_8_bit_states_draw_once_for_eight_elements(first, step, ordinal, seed):
    """Seven rounds, and 16 bits for each element: a weight takes those of the second next one."""
    words = codecs.random_words(seed, first, step, ordinal, 16, CPU, share=8)
    for i in range(16):
        octet, place = divmod(first + i, 8)
        counter = octet & 0xFFFFFFFF, octet >> 32, step, ordinal
        draw = philox_by_hand(seed, *counter, rounds=7)
        halves = [half for word in draw for half in (word & 0xFFFF, word >> 16)]
        assert int(codecs.state_noise(words)[i]) == halves[place]
        assert int(codecs.weight_noise(words)[i]) == halves[(place + 2) % 8]
    for start in range(1, 9):
        assert torch.equal(
            codecs.random_words(seed, first + start, step, ordinal, 7, CPU, share=8),
            words[start : start + 7],
        )


def test_the_bits_of_one_element_are_independent():
    """Upper and lower byte of the moments' bits, and the weight's: 16 classes of each pair are
    equally frequent among a million. Chi-square of 255 degrees of freedom: 400 is 1e-8.
    """
    words = codecs.random_words(3, 0, 5, 1, 1 << 20, CPU, share=8)
    state, weight = codecs.state_noise(words), codecs.weight_noise(words)
    bits = {"v": state >> 12, "m": state >> 4 & 15, "weight": weight >> 12, "low": weight >> 4 & 15}
    for first, second in itertools.combinations(bits.values(), 2):
        count = torch.bincount(first << 4 | second, minlength=256).double()
        assert float(((count - 4096).square() / 4096).sum()) < 400


def test_the_users_generator_is_not_touched():
    before = torch.get_rng_state()
    codecs.random_words(1, 0, 1, 0, 1000, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("share", [4, 8])
@pytest.mark.parametrize("cut", [1, 4, 30, 2**33 + 2])
def test_words_are_the_same_however_a_parameter_is_cut(cut, share):
    whole = codecs.random_words(5, cut, 3, 2, 100, CPU, share=share)
    assert torch.equal(codecs.random_words(5, 0, 3, 2, 100, CPU, cut, share), whole)
    assert torch.equal(codecs.random_words(5, 40, 3, 2, 60, CPU, cut, share), whole[40:])
