"""Runs sections on the host: plain torch a chunk at a time, or the same function through torch.compile."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_adam_kernels import table

from .arena import Slot, flat, real
from .norm import square_sum
from .plan import Launch, Row, Section, Span, same_order
from .reference import CHUNK, adam_step, exact_sqrt
from .scalars import Guard, Hyper, scalars

Step = Callable[..., None]


@functools.cache
def compiled_adam_step(*variant: object) -> Step:
    """`adam_step` through torch.compile, once per variant (dtypes and flags).

    Inductor's square root is correctly rounded, and its C++ is compiled without fused multiply-adds. Each variant
    has a code object of its own, because dynamo compiles one object eight times at most.
    """
    code = adam_step.__code__.replace(co_name=f"adam_step_{abs(hash(variant))}")
    function = types.FunctionType(code, adam_step.__globals__)
    return torch.compile(function, fullgraph=True, dynamic=True)


class HostRunner:
    """One section on the backends "reference" and "compiled". All of it happens on the host, in order."""

    def __init__(self, section: Section, compiled: bool) -> None:
        self.compute = section.compute
        self.rows = section.rows
        self.grads: Sequence[Tensor | None] = ()
        self.compiled = compiled
        self.spans = [HostSpan(launch, span) for launch in section.launches for span in launch.spans]
        # Compiled code keeps its intermediates in registers; a GPU has no cache worth staying in.
        self.chunk = CHUNK if section.device.type == "cpu" and not compiled else 1 << 62
        owners: dict[int, list[Row]] = {}
        for row in section.rows:
            owners.setdefault(id(row.home.counters), []).append(row)
        self.counters = [
            (rows, torch.tensor([row.home.counter for row in rows], device=section.device)) for rows in owners.values()
        ]

    def begin(self, grads: Sequence[Tensor | None]) -> None:
        self.grads = grads

    def square_sum(self) -> Tensor:
        return square_sum([self._flat_grad(row) for row in self.rows])

    def _flat_grad(self, row: Row) -> Tensor:
        grad = self.grads[row.index]
        assert grad is not None
        if same_order(row.param, grad):
            return flat(real(grad))
        # In the order that the kernel reads: that of the state.
        return flat(torch.empty_like(row.param, dtype=real(grad).dtype).copy_(real(grad)))

    def run(self, hyper: Hyper, guard: Guard) -> None:
        grads, self.grads = self.grads, ()
        *_, max_norm, skip_nonfinite = hyper[0]
        seen = guard.read(float(max_norm), bool(skip_nonfinite))
        if guard.stats is not None:
            guard.stats[table.GRAD_NORM] = seen.grad_norm
            guard.stats[table.SKIPPED_STEPS] += seen.skip
        if seen.skip:
            return
        steps = self._advance()
        known: dict[tuple[int, float], tuple[Tensor, tuple[bool, bool, bool]]] = {}
        for span in self.spans:
            group, step = key = (span.row.group, steps[span.row.index])
            if key not in known:
                values = torch.tensor(scalars(step, hyper[group], seen), dtype=self.compute)
                known[key] = (values, flags(values.tolist()))
            span.update(*known[key], grads, self.chunk, self.compiled)

    def _advance(self) -> dict[int, float]:
        """Count the step; returns each parameter's count, by its index."""
        steps: dict[int, float] = {}
        for rows, index in self.counters:
            counters = rows[0].home.counters
            assert counters is not None
            values = counters.steps[index] + 1
            counters.steps[index] = values
            steps.update(zip((row.index for row in rows), values.tolist(), strict=True))
        return steps


def flags(numbers: Sequence[float]) -> tuple[bool, bool, bool]:
    """coupled_decay, decoupled_decay, store_param: from scalars as rounded to their type, as the kernel sees them."""
    coupled, decay = numbers[table.COUPLED] != 0, numbers[table.DECAY] != 0
    return coupled, decay, numbers[table.STEP_SIZE] != 0 or decay


class HostSpan:
    """One span as flat tensors."""

    def __init__(self, launch: Launch, span: Span) -> None:
        self.row = span.first
        self.numel = span.numel
        self.launch = launch
        # Storages of their own: compiled code must not take two slices of one segment for aliases.
        self.operands = {
            key: Slot(slot.segment, slot.start, span.numel).flat() for key, slot in self.row.slots.items() if slot
        }
        staged = [row for row in span.rows if row.stage]
        self.indexes = [row.index for row in staged]
        self.params = [row.param for row in staged]
        self.stage_params = [row.stage[0] for row in staged if row.stage]
        self.stage_grads = [row.stage[1] for row in staged if row.stage]

    def update(
        self,
        scalars: Tensor,
        flags: tuple[bool, bool, bool],
        grads: Sequence[Tensor | None],
        chunk: int,
        compiled: bool,
    ) -> None:
        """Step the whole span with these scalars, copying in and out what is staged."""
        if self.params:
            torch._foreach_copy_(self.stage_params, self.params)
            torch._foreach_copy_(self.stage_grads, [real(grads[i]) for i in self.indexes])  # type: ignore[arg-type]
        operands = self.operands
        if "grad" not in operands:
            operands = operands | {"grad": flat(real(grads[self.row.index]))}  # type: ignore[arg-type]
        launch = self.launch
        mix = (launch.param, launch.grad, launch.state, launch.amsgrad)
        step, sqrt = (compiled_adam_step(mix, flags), torch.sqrt) if compiled else (adam_step, exact_sqrt)
        for start in range(0, self.numel, chunk):
            part = slice(start, start + chunk)
            p, g, m, v = (operands[key][part] for key in ("param", "grad", "exp_avg", "exp_avg_sq"))
            v_max = operands["max_exp_avg_sq"][part] if launch.amsgrad else None
            step(p, g, m, v, v_max, scalars, *flags, sqrt)
        if self.params:
            torch._foreach_copy_(self.params, self.stage_params)
