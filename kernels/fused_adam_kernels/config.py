"""How the update kernel is launched for each mix of dtypes: the one place where a measured winner
is entered.

No entry changes a bit of any result. What the kernel's own code would have to do (several chunks
per program, a grid that stays, streaming stores) is no entry here: `bench/gpu/variants.py` has it
as patches. The width of table rows is in `table.py`, because all kernels share the tables.
"""

from typing import NamedTuple

import torch

from .codecs import INTERPRET


class Config(NamedTuple):
    """Launch configuration of the update kernel.

    Attributes:
        block: elements per program; a power of two, at least 32 * 4 * `num_warps` for the widest
            accesses.
        tail: elements per turn of a program's loop over what vectors cannot take; a power of two.
        num_warps: warps per program.
        max_registers: registers per thread, at most, or None for what the compiler takes. NVIDIA
            alone obeys.
    """

    # Turns of 256 keep 28 kB of misaligned fp32 rows in flight per multiprocessor (sm_90: 7
    # programs of 72 registers), turns of 128 keep 14; an H200 needs 25 (4.8 TB/s for 0.7 us over
    # 132).
    block: int = 1024
    tail: int = 256
    num_warps: int = 4
    max_registers: int | None = None


# A kind of mix, as `kind_of` names it -> its launch. A measured winner is a change of one line
# here.
CONFIGS = {
    "32-bit": Config(),
    "16-bit": Config(),
    "64-bit": Config(),
    "random": Config(),
}
# The interpreter takes 3-7 ms per program whatever its size.
INTERPRETED = Config(block=8192, tail=8192)


def kind_of(param: torch.dtype, grad: torch.dtype, weights: str, states: str) -> str:
    """Which entry of CONFIGS a mix has.

    Returns:
        "random": a recipe that draws random bits, whose registers and instructions limit it, not
        its bytes. "16-bit": parameters and gradients of 16 bits, so that a block moves half of what
        it moves in fp32. "32-bit": everything else, but for float64 parameters: "64-bit".
    """
    if weights in ("split24", "sr") or states in ("bf16", "int8"):
        return "random"
    if param == torch.float64:
        return "64-bit"
    return "16-bit" if max(param.itemsize, grad.itemsize) == 2 else "32-bit"


def launch_config(param: torch.dtype, grad: torch.dtype, weights: str, states: str) -> Config:
    """The launch of the update for element types and a recipe's two halves (or "native" both)."""
    return INTERPRETED if INTERPRET.value else CONFIGS[kind_of(param, grad, weights, states)]
