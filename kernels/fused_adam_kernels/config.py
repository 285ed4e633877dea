"""Launch shapes of the update kernel, one per kind of dtype mix. Measured winners are entered here.

No entry changes a bit of any result. Shapes that need other code in the kernel (several blocks per
program, a persistent grid, streaming stores) are patches in `bench/gpu/variants.py`.
"""

from typing import NamedTuple

import torch

from .codecs import INTERPRET, takes_random_bits


class Config(NamedTuple):
    """Launch configuration of the update kernel.

    Attributes:
        block: elements per program; a power of two, at least 32 * 4 * `num_warps` for the widest
            accesses.
        tail: elements per turn of a program's loop over the elements that vector accesses cannot
            take; a power of two.
        num_warps: warps per program.
        max_registers: registers per thread at most, or None for the compiler's choice. NVIDIA only.
    """

    block: int = 1024
    # An H200 needs 25 kB in flight per multiprocessor (4.8 TB/s for 0.7 us over 132 of them).
    # Misaligned fp32 rows have 28 kB in flight with turns of 256 elements, and 14 kB with turns of
    # 128 (sm_90: 7 programs of 72 registers).
    tail: int = 256
    num_warps: int = 4
    max_registers: int | None = None


# Kind of mix, as `kind_of` names it -> its launch.
CONFIGS = {
    "32-bit": Config(),
    "16-bit": Config(),
    "64-bit": Config(),
    # 1.0 (split32-bf16) to 1.2 times as fast (split24-int8) as with the compiler's choice, although
    # a few values are then spilled. bench/results/variants/h100-registers.json
    "random": Config(max_registers=72),
    "random, AMSGrad": Config(max_registers=96),
}
# The interpreter takes 3 to 7 ms per program, whatever its size.
INTERPRETED = Config(block=8192, tail=8192)


def kind_of(param: torch.dtype, grad: torch.dtype, weights: str, states: str, amsgrad: bool) -> str:
    """Return which entry of CONFIGS serves a mix.

    Returns:
        "random", "random, AMSGrad": a recipe that draws random bits. Registers and instructions
            limit it, not bytes.
        "64-bit": float64 parameters.
        "16-bit": 16-bit parameters and gradients. A block moves half the bytes of one in fp32.
        "32-bit": everything else.
    """
    if takes_random_bits(weights, states):
        return "random, AMSGrad" if amsgrad else "random"
    if param == torch.float64:
        return "64-bit"
    return "16-bit" if max(param.itemsize, grad.itemsize) == 2 else "32-bit"


def launch_config(
    param: torch.dtype, grad: torch.dtype, weights: str, states: str, amsgrad: bool
) -> Config:
    """The launch for element types and a recipe's two halves (or "native" and "native")."""
    return (
        INTERPRETED if INTERPRET.value else CONFIGS[kind_of(param, grad, weights, states, amsgrad)]
    )
