"""Roundings between registers and memory, and the random bits they take. No arithmetic of the
optimizer here.

The torch twin is `fused_adam/numerics/codecs.py`: same names, same order, same bits (but for a
NaN's sign and payload). Nothing rests on a library function's last bits: all is +, -, * and shifts.
"""

import triton
import triton.language as tl

from .formula import add

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
GROUP = tl.constexpr(32)  # elements that share one scale
LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
TOP_CELL_24 = tl.constexpr(3.4027717462407993e38)  # the largest float32 whose low 8 bits are zero
SMALLEST_SCALE = tl.constexpr(0x11800000)  # 2^-92 in float32: its inverse is finite
LARGEST_V = tl.constexpr(0x7F000000)  # 2^127 in float32: rounded up by a step, it is still finite
IDLE = tl.constexpr(15 << 23)  # 15 binades, in bits of float32
# A little above 3: so the error of a cubic step is of either sign, and half as large.
CUBIC = tl.constexpr(3.001953125)


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


@triton.constexpr_function
def has_extra(weights):
    """Whether something is stored next to the parameter: a master weight or a remainder."""
    return weights in ("master32", "split32", "split24")


@triton.constexpr_function
def takes_random_bits(weights, states):
    """Whether something of this recipe is rounded stochastically."""
    return weights in ("split24", "sr") or states in ("bf16", "int8")


@triton.constexpr_function
def elements_per_draw(states):
    """How many elements share one draw: 8-bit moments need 16 random bits, all else 32."""
    return 8 if states == "int8" else 4


@triton.jit
def draw(seed, share, step, param_index, global_offset, SHARE: tl.constexpr):
    """Return four random uint32 for each SHARE elements of one parameter at one step.

    4 elements have 32 bits each, by Philox-4x32-10 (Salmon et al. 2011). 8 elements have 16 bits
    each, by 7 rounds: the fewest that pass BigCrush, says the paper.

    Args:
        seed: int64.
        share: int64 tensor, element // SHARE, elements counted from `global_offset`.
        step, param_index: int32.
        global_offset: int64, where in the full parameter this part of it begins.
    """
    LOG2: tl.constexpr = 3 if SHARE == 8 else 2
    # Nothing is carried from the low word to the high one: a 64-bit sum would take two more
    # instructions per element.
    c0 = share.to(tl.uint32) + (global_offset >> LOG2).to(tl.uint32)
    c1 = (share >> 32).to(tl.uint32) + (global_offset >> (32 + LOG2)).to(tl.uint32)
    c2, c3 = tl.full(share.shape, step, tl.uint32), tl.full(share.shape, param_index, tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3, 7 if SHARE == 8 else 10)


@triton.jit
def random_word(seed, element, step, param_index, global_offset, SHARE: tl.constexpr):
    """The random uint32 of each element, an int64 tensor counted from `global_offset`."""
    element = element + (global_offset & (SHARE - 1))
    r0, r1, r2, r3 = draw(seed, element // SHARE, step, param_index, global_offset, SHARE)
    word = element % SHARE // (SHARE // 4)
    own = tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))
    if SHARE == 8:
        following = tl.where(word < 2, tl.where(word == 0, r1, r2), tl.where(word == 2, r3, r0))
        own = tl.where(element % 2 == 0, low_halves(own, following), high_halves(own, following))
    return own


@triton.jit
def random_words(
    seed, first, step, param_index, global_offset, N: tl.constexpr, SHARE: tl.constexpr
):
    """`random_word` of the N elements from `first` on, by one draw for SHARE of them; `first` and
    `global_offset` are multiples of SHARE.
    """
    share = first // SHARE + tl.arange(0, N // SHARE)
    r0, r1, r2, r3 = draw(seed, share, step, param_index, global_offset, SHARE)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    if SHARE == 8:
        following = tl.join(tl.join(r1, r3), tl.join(r2, r0))
        words = tl.join(low_halves(words, following), high_halves(words, following))
    return tl.reshape(words, [N])


# A draw of four words serves eight elements with 16 bits each. The moments of an element take its
# own 16, and a stochastically rounded weight those of the element two places on: so no two
# roundings of one element rest on the same bits.
@triton.jit
def low_halves(own, following):
    """The random words of the even elements of eight."""
    return (own << 16) | (following & 0xFFFF)


@triton.jit
def high_halves(own, following):
    """The random words of the odd elements of eight."""
    return (own & 0xFFFF0000) | (following >> 16)


@triton.jit
def weight_noise(bits):
    """The low 16 bits of each random word."""
    return bits & 0xFFFF


@triton.jit
def state_noise(bits):
    """The high 16 bits of each random word."""
    return bits >> 16


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
    high = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, bits.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def join(high, low):
    """bfloat16 and what is to be added to its bits as a float32's.

    Zeros that a user wrote over a negative remainder stay zero: less one their bits would be a
    NaN's.
    """
    high_bits = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    low = tl.where((high_bits & 0x7FFFFFFF) == 0, tl.maximum(low, 0), low)
    return (high_bits + low.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def join32(high, remainder):
    """The float32 that `split32` split."""
    return join(high, remainder.to(tl.int32))


@triton.jit
def split24(x, noise):
    """As `split32` with an int8: the low 8 bits are first rounded stochastically, with those of
    `noise` (uint32).

    Above the largest value that the pair holds they are dropped: nothing finite overflows.
    """
    bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
    bits = bits + tl.where(tl.abs(x) < TOP_CELL_24, noise & 0xFF, 0)
    high = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, (bits >> 8).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit
def join24(high, remainder):
    """The float32 that `split24` rounded to."""
    return join(high, remainder.to(tl.int32) << 8)


@triton.jit
def bits_of(x):
    """The bits of float32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    """The float32 with these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def groups_of(x):
    """Shape (N,) -> (N // 32, 32)."""
    return tl.reshape(x, [x.shape[0] // GROUP, GROUP])


@triton.jit
def spread(x, N: tl.constexpr):
    """One value per group -> one per element."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x, 1), [N // GROUP, GROUP]), [N])


@triton.jit
def spread_to_threads(x, N: tl.constexpr, VEC: tl.constexpr):
    """One value per group -> one per VEC elements, which are one thread's: its store moves nothing
    between threads.

    Store where the span is its group's first; stored as it is, x would go through shared memory.
    """
    bits = tl.reshape(spread(x, N).to(tl.int32, bitcast=True), [N // VEC, VEC])
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def root(v_bits):
    """The bits of sqrt(v), or of up to 6 % more: half the exponent, the significand by a chord.

    Continuous and increasing in v, and above 0 for v = 0.
    """
    return (v_bits >> 1) + 0x1FC00000


@triton.jit
def inverse(bits, one):
    """1 / x of a normal float32 by its bits, within 4e-5: a guess within 5 %, one cubic step.

    A division would take 20 instructions, and 5 more where it is slow.
    """
    guess = float_of(0x7EF30000 - bits)
    t = guess * float_of(bits)
    return guess * add(t * (CUBIC - t), CUBIC, -one)


@triton.jit
def nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_magnitude(x):
    """The bits of the largest |x| of each row; those of a NaN if there is one."""
    if INTERPRET:
        # The interpreter takes 10 us per element for a combination of our own. As integers NaN
        # are the largest, once their sign is gone.
        return tl.max(bits_of(x) & 0x7FFFFFFF, axis=1)
    else:
        return bits_of(tl.reduce(tl.abs(x), 1, nan_maximum))


@triton.jit
def lattice(bottom, top):
    """Return `shift` and `base` of a group whose v have bits from `bottom` to `top`.

    A step on the lattice is 2^shift, and code c stands for the bits (base + c) << shift. 252 steps
    span the group at most, as rounding adds up to one at either end and code 0 is taken. 252 steps
    are 63/64 of 2^(shift + 8).
    """
    span = top - bottom
    exponent = (bits_of((span + (span >> 6)).to(tl.float32)) >> 23).to(tl.int32)
    shift = tl.minimum(tl.maximum(exponent - 134, 17), 21)
    base = tl.maximum((bottom >> shift).to(tl.int32) - 1, (top >> shift).to(tl.int32) - 254)
    return shift, tl.maximum(base, 0)


@triton.jit
def decode_moments(m_code, v_code, m_scale, v_scale):
    """Return the float32 moments of what `encode_moments` stored.

    Args:
        m_code, v_code: int8 and uint8, shape (N,).
        m_scale, v_scale: float32, shape (N // 32,).
    """
    N: tl.constexpr = v_code.shape[0]
    scale_bits = bits_of(v_scale)
    half_step = scale_bits & (0 - scale_bits)  # the lowest bit that is set
    step, base = half_step + half_step, scale_bits - half_step
    v_bits = v_code.to(tl.uint32) * spread(step, N) + spread(base, N)
    v_bits = tl.where(v_code == 0, 0, v_bits)
    m = m_code.to(tl.float32) * spread(m_scale, N) * float_of(root(v_bits))
    return m, float_of(v_bits)


@triton.jit
def encode_moments(m, v, noise, one):
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
        m, v: float32, shape (N,); v >= 0.
        noise: uint32 below 2^16, shape (N,). v takes all of it, m the low 8 bits.
        one: from `hidden_one`.

    Returns:
        int8 and uint8, shape (N,), and two float32 that bfloat16 holds exactly, shape (N // 32,).
    """
    N: tl.constexpr = m.shape[0]
    # NaN and infinity are larger, and a NaN's payload would show in the code.
    v_bits = tl.minimum(bits_of(v), LARGEST_V)
    top = tl.max(groups_of(v_bits), axis=1)

    # m: the group's largest ratio has code 126.9, so that rounding it up still fits 127.
    ratio = m * inverse(root(v_bits), one)
    largest_ratio = largest_magnitude(groups_of(ratio))
    bad = (largest_ratio >= LARGEST_V) | (top == LARGEST_V)
    m_scale = (bits_of(float_of(largest_ratio) * (1.0 / 126.9)) + 0xFFFF) & 0xFFFF0000
    m_scale = tl.maximum(m_scale, SMALLEST_SCALE)
    # 2^15 + 2^14 plus noise / 256: the sum's low bits count 1/256 of a code, and its second byte
    # is the code. With noise 0x8000 it is the nearest.
    noise_above = float_of((noise & 0xFF) ^ 0x47400080)
    m_code = bits_of(add(ratio * spread(inverse(m_scale, one), N), noise_above, one)) >> 8
    m_code = tl.where(spread(bad, N), 0, m_code)
    m_scale = float_of(tl.where(bad, 0x7FC00000, m_scale))

    # The smallest v that the lattice has to reach. Zeros have a code of their own: less one they
    # are the largest. An element without momentum widens the group to 2^15 at most (unless all
    # are without): else one dead element would make its 31 neighbours coarse for ever.
    floor = tl.where(largest_ratio > 0, tl.maximum(top, IDLE) - IDLE, 0)
    reached = tl.where(m == 0, tl.maximum(v_bits - 1, spread(floor, N)), v_bits - 1)
    bottom = tl.minimum((tl.min(groups_of(reached), axis=1) & 0x7FFFFFFF) + 1, top)

    shift, base = lattice(bottom, top)
    half_step = tl.full(shift.shape, 1, tl.uint32) << (shift - 1)
    noise_below = noise * spread(half_step >> 15, N)  # below one step
    v_code = ((v_bits + noise_below) >> spread(shift, N)).to(tl.int32) - spread(base, N)
    v_code = tl.maximum(v_code, tl.minimum(v_bits, 1).to(tl.int32))
    v_scale = float_of((base.to(tl.uint32) << shift) | half_step)
    return m_code.to(tl.uint8).to(tl.int8, bitcast=True), v_code.to(tl.uint8), m_scale, v_scale


@triton.jit
def load_weight(p, extra, WEIGHTS: tl.constexpr, COMPUTE: tl.constexpr):
    """The weight of a parameter and what is stored next to it, its master weight or remainder.

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
def store_weight(p, bits, WEIGHTS: tl.constexpr, PARAM: tl.constexpr):
    """Return what to store in the parameter, and next to it."""
    if WEIGHTS == "split32":
        new_p, new_extra = split32(p)
    elif WEIGHTS == "split24":
        new_p, new_extra = split24(p, weight_noise(bits))
    elif WEIGHTS == "sr":
        new_p, new_extra = stochastic_bf16(p, weight_noise(bits)), p
    else:
        new_p, new_extra = to_storage(p, PARAM), p
    return new_p, new_extra
