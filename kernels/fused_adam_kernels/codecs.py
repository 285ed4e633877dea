"""Roundings between registers and memory, and the random bits they take. No arithmetic of the
optimizer here.

The torch twin is `fused_adam/numerics/codecs.py`: same names, same order, same bits (but for a
NaN's sign and payload). Nothing rests on a library function's last bits: a guess is corrected by
comparing exact values, the rest is +, -, *, /.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
GROUP = tl.constexpr(32)  # elements that share one scale
LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
TOP_CELL_24 = tl.constexpr(3.4027717462407993e38)  # the largest float32 whose low 8 bits are zero
SMALLEST_SCALE = tl.constexpr(
    0x1180
)  # 2^-92 in bfloat16: its unit is normal, and the unit's reciprocal finite
SIGNED_STEPS = tl.constexpr(127.0 * 127.0)
UNSIGNED_STEPS = tl.constexpr(4228250624.0)  # 255^4 in float32


@triton.jit
def to_storage(x, DTYPE: tl.constexpr):
    """Round registers to the stored type, to nearest even."""
    if INTERPRET and DTYPE == tl.bfloat16:
        # The interpreter truncates float32 -> bfloat16 (Triton 3.6 to 3.9): round on the bits
        # instead.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits >> 16) | 0x40
        return tl.where(x == x, rounded, nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def to_compute(x, COMPUTE: tl.constexpr):
    """The stored values as the arithmetic takes them: exact."""
    if INTERPRET and x.dtype == tl.bfloat16:
        # The interpreter gets bfloat16's subnormals wrong (Triton 3.7).
        return (
            (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
            .to(tl.float32, bitcast=True)
            .to(COMPUTE)
        )
    else:
        return x.to(COMPUTE)


@triton.jit
def draw(seed, quad, step, ordinal, origin):
    """Four random uint32 for each four elements of one parameter at one step: Philox-4x32-10
    (Salmon et al. 2011).

    seed: int64. quad: int64 tensor, fours of elements from `origin` on. step, ordinal: int32.
    origin: int64, where in the full parameter this part of it begins. Nothing is carried from the
    low word to the high one: a 64-bit sum would take two more instructions per element.
    """
    c0 = quad.to(tl.uint32) + (origin >> 2).to(tl.uint32)
    c1 = (quad >> 32).to(tl.uint32) + (origin >> 34).to(tl.uint32)
    c2, c3 = tl.full(quad.shape, step, tl.uint32), tl.full(quad.shape, ordinal, tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def random_word(seed, element, step, ordinal, origin):
    """The random uint32 of each element, an int64 tensor counted from `origin`."""
    element = element + (origin & 3)
    r0, r1, r2, r3 = draw(seed, element // 4, step, ordinal, origin)
    word = element % 4
    return tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))


@triton.jit
def random_words(seed, first, step, ordinal, origin, N: tl.constexpr):
    """`random_word` of the N elements from `first` on; it and `origin` are multiples of 4: one draw
    serves four.
    """
    r0, r1, r2, r3 = draw(seed, first // 4 + tl.arange(0, N // 4), step, ordinal, origin)
    return tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [N])


@triton.jit
def weight_noise(words):
    """The low 16 bits of each word."""
    return words & 0xFFFF


@triton.jit
def state_noise(words):
    """The high 16 bits of each word."""
    return words >> 16


@triton.jit
def stochastic_bf16(x, noise):
    """Round to one of the two neighbours, in proportion to nearness; `noise`: uint32 below 2^16.

    Exact values stay. Beyond the largest finite bfloat16, and for NaN and infinity: to nearest.
    """
    # Chosen as float32, both are packed by one instruction for two; as bfloat16 they take 3 more
    # per element.
    up_or_down = ((x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return to_storage(tl.where(tl.abs(x) < LARGEST_BF16, up_or_down, x), tl.bfloat16)


@triton.jit
def split32(x):
    """float32 -> bfloat16 (nearest, ties away from zero) and the int16 that `join32` adds back:
    nothing is lost.
    """
    bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
    visible = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return visible, bits.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def join(visible, low):
    """bfloat16 and what is to be added to its bits as a float32's.

    Zeros that a user wrote over a negative remainder stay zero: less one their bits would be a
    NaN's.
    """
    high = visible.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    low = tl.where((high & 0x7FFFFFFF) == 0, tl.maximum(low, 0), low)
    return (high + low.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def join32(visible, remainder):
    """The float32 that `split32` split."""
    return join(visible, remainder.to(tl.int32))


@triton.jit
def split24(x, noise):
    """As `split32` with an int8: the low 8 bits are first rounded stochastically, with those of
    `noise` (uint32).

    Above the largest value that the pair holds they are dropped: nothing finite overflows.
    """
    bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
    bits = bits + tl.where(tl.abs(x) < TOP_CELL_24, noise & 0xFF, 0)
    visible = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return visible, (bits >> 8).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit
def join24(visible, remainder):
    """The float32 that `split24` rounded to."""
    return join(visible, remainder.to(tl.int32) << 8)


@triton.jit
def group_scale(x):
    """The largest of each group of 32 magnitudes, rounded up to bfloat16, at least 2^-92; float32,
    shape (N // 32,).

    NaN if the group holds a NaN, an infinity or a value above the largest finite bfloat16.
    """
    N: tl.constexpr = x.shape[0]
    # As integers NaN is the largest, whatever its sign; x has no other negative ones, -0.0
    # included.
    top = tl.max(tl.reshape(x.to(tl.uint32, bitcast=True), [N // GROUP, GROUP]), axis=1)
    scale = tl.maximum((top + 0xFFFF) >> 16, SMALLEST_SCALE)
    return (tl.where(top <= 0x7F7F0000, scale, 0x7FC0) << 16).to(tl.float32, bitcast=True)


@triton.jit
def spread(x, N: tl.constexpr):
    """One value per group -> one per element."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x, 1), [N // GROUP, GROUP]), [N])


@triton.jit
def spread_to_threads(x, N: tl.constexpr, SPAN: tl.constexpr):
    """One value per group -> one per SPAN elements, which are one thread's: its store moves nothing
    between threads.

    Store where the span is its group's first; stored as it is, x would go through shared memory.
    """
    bits = tl.reshape(spread(x, N).to(tl.int32, bitcast=True), [N // SPAN, SPAN])
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def decode_m(code, scale):
    """int8 codes, shape (N,), and float32 scales, shape (N // 32,) -> scale * (code / 127)^2 with
    the code's sign.
    """
    c = code.to(tl.float32)
    return c * tl.abs(c) * spread(scale * (1.0 / SIGNED_STEPS), code.shape[0])


@triton.jit
def encode_m(m):
    """float32, shape (N,) -> int8 codes to nearest, and float32 scales that bfloat16 holds."""
    magnitude = tl.abs(m)
    scale = group_scale(magnitude)
    x = magnitude * spread(tl.div_rn(SIGNED_STEPS, scale), m.shape[0])
    x = tl.where(
        x < SIGNED_STEPS, x, SIGNED_STEPS
    )  # a NaN too: poisoned groups have codes, and a scale that shows
    c = tl.floor(tl.sqrt(x))  # a guess: right or one too low
    c = tl.where(x > c * (c + 1.0) + 0.5, c + 1.0, c)  # halfway between c^2 and (c + 1)^2
    return tl.where(m < 0, -c, c).to(tl.int8), scale


@triton.jit
def decode_v(code, scale):
    """uint8 codes, shape (N,), and float32 scales, shape (N // 32,) -> scale * (code / 255)^4."""
    c = code.to(tl.float32)
    square = c * c
    return square * square * spread(scale * (1.0 / UNSIGNED_STEPS), code.shape[0])


@triton.jit
def encode_v(v, noise):
    """float32 >= 0, shape (N,) -> uint8 codes and float32 scales that bfloat16 holds exactly.

    A value becomes one of the two decoded values around it in proportion to nearness; `noise`:
    uint32 below 2^16.
    Code 0 is for zero alone: what is smaller than code 1 becomes code 1.
    """
    scale = group_scale(v)
    x = v * spread(tl.div_rn(UNSIGNED_STEPS, scale), v.shape[0])
    chance = ((noise << 7) | 0x3F800040).to(tl.float32, bitcast=True) - 1.0  # (noise + 1/2) / 2^16
    # A guess, right or one too low, of the code. x goes above code c if it is more than `chance` of
    # the way up from it: on the scale of codes that point is at c + chance or up to 0.24 further
    # on, so any guess within 0.25 will do.
    c = tl.floor(tl.sqrt(tl.sqrt(x)) - chance + 0.5)
    low = c * c
    low = low * low
    high = (c + 1.0) * (c + 1.0)
    high = high * high
    c = tl.where(x - low > (high - low) * chance, c + 1.0, c)
    smallest = tl.where(v > 0, 1.0, 0.0)
    return tl.where(c > smallest, c, smallest).to(tl.uint8), scale


@triton.jit
def load_weight(p, extra, WEIGHTS: tl.constexpr, COMPUTE: tl.constexpr):
    """The weight of a parameter and what is stored beside it, its master weight or remainder.

    The parameter is right where the two differ: somebody has written to it.
    """
    if WEIGHTS == "split32":
        return join32(p, extra)
    elif WEIGHTS == "split24":
        return join24(p, extra)
    elif WEIGHTS == "master32":
        rounded = to_compute(to_storage(extra, p.dtype), COMPUTE)
        p = to_compute(p, COMPUTE)
        return tl.where(rounded == p, extra, p)
    else:
        return to_compute(p, COMPUTE)


@triton.jit
def store_weight(p, words, WEIGHTS: tl.constexpr, PARAM: tl.constexpr):
    """What becomes of the parameter, and beside it."""
    if WEIGHTS == "split32":
        visible, extra = split32(p)
    elif WEIGHTS == "split24":
        visible, extra = split24(p, weight_noise(words))
    elif WEIGHTS == "sr":
        visible, extra = stochastic_bf16(p, weight_noise(words)), p
    else:
        visible, extra = to_storage(p, PARAM), p
    return visible, extra
