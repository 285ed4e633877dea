"""Launches kernels through their compiled form."""

from collections.abc import Sequence
from typing import Any

import triton


def limits_registers() -> bool:
    """Whether the compiler for this device takes a limit of registers: NVIDIA's alone does.

    The others refuse the option.
    """
    if triton.knobs.runtime.interpret:
        return False
    backend: str = triton.runtime.driver.active.get_current_target().backend
    return backend == "cuda"


class Launcher:
    """One kernel with its compile-time arguments, on one device.

    The first launch compiles, or finds the compiled kernel in Triton's cache. Later ones call the
    result directly. That takes a third of the Python time of `kernel[grid](...)`, which derives
    types and specialisations from the arguments at every launch.

    So the arguments of a launcher may change in value and size, never in type, and its pointers
    must keep their alignment. Kernels must not specialise on integers that change, nor on the
    alignment of memory that the user allocates.

    Args:
        kernel: a Triton JIT function.
        constants: its compile-time arguments, which come last in its signature.
        num_warps: warps per program.
        max_registers: registers per thread at most, or None for the compiler's choice.
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
        """Launch on the current stream.

        Args:
            programs: size of the grid.
            args: the kernel's run-time arguments, in its order.
        """
        if self.compiled is None:
            # Fused multiply-adds would round once where the formula rounds twice.
            options: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": False}
            if self.max_registers is not None and limits_registers():
                options["maxnreg"] = self.max_registers
            self.compiled = self.kernel[(programs,)](*args, *self.constants, **options)
        else:
            self.compiled[programs, 1, 1](*args, *self.constants)
