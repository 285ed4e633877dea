"""Runs sections on the host: plain torch a chunk at a time, or the same function through
torch.compile.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_adam_kernels import table

from ..numerics.codecs import random_words
from ..numerics.formula import CHUNK, adam_step, exact_sqrt, recipe_step
from ..numerics.norm import square_sum
from ..numerics.scalars import LAST_STEP, GradTransform, Hyper, scalars
from ..plan import CoalescedRows, Launch, LaunchGroup, Row, same_order
from ..precision import GROUP, GROUPED
from ..state.memory import SLOT_ALIGN, Slot, align, as_flat, as_real

Step = Callable[..., None]
OPERANDS = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
)  # of `adam_step`, in its order
_flatten_dense_tensors: Callable[[Sequence[Tensor]], Tensor] = torch._utils._flatten_dense_tensors


@functools.cache
def compiled_adam_step(*variant: object) -> Step:
    """`adam_step` on whole slots through torch.compile, once per variant (dtypes and flags).

    Inductor's square root is correctly rounded, and its C++ is compiled without fused
    multiply-adds. Each variant has a code object of its own, because dynamo compiles one object
    eight times at most.
    """
    code = _step_slots.__code__.replace(co_name=f"adam_step_{abs(hash(variant))}")
    function = types.FunctionType(code, _step_slots.__globals__)
    return torch.compile(function, fullgraph=True, dynamic=True)


def _step_slots(p: Tensor, *rest: Any) -> None:
    # Else the compiler asks in every iteration whether it is the last: a fifth of the time.
    torch._check(p.numel() % SLOT_ALIGN == 0)  # type: ignore[no-untyped-call]
    adam_step(p, *rest)


class ReferenceRunner:
    """One section on the backends "reference" and "compiled". All of it happens on the host, in
    order.
    """

    def __init__(self, section: LaunchGroup, backend: str) -> None:
        self.backend, self.compiled = backend, backend == "compiled"
        self.compute, self.device = section.compute, section.device
        self.rows = section.rows
        self.grads: Sequence[Tensor] = ()
        self.spans = [
            ReferenceRows(launch, span) for launch in section.launches for span in launch.spans
        ]
        # A GPU has no cache worth staying in.
        self.chunk = CHUNK if section.device.type == "cpu" else 1 << 62  # multiples of SLOT
        owners: dict[int, list[Row]] = {}
        for row in section.rows:
            owners.setdefault(id(row.param_state.counters), []).append(row)
        shared = [rows for rows in owners.values() if len(rows) > 1]
        # Counters of one buffer are advanced together, and so are those that are alone in theirs.
        self.counters = [
            (
                rows[0].param_state.counters.steps,
                _indexes([row.param_state.counter for row in rows]).to(section.device),
            )
            for rows in shared
            if rows[0].param_state.counters
        ]
        alone = [rows[0] for rows in owners.values() if len(rows) == 1]
        self.lone_counters = [
            row.param_state.counters.steps[row.param_state.counter]
            for row in alone
            if row.param_state.counters
        ]
        # Where each span's step count stands among them: which buffer, which of the rows that share
        # it.
        places = {
            row.grad_index: (i, j)
            for i, rows in enumerate([*shared, alone])
            for j, row in enumerate(rows)
        }
        self.places = [places[span.row.grad_index] for span in self.spans]

    def begin(self, grads: Sequence[Tensor], addresses: Sequence[int], capturing: bool) -> None:
        if capturing:
            raise RuntimeError(
                f"backend={self.backend!r} cannot be captured in a CUDA graph; use backend='triton'"
            )
        self.grads = grads

    def square_sum(self) -> Tensor:
        in_norm = [self._flat_grad(row) for row in self.rows if row.in_norm]
        return (
            square_sum(in_norm)
            if in_norm
            else torch.zeros((), dtype=torch.float64, device=self.device)
        )

    def _flat_grad(self, row: Row) -> Tensor:
        grad = self.grads[row.grad_index]
        if same_order(row.param, grad):
            return as_flat(as_real(grad))
        # In the order that the kernel reads: that of the state.
        return as_flat(torch.empty_like(row.param, dtype=as_real(grad).dtype).copy_(as_real(grad)))

    def run(self, hyper: Hyper, guard: GradTransform) -> None:
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
        for span, (i, j) in zip(self.spans, self.places, strict=True):
            group, step = key = (span.row.group, steps[i][j])
            if key not in known:
                values = torch.tensor(
                    scalars(step, hyper[group], seen), dtype=self.compute, device="cpu"
                )
                known[key] = (values, flags(values.tolist()))
            span.update(*known[key], grads, self.chunk, self.compiled, step)

    def _advance(self) -> list[list[float]]:
        """Count the step; returns the new counts."""
        counts: list[list[float]] = []
        for steps, index in self.counters:
            values = steps[index] + 1
            steps[index] = values
            counts.append(values.tolist())
        if self.lone_counters:
            torch._foreach_add_(self.lone_counters, 1)
            counts.append(torch.stack(self.lone_counters).tolist())
        return counts


def _indexes(numbers: Sequence[int]) -> Tensor:
    """int64, on the host whatever the user's default device."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def flags(numbers: Sequence[float]) -> tuple[bool, bool, bool]:
    """coupled_decay, decoupled_decay, store_param: from scalars as rounded to their type, as the
    kernel sees them.
    """
    coupled, decay = numbers[table.COUPLED] != 0, numbers[table.DECAY] != 0
    return coupled, decay, numbers[table.STEP_SIZE] != 0 or decay


class ReferenceRows:
    """One span as flat tensors."""

    def __init__(self, launch: Launch, span: CoalescedRows) -> None:
        self.row = span.first
        self.numel = span.numel
        self.launch = launch
        # Storages of their own: compiled code must not take two slices of one segment for aliases.
        self.operands = {
            key: Slot(slot.segment, slot.start, self._length(key, slot)).flat()
            for key, slot in self.row.slots.items()
            if slot
        }
        self.stage = Stage(span.rows, self.operands) if self.row.stage else None

    def _length(self, key: str, slot: Slot) -> int:
        """Elements to view: whole slots, so that groups and vectors are full, but of the user's
        memory what is his.
        """
        whole = align(self.numel) // (GROUP if key in GROUPED else 1)
        return min(whole, slot.segment.numel() - slot.start)

    def update(
        self,
        scalars: Tensor,
        flags: tuple[bool, bool, bool],
        grads: Sequence[Tensor],
        chunk: int,
        compiled: bool,
        step: float,
    ) -> None:
        """Step the whole span with these scalars, copying in and out what is staged."""
        operands = self.operands
        if self.stage:
            self.stage.copy_in(grads)
        elif "grad" not in operands:
            operands = operands | {"grad": as_flat(as_real(grads[self.row.grad_index]))}
        if compiled:
            self._compiled(operands, scalars, flags)
        else:
            for start in range(0, self.numel, chunk):
                end = min(start + chunk, self.numel)
                if self.launch.recipe.weights is None:
                    part = {key: tensor[start:end] for key, tensor in operands.items()}
                    plain: Step = adam_step
                    plain(*map(part.get, OPERANDS), scalars, *flags, exact_sqrt)
                else:
                    self._by_recipe(operands, start, end - start, scalars, flags, step)
        if self.stage:
            self.stage.copy_out()

    def _compiled(
        self, operands: dict[str, Tensor], scalars: Tensor, flags: tuple[bool, bool, bool]
    ) -> None:
        launch = self.launch
        run = compiled_adam_step((launch.param, launch.grad, launch.amsgrad), flags)
        end, body = align(self.numel), self.numel // SLOT_ALIGN * SLOT_ALIGN
        if all(x.numel() == end for x in operands.values()):
            run(*map(operands.get, OPERANDS), scalars, *flags, torch.sqrt)
            return
        if body:
            part = {key: x[:body] for key, x in operands.items()}
            run(*map(part.get, OPERANDS), scalars, *flags, torch.sqrt)
        part, copies = _to_whole_slots({key: x[body:] for key, x in operands.items()}, end - body)
        run(*map(part.get, OPERANDS), scalars, *flags, torch.sqrt)
        _copy_back(copies)

    def _by_recipe(
        self,
        operands: dict[str, Tensor],
        start: int,
        numel: int,
        scalars: Tensor,
        flags: tuple[bool, bool, bool],
        step: float,
    ) -> None:
        end, whole = start + numel, start + align(numel)
        memory = {key: tensor[start:whole] for key, tensor in operands.items()}
        # Behind its end the last group is zeros. The memory there may hold what a NaN left.
        for key in memory:
            if key in GROUPED:
                memory[key] = operands[key][start // GROUP : whole // GROUP]
            elif key in ("param", "grad"):
                memory[key] = operands[key][start:end]
            else:
                memory[key][numel:] = 0
        memory, copies = _to_whole_slots(memory, align(numel))
        options = self.row.options
        count = align(numel) if options.recipe.random else 0
        number = int(min(step, LAST_STEP))
        device = memory["param"].device  # the scalars are on the host
        words = random_words(
            options.seed, start, number, self.row.param_index, count, device, self.row.global_offset
        )
        recipe_step(options.recipe, memory, scalars, *flags, words)
        _copy_back(copies)


def _to_whole_slots(
    operands: dict[str, Tensor], numel: int
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """The operands with zeros behind the end of those that are shorter: the user's memory ends
    within a slot.

    Returns what to step, and pairs of user's memory and its copy, for `_copy_back`.
    """
    padded_operands, copies = {}, []
    for key, x in operands.items():
        missing = 0 if key in GROUPED else numel - x.numel()
        padded_operands[key] = pad(x, (0, missing)) if missing else x
        if missing and key != "grad":
            copies.append((x, padded_operands[key]))
    return padded_operands, copies


def _copy_back(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    for memory, copy in copies:
        memory.copy_(copy[: len(memory)])


class Stage:
    """Copies of a span's parameters and gradients, neighbours in scratch memory.

    A copy per tensor costs 0.7 us; small contiguous ones are concatenated (0.1 us) and spread over
    their slots instead.
    """

    SMALL = (
        512  # elements per tensor on average, where spreading costs as much as a copy per tensor
    )

    def __init__(self, rows: Sequence[Row], operands: dict[str, Tensor]) -> None:
        self.indexes = [row.grad_index for row in rows]
        self.params = [row.param for row in rows]
        self.copies = [row.stage for row in rows if row.stage]
        self.views = [copy[0] for copy in self.copies]
        self.scratch = (operands["param"], operands["grad"])
        numels = [row.param.numel() for row in rows]
        self.positions: Tensor | None = None
        plain = all(
            param.is_contiguous() and not row.complex
            for row, param in zip(rows, self.params, strict=True)
        )
        if plain and sum(numels) <= self.SMALL * len(rows):
            self.flat_params = [as_flat(param) for param in self.params]
            self.one_dimensional = all(param.ndim == 1 for param in self.params)
            start = self.views[0].storage_offset()
            starts = _indexes([int(view.storage_offset() - start) for view in self.views])
            lengths = _indexes(numels)
            first = lengths.cumsum(0) - lengths
            positions = torch.arange(sum(numels), device="cpu") + torch.repeat_interleave(
                starts - first, lengths
            )
            self.positions = positions.to(self.params[0].device)

    def copy_in(self, grads: Sequence[Tensor]) -> None:
        chosen = [grads[i] for i in self.indexes]
        if self.positions is None:
            torch._foreach_copy_(self.views, self.params)
            torch._foreach_copy_(
                [copy[1] for copy in self.copies], [as_real(grad) for grad in chosen]
            )
        else:
            param, grad = self.scratch
            param.index_copy_(0, self.positions, torch.cat(self.flat_params))
            # Flattening them first costs four times as much as joining them.
            packed = torch.cat(chosen) if self.one_dimensional else _flatten_dense_tensors(chosen)
            grad.index_copy_(0, self.positions, packed)

    def copy_out(self) -> None:
        torch._foreach_copy_(self.params, self.views)
