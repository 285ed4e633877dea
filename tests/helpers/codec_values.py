"""Values of every kind for codecs, and equality of bits."""

import math

import torch

from fused_adam.numerics import codecs

CPU = torch.device("cpu")


SEEDS = [0, -1, 2**63 - 1, 0x123456789ABCDEF]
PLACES = [  # first element, step, ordinal
    (0, 1, 0),
    (2**32 - 8, 2**24, 3),
    (2**34 + 4, 77, 2**31 - 1),
]


LARGEST_V = codecs.LARGEST_V


def float_of(bits):
    """int64 or a list of ints -> the float32 values with these bits."""
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits_of(x):
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(integers[x.element_size()])


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


def groups():
    """(m, v) of groups of 32 of every kind: shape (G, 32) both."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    # v of every size, and spans from one value to all of float32's.
    v = [10.0 ** (e + normal(32)) for e in range(-45, 38)]
    v += [torch.exp(spread * normal(32)) for spread in torch.arange(128) / 8]
    v += [float_of(torch.linspace(1, top, 32).long()) for top in range(1 << 20, LARGEST_V, 1 << 23)]
    v += [torch.full((32,), x) for x in (1.0, 2.0**-149, 1e-30, 0.0)]
    v = torch.stack(v)
    m = v.sqrt() * normal(*v.shape)
    # Elements without momentum, without either, and with momentum alone; at the edges of codes.
    several = torch.rand(v.shape, generator=generator)
    m = torch.where(several < 0.1, 0.0, m)
    v = torch.where((several > 0.05) & (several < 0.15), 0.0, v)
    edges_v = float_of((torch.arange(512).view(16, 32) << 15) + 0x3F7F8000)
    edges_v = torch.cat([edges_v, torch.nextafter(edges_v, edges_v + 1)])
    edges_m = (torch.arange(1024).view(32, 32) - 512) / 256
    # Whatever m and v may be to each other.
    others = awkward()[:9984].view(-1, 32)
    ms = [m, -m.flip(0), edges_m, others, others.flip(0)]
    vs = [v, v, edges_v, others.abs(), others.abs()]
    poisoned = torch.ones(6, 32)
    for row, value in enumerate((math.nan, math.inf, -math.inf, math.nan, math.inf, 3e38)):
        poisoned[row, 3 * row + 1] = value
    one = torch.ones(3, 32)
    return torch.cat([poisoned[:3], one, *ms]), torch.cat([one, poisoned[3:], *vs])
