"""`adam_step` through torch.compile, whose compiled code is held and called directly."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adam_kernels import table

from ..numerics.formula import COMPILED, Flags, adam_step
from ..state.memory import SLOT_ALIGN
from ..torch_private import check, inductor

# torch.compile divides a loop among threads if the first tensor that it sees has enough elements:
# 512 for each thread.
LARGE = 1 << 18

Dtypes = tuple[torch.dtype | None, ...]


class CompiledStep:
    """`adam_step`, compiled for operands of these dtypes, and for these flags.

    Inductor's square root is correctly rounded, and its C++ is compiled without fused
    multiply-adds.

    A call of what torch.compile returns first compares all arguments with those it was compiled
    for: on ResNet-50 a third of the step's time. Here they fit by construction, so what it would
    call after that is called at once.

    Args:
        dtypes: of p, g, m, v, v_max and ema; None for what is not there.
        compute: the arithmetic's dtype, which the scalars have.
        flags: as for `adam_step`.

    Raises RuntimeError where torch.compile is switched off.
    """

    def __init__(self, dtypes: Dtypes, compute: torch.dtype, flags: Flags) -> None:
        def zeros(numel: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(numel, dtype=dtype, device="cpu")

        calls: list[tuple[Callable[..., Any], Sequence[Any]]] = []

        def hold(graph: Any, examples: Any) -> Callable[..., Any]:
            compiled = inductor(graph, examples)

            def run(*args: Any) -> Any:
                calls.append((compiled, args))
                return compiled(*args)

            return run

        arguments = [None if dtype is None else zeros(LARGE, dtype) for dtype in dtypes]
        arguments.append(zeros(table.SCALARS, compute))
        # dynamo compiles one code object eight times at most, so each variant has its own.
        name = f"adam_step_{abs(hash((dtypes, compute, flags)))}"
        function = types.FunctionType(_adam_step.__code__.replace(co_name=name), globals())
        torch.compile(function, fullgraph=True, dynamic=True, backend=hold)(*arguments, flags)
        if not calls:
            raise RuntimeError(
                "backend='compiled' needs torch.compile, which is switched off: allow it "
                "(TORCHDYNAMO_DISABLE=0, torch.compiler.set_stance('default')), or use 'reference'"
            )
        ((self.compiled, args),) = calls
        self.order = operator.itemgetter(*(self._place(arg, arguments) for arg in args))

    @staticmethod
    def _place(arg: Any, arguments: Sequence[Tensor | None]) -> int:
        """Where an argument of the compiled code is among those of `__call__` and the size."""
        if isinstance(arg, int):
            assert arg == LARGE
            return len(arguments)
        return next(i for i, argument in enumerate(arguments) if argument is arg)

    def __call__(self, *arguments: Tensor | None) -> None:
        """Step.

        Args:
            arguments: p, g, m, v, v_max, ema and scalars, as for `adam_step`; flat, contiguous
                and of whole slots, each in a storage of its own.
        """
        p = arguments[0]
        assert p is not None
        self.compiled(*self.order((*arguments, p.numel())))


@functools.cache
def compiled_step(dtypes: Dtypes, compute: torch.dtype, flags: Flags, threads: int) -> CompiledStep:
    """This process's `CompiledStep` for so many threads, compiled when it is first asked for."""
    return CompiledStep(dtypes, compute, flags)


def _adam_step(
    p: Tensor, g: Any, m: Any, v: Any, v_max: Any, ema: Any, scalars: Tensor, flags: Flags
) -> None:
    # Else the compiler asks in every iteration whether it is the last: a fifth of the time.
    check(p.numel() % SLOT_ALIGN == 0)
    adam_step(p, g, m, v, v_max, ema, scalars, flags, COMPILED)
