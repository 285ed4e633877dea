"""Roundings between values and memory in plain torch, and the random bits they take. No arithmetic
of the optimizer.

The Triton twin is `fused_adam_kernels/codecs.py`: same names, same order, same bits (but for a
NaN's sign and payload). Tensors are flat, on any device; torch's generators are never touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import GROUP

NAN = 0x7FC00000
LARGEST_BF16 = 3.3895313892515355e38
TOP_CELL_24 = 3.4027717462407993e38  # the largest float32 whose low 8 bits are zero
SMALLEST_SCALE = 0x11800000  # 2^-92 in float32: its inverse is finite
LARGEST_V = 0x7F000000  # 2^127 in float32: rounded up by a step, it is still finite
IDLE = 15 << 23  # 15 binades, in bits of float32
# A little above 3: so the error of a cubic step is of either sign, and half as large.
CUBIC = 3.001953125
WORD = 0xFFFFFFFF


def philox(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 (Salmon et al. 2011): four random uint32 per counter, all held in int64."""
    k0, k1 = seed & WORD, seed >> 32 & WORD
    # Less 2^32 the multipliers keep products within int64; all that the high word then lacks is c
    # itself.
    a, b = 0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32)
    for _ in range(rounds):
        x, y = c0 * a, c2 * b
        c0, c1, c2, c3 = (c2 + (y >> 32)) ^ c1 ^ k0, y & WORD, (c0 + (x >> 32)) ^ c3 ^ k1, x & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def elements_per_draw(states: str | None) -> int:
    """How many elements share one draw: 8-bit moments need 16 random bits, all else 32."""
    return 8 if states == "int8" else 4


def random_words(
    seed: int,
    first: int,
    step: int,
    param_index: int,
    numel: int,
    device: torch.device,
    global_offset: int = 0,
    share: int = 4,
) -> Tensor:
    """Return the random words of `numel` elements of one parameter at one step.

    One draw of four uint32 serves `share` elements. 4 elements have 32 bits each, by
    Philox-4x32-10. 8 elements have 16 bits each, by 7 rounds: the fewest that pass BigCrush, says
    the paper.

    Args:
        seed: any 64 bits.
        first: the first element, counted from `global_offset`; neither need be a multiple of
            `share`.
        step, param_index: the parameter's step counter and its position in the optimizer, below
            2^32.
        global_offset: where in the full parameter this part of it begins. The first 2^34 elements
            have the same words however it is cut; later ones may share theirs with elements 2^34
            before.
        share: 4 or 8, as `elements_per_draw` says.

    Returns int32, shape (numel,): a uint32's bits. `weight_noise` and `state_noise` take their
    halves.
    """
    # Of a recipe that takes none: ten rounds on nothing take 0.3 ms, longer than the rest of a
    # small parameter's step.
    if not numel:
        return torch.empty(0, dtype=torch.int32, device=device)
    first += global_offset & share - 1
    draw = torch.arange(first // share, (first + numel - 1) // share + 1, device=device)
    log2 = share.bit_length() - 1
    c0 = (draw & WORD) + (global_offset >> log2 & WORD) & WORD
    c1 = (draw >> 32) + (global_offset >> 32 + log2) & WORD
    c2, c3 = torch.full_like(draw, step), torch.full_like(draw, param_index)
    words = torch.stack(philox(seed, c0, c1, c2, c3, 7 if share == 8 else 10), 1)
    if share == 8:
        # The moments of an element take its own 16 bits, and a stochastically rounded weight those
        # of the element two places on: so no two roundings of one element rest on the same bits.
        own = torch.stack((words & 0xFFFF, words >> 16), 2).view(-1, 8)
        words = own << 16 | own.roll(-2, 1)
    return words.view(-1)[first % share : first % share + numel].to(torch.int32)


def weight_noise(bits: Tensor) -> Tensor:
    """The low 16 bits of each random word."""
    return bits & 0xFFFF


def state_noise(bits: Tensor) -> Tensor:
    """The high 16 bits of each random word."""
    return bits >> 16 & 0xFFFF


def stochastic_bf16(x: Tensor, noise: Tensor) -> Tensor:
    """float32 -> one of its two neighbours in bfloat16, in proportion to nearness.

    Exact values stay. Beyond the largest finite bfloat16, and for NaN and infinity: to nearest.

    Args:
        noise: int32, uniform in [0, 2^16).
    """
    up_or_down = (x.view(torch.int32) + noise >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.abs() < LARGEST_BF16, up_or_down, x.to(torch.bfloat16))


def split32(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> bfloat16 (nearest, ties away from zero) and the int16 that `join32` adds back:
    nothing is lost.

    A NaN becomes a visible NaN, with the default payload.
    """
    bits = torch.where(x == x, x.view(torch.int32), NAN)
    return (bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """bfloat16 and what is to be added to its bits as a float32's.

    Zeros that a user wrote over a negative remainder stay zero: less one their bits would be a
    NaN's.
    """
    high_bits = high.view(torch.int16).to(torch.int32) << 16
    return (high_bits + torch.where(high == 0, low.clamp(min=0), low)).view(torch.float32)


def join32(high: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that `split32` split."""
    return join(high, remainder.to(torch.int32))


def split24(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """As `split32` with an int8: float32's low 8 bits are first rounded stochastically, and lost.

    Above the largest value that the pair holds they are dropped: nothing finite overflows.

    Args:
        noise: int32, uniform in [0, 2^16); the low 8 bits are used.
    """
    bits = torch.where(x == x, x.view(torch.int32), NAN)
    bits = bits + torch.where(x.abs() < TOP_CELL_24, noise & 0xFF, 0)
    return (bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16), (bits >> 8).to(torch.int8)


def join24(high: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that `split24` rounded to."""
    return join(high, remainder.to(torch.int32) << 8)


def bits_of(x: Tensor) -> Tensor:
    """The bits of float32, as an int32."""
    return x.view(torch.int32)


def float_of(bits: Tensor) -> Tensor:
    """The float32 with these bits, an int32."""
    return bits.view(torch.float32)


def groups_of(x: Tensor) -> Tensor:
    """Shape (N,) -> (N // 32, 32)."""
    return x.view(-1, GROUP)


def spread(x: Tensor, each: int = GROUP) -> Tensor:
    """One value per group -> one per element."""
    return x.repeat_interleave(each)


def root(v_bits: Tensor) -> Tensor:
    """The bits of sqrt(v), or of up to 6 % more: half the exponent, the significand by a chord.

    Continuous and increasing in v, and above 0 for v = 0.
    """
    return (v_bits >> 1) + 0x1FC00000


def inverse(bits: Tensor) -> Tensor:
    """1 / x of a normal float32 by its bits, within 4e-5: a guess within 5 %, one cubic step."""
    guess = float_of(0x7EF30000 - bits)
    t = guess * float_of(bits)
    return guess * (CUBIC - t * (CUBIC - t))


def largest_magnitude(x: Tensor) -> Tensor:
    """The bits of the largest |x| of each row; those of a NaN if there is one."""
    # As integers NaN are the largest, once their sign is gone.
    return (bits_of(x) & 0x7FFFFFFF).amax(1)


def lattice(bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Return `shift` and `base` of a group whose v have bits from `bottom` to `top`.

    A step on the lattice is 2^shift, and code c stands for the bits (base + c) << shift. 252 steps
    span the group at most, as rounding adds up to one at either end and code 0 is taken. 252 steps
    are 63/64 of 2^(shift + 8).
    """
    span = (top - bottom).to(torch.int64)  # the sum below may pass 2^31
    exponent = bits_of((span + (span >> 6)).to(torch.float32)) >> 23
    shift = (exponent - 134).clamp(17, 21)
    base = torch.maximum((bottom >> shift) - 1, (top >> shift) - 254)
    return shift, base.clamp(min=0)


def decode_moments(
    m_code: Tensor, v_code: Tensor, m_scale: Tensor, v_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the float32 moments of what `encode_moments` stored.

    Args:
        m_code, v_code: int8 and uint8, shape (N,).
        m_scale, v_scale: bfloat16, shape (N / 32,), or (N,) for elements of any groups.
    """
    each = GROUP if len(m_scale) < len(m_code) else 1
    scale_bits = v_scale.view(torch.int16).to(torch.int32) << 16
    half_step = scale_bits & -scale_bits  # the lowest bit that is set
    step, base = half_step + half_step, scale_bits - half_step
    v_bits = v_code.to(torch.int32) * spread(step, each) + spread(base, each)
    v_bits = torch.where(v_code == 0, 0, v_bits)
    m_scale = spread(m_scale.to(torch.float32), each)
    m = m_code.to(torch.float32) * m_scale * float_of(root(v_bits))
    return m, float_of(v_bits)


def encode_moments(m: Tensor, v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes and scales (m_code, v_code, m_scale, v_scale), rounded stochastically.

    Each moment goes to one of the two decoded values around it, in proportion to nearness:

        v = float of the bits  v_code * step + base                   (v_code 0 is for v = 0 alone)
        m = m_code * m_scale * root(v)

    v_code counts steps on a lattice of float32 bit patterns: a float of 8 bits whose exponents
    follow the group. `step` is the smallest, of 2^-6 to 2^-2 of a binade, that spans the group.
    v_scale is no number but bits: the lowest one that is set is half a step, those above are the
    base.

    m is stored as m / root(v): near the update, which Adam bounds whatever the size of the
    gradients. The root is of v before it is rounded, so m follows where v is rounded to, and their
    ratio stays.

    A group that holds a NaN or an infinity, or v of 2^127 or more, gets m_scale = NaN and finite v.

    Args:
        m, v: float32, shape (N,) with N a multiple of 32; v >= 0.
        noise: int32, uniform in [0, 2^16), shape (N,). v takes all of it, m the low 8 bits.

    Returns:
        int8 and uint8, shape (N,), and two bfloat16, shape (N / 32,).
    """
    # NaN and infinity are larger, and a NaN's payload would show in the code. Negative numbers are
    # larger as well, as unsigned integers: -0.0 does not occur.
    v_bits = torch.where(bits_of(v) < 0, LARGEST_V, bits_of(v)).clamp(max=LARGEST_V)
    top = groups_of(v_bits).amax(1)

    # m: the group's largest ratio has code 126.9, so that rounding it up still fits 127.
    ratio = m * inverse(root(v_bits))
    largest_ratio = largest_magnitude(groups_of(ratio))
    bad = (largest_ratio >= LARGEST_V) | (top == LARGEST_V)
    m_scale = bits_of(float_of(largest_ratio) * (1.0 / 126.9)) + 0xFFFF & -0x10000
    m_scale = m_scale.clamp(min=SMALLEST_SCALE)
    # 2^15 + 2^14 plus noise / 256: the sum's low bits count 1/256 of a code, and its second byte
    # is the code. With noise 0x8000 it is the nearest.
    noise_above = float_of(noise & 0xFF ^ 0x47400080)
    m_code = bits_of(ratio * spread(inverse(m_scale)) + noise_above) >> 8
    m_code = torch.where(spread(bad), 0, m_code)
    m_scale = float_of(torch.where(bad, NAN, m_scale))

    # The smallest v that the lattice has to reach. Zeros have a code of their own: less one they
    # are the largest, as unsigned integers. An element without momentum widens the group to 2^15 at
    # most (unless all are without): else one dead element would make its 31 neighbours coarse for
    # ever.
    floor = torch.where(largest_ratio > 0, top.clamp(min=IDLE) - IDLE, 0)
    reached = torch.where(v_bits == 0, 0x7FFFFFFF, v_bits - 1)
    reached = torch.where(m == 0, torch.maximum(reached, spread(floor)), reached)
    bottom = torch.minimum(groups_of(reached).amin(1), top - 1) + 1

    shift, base = lattice(bottom, top)
    half_step = torch.ones_like(shift) << shift - 1
    noise_below = noise * spread(half_step >> 15)  # below one step
    v_code = (v_bits + noise_below >> spread(shift)) - spread(base)
    v_code = torch.maximum(v_code, v_bits.clamp(max=1))
    v_scale = ((base << shift | half_step) >> 16).to(torch.int16).view(torch.bfloat16)
    return m_code.to(torch.int8), v_code.to(torch.uint8), m_scale.to(torch.bfloat16), v_scale


def weights_of(extra: Tensor) -> str:
    """Which way of storing weights has this master weight or remainder: its dtype tells."""
    return {torch.int16: "split32", torch.int8: "split24"}.get(extra.dtype, "master32")


def load_weight(weights: str | None, p: Tensor, extra: Tensor | None) -> Tensor:
    """The float32 weight of a parameter and what is stored next to it, its master weight or
    remainder.

    The parameter is right where the two differ: somebody has written to it.
    """
    if extra is None:
        return p.float()
    if weights == "master32":
        return torch.where(extra.to(p.dtype) == p, extra, p.float())
    return join32(p, extra) if weights == "split32" else join24(p, extra)


def store_weight(weights: str | None, p: Tensor, bits: Tensor) -> tuple[Tensor, Tensor | None]:
    """float32 -> what becomes of the parameter (rounded to nearest by the copy, unless it is here),
    and next to it.
    """
    if weights == "split32":
        return split32(p)
    if weights == "split24":
        return split24(p, weight_noise(bits))
    if weights == "sr":
        return stochastic_bf16(p, weight_noise(bits)), None
    return p, p if weights == "master32" else None


def load_moments(
    m: Tensor, v: Tensor, m_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The float32 moments of what is stored."""
    if m_scale is None or v_scale is None:
        return m.float(), v.float()
    return decode_moments(m, v, m_scale, v_scale)


def store_moments(
    states: str | None, m: Tensor, v: Tensor, bits: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """float32 -> what becomes of the moments (rounded to nearest by the copy, unless here), and
    their scales.
    """
    if states == "int8":
        return encode_moments(m, v, state_noise(bits))
    return m, stochastic_bf16(v, state_noise(bits)) if states == "bf16" else v, None, None
