"""Launches kernels through their compiled form. No kernel here."""

from collections.abc import Sequence
from typing import Any

import triton


def limits_registers() -> bool:
    """Whether what compiles here takes a limit of registers: NVIDIA's compiler does, the others
    refuse the option.
    """
    if triton.knobs.runtime.interpret:
        return False
    backend: str = triton.runtime.driver.active.get_current_target().backend
    return backend == "cuda"


class Launcher:
    """One kernel with its compile-time arguments, on one device.

    The first launch compiles, or finds what is compiled; the later ones go straight to the result,
    a third of the Python time of `kernel[grid](...)`, which derives types and specialisations from
    its arguments anew each time. So a launcher's arguments may change in value and size, never in
    type, and pointers keep the alignment they had: kernels must not specialise on integers that
    change, nor on the alignment of memory that others allocate.
    """

    def __init__(
        self,
        kernel: Any,
        constants: Sequence[Any],
        num_warps: int = 4,
        max_registers: int | None = None,
    ) -> None:
        self.kernel, self.constants = kernel, tuple(constants)
        self.num_warps, self.max_registers = num_warps, max_registers
        self.compiled: Any = None  # stays None in the interpreter

    def __call__(self, programs: int, *args: Any) -> None:
        """Launch on the current stream. `args` in the kernel's order, compile-time ones left out:
        they come last.
        """
        if self.compiled is None:
            # Without fused multiply-adds: every operation rounds once.
            options: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": False}
            if self.max_registers is not None and limits_registers():
                options["maxnreg"] = self.max_registers
            self.compiled = self.kernel[(programs,)](*args, *self.constants, **options)
        else:
            self.compiled[programs, 1, 1](*args, *self.constants)
