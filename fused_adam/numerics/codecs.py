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
SMALLEST_SCALE = 0x1180  # 2^-92 in bfloat16: its unit is normal, and the unit's reciprocal finite
SIGNED_STEPS = 127.0 * 127.0
UNSIGNED_STEPS = 4228250624.0  # 255^4 in float32
WORD = 0xFFFFFFFF


def philox(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011): four random uint32 per counter, all held in int64."""
    k0, k1 = seed & WORD, seed >> 32 & WORD
    # Less 2^32 the multipliers keep products within int64; all that the high word then lacks is c
    # itself.
    a, b = 0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32)
    for _ in range(10):
        x, y = c0 * a, c2 * b
        c0, c1, c2, c3 = (c2 + (y >> 32)) ^ c1 ^ k0, y & WORD, (c0 + (x >> 32)) ^ c3 ^ k1, x & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def random_words(
    seed: int,
    first: int,
    step: int,
    ordinal: int,
    numel: int,
    device: torch.device,
    origin: int = 0,
) -> Tensor:
    """The random words of `numel` elements of one parameter at one step: one draw serves four.

    Args:
        seed: any 64 bits.
        first: the first element, counted from `origin`; neither need be a multiple of 4.
        step, ordinal: the parameter's step counter and its place in the optimizer, below 2^32.
        origin: where in the full parameter this part of it begins. The first 2^34 elements have the
            same words however it is cut; later ones may share theirs with elements 2^34 before.

    Returns int32, shape (numel,): a uint32's bits. `weight_noise` and `state_noise` take their
    halves.
    """
    # Of a recipe that takes none: ten rounds on nothing take 0.3 ms, longer than the rest of a
    # small parameter's step.
    if not numel:
        return torch.empty(0, dtype=torch.int32, device=device)
    first += origin & 3
    quad = torch.arange(first // 4, (first + numel + 3) // 4, dtype=torch.int64, device=device)
    c0, c1 = (quad & WORD) + (origin >> 2 & WORD) & WORD, (quad >> 32) + (origin >> 34) & WORD
    c2, c3 = torch.full_like(quad, step), torch.full_like(quad, ordinal)
    words = torch.stack(philox(seed, c0, c1, c2, c3), 1).view(-1)
    return words[first % 4 : first % 4 + numel].to(torch.int32)


def weight_noise(words: Tensor) -> Tensor:
    """The low 16 bits of each word."""
    return words & 0xFFFF


def state_noise(words: Tensor) -> Tensor:
    """The high 16 bits of each word."""
    return words >> 16 & 0xFFFF


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


def join(visible: Tensor, low: Tensor) -> Tensor:
    """bfloat16 and what is to be added to its bits as a float32's.

    Zeros that a user wrote over a negative remainder stay zero: less one their bits would be a
    NaN's.
    """
    high = visible.view(torch.int16).to(torch.int32) << 16
    return (high + torch.where(visible == 0, low.clamp(min=0), low)).view(torch.float32)


def join32(visible: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that `split32` split."""
    return join(visible, remainder.to(torch.int32))


def split24(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """As `split32` with an int8: float32's low 8 bits are first rounded stochastically, and lost.

    Above the largest value that the pair holds they are dropped: nothing finite overflows.

    Args:
        noise: int32, uniform in [0, 2^16); the low 8 bits are used.
    """
    bits = torch.where(x == x, x.view(torch.int32), NAN)
    bits = bits + torch.where(x.abs() < TOP_CELL_24, noise & 0xFF, 0)
    return (bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16), (bits >> 8).to(torch.int8)


def join24(visible: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that `split24` rounded to."""
    return join(visible, remainder.to(torch.int32) << 8)


def group_scale(x: Tensor) -> Tensor:
    """The largest of each group of 32 magnitudes, rounded up to bfloat16, at least 2^-92.

    NaN if the group holds a NaN, an infinity or a value above the largest finite bfloat16.
    """
    # As integers NaN is the largest, once its sign is gone.
    top = (x.view(torch.int32) & 0x7FFFFFFF).view(-1, GROUP).amax(1)
    scale = (top + 0xFFFF >> 16).clamp(min=SMALLEST_SCALE)
    return torch.where(top <= 0x7F7F0000, scale, NAN >> 16).to(torch.int16).view(torch.bfloat16)


def spread(x: Tensor) -> Tensor:
    """One value per group -> one per element."""
    return x.repeat_interleave(GROUP)


def decode_m(code: Tensor, scale: Tensor) -> Tensor:
    """int8 codes, shape (N,), and bfloat16 scales, shape (N / 32,) -> scale * (code / 127)^2,
    signed like code.
    """
    c = code.to(torch.float32)
    return c * c.abs() * spread(scale.to(torch.float32) * (1.0 / SIGNED_STEPS))


def encode_m(m: Tensor) -> tuple[Tensor, Tensor]:
    """float32, shape (N,), N a multiple of 32 -> int8 codes to nearest, and bfloat16 scales."""
    magnitude = m.abs()
    scale = group_scale(magnitude)
    # A number divided by a tensor would be a reciprocal, rounded twice.
    largest = torch.tensor(SIGNED_STEPS, dtype=torch.float32, device="cpu")
    x = magnitude * spread(largest / scale.to(torch.float32))
    x = torch.where(
        x < largest, x, largest
    )  # a NaN too: poisoned groups have codes, and a scale that shows
    c = x.sqrt().floor()  # a guess: right or one too low
    c = torch.where(x > c * (c + 1.0) + 0.5, c + 1.0, c)  # halfway between c^2 and (c + 1)^2
    return torch.where(m < 0, -c, c).to(torch.int8), scale


def decode_v(code: Tensor, scale: Tensor) -> Tensor:
    """uint8 codes, shape (N,), and bfloat16 scales, shape (N / 32,) -> float32 scale * (code /
    255)^4.
    """
    c = code.to(torch.float32)
    square = c * c
    return square * square * spread(scale.to(torch.float32) * (1.0 / UNSIGNED_STEPS))


def encode_v(v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """float32 >= 0, shape (N,) with N a multiple of 32 -> uint8 codes and bfloat16 scales.

    A value becomes one of the two decoded values around it, in proportion to nearness. Code 0 is
    for zero alone: what is smaller than code 1 becomes code 1.

    Args:
        noise: int32, uniform in [0, 2^16).
    """
    scale = group_scale(v)
    x = v * spread(
        torch.tensor(UNSIGNED_STEPS, dtype=torch.float32, device="cpu") / scale.to(torch.float32)
    )
    chance = (noise.to(torch.float32) + 0.5) / 65536.0
    # A guess, right or one too low, of the code. x goes above code c if it is more than `chance` of
    # the way up from it: on the scale of codes that point is at c + chance or up to 0.24 further
    # on, so any guess within 0.25 will do.
    c = (x.sqrt().sqrt() - chance + 0.5).floor()
    low = c * c
    low = low * low
    high = (c + 1.0) * (c + 1.0)
    high = high * high
    c = torch.where(x - low > (high - low) * chance, c + 1.0, c)
    smallest = (v > 0).to(torch.float32)
    return torch.where(c > smallest, c, smallest).to(torch.uint8), scale


def load_weight(weights: str | None, p: Tensor, extra: Tensor | None) -> Tensor:
    """The float32 weight of a parameter and what is stored beside it, its master weight or
    remainder.

    The parameter is right where the two differ: somebody has written to it.
    """
    if extra is None:
        return p.float()
    if weights == "master32":
        return torch.where(extra.to(p.dtype) == p, extra, p.float())
    return join32(p, extra) if weights == "split32" else join24(p, extra)


def store_weight(weights: str | None, p: Tensor, words: Tensor) -> tuple[Tensor, Tensor | None]:
    """float32 -> what becomes of the parameter (rounded to nearest by the copy, unless it is here),
    and beside it.
    """
    if weights == "split32":
        return split32(p)
    if weights == "split24":
        return split24(p, weight_noise(words))
    if weights == "sr":
        return stochastic_bf16(p, weight_noise(words)), None
    return p, p if weights == "master32" else None


def load_moments(
    m: Tensor, v: Tensor, m_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The float32 moments of what is stored."""
    if m_scale is None or v_scale is None:
        return m.float(), v.float()
    return decode_m(m, m_scale), decode_v(v, v_scale)


def store_moments(
    states: str | None, m: Tensor, v: Tensor, words: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """float32 -> what becomes of the moments (rounded to nearest by the copy, unless here), and
    their scales.
    """
    if states == "int8":
        (m, m_scale), (v, v_scale) = encode_m(m), encode_v(v, state_noise(words))
        return m, v, m_scale, v_scale
    return m, stochastic_bf16(v, state_noise(words)) if states == "bf16" else v, None, None
