"""Roundings between registers and memory. No arithmetic of the optimizer here."""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_storage(x, DTYPE: tl.constexpr):
    """Round registers to the stored type, to nearest even."""
    if INTERPRET and DTYPE == tl.bfloat16:
        # The interpreter truncates float32 -> bfloat16 (Triton 3.6 to 3.9): round on the bits instead.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits >> 16) | 0x40
        return tl.where(x == x, rounded, nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
