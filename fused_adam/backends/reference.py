"""Runs launch groups in numpy or plain torch, a chunk at a time, or through torch.compile.

Everything happens on the host, in order. On a GPU each operation is a launch of torch's own: equal
bits, slowly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fused_adam_kernels import table

from ..numerics.codecs import elements_per_draw, random_words
from ..numerics.formula import CHUNK, EAGER, Flags, adam_step, recipe_step
from ..numerics.norm import PartialSums, square_sums, total
from ..numerics.scalars import LAST_STEP, GradTransform, GradTransformValues, Hyper, scalars
from ..plan import CoalescedRows, Launch, LaunchGroup, Row, grouped
from ..precision import GROUP, GROUPED
from ..state.memory import SLOT_ALIGN, Slot, align, as_flat, as_real, with_own_storage
from ..state.staging import JoinedCopies, StagedCopies, same_order
from ..torch_private import foreach_add_
from .array_chunks import ArrayChunk, ArrayOperand, chunks_of, step_chunks, suits
from .compiled import CompiledStep, compiled_step

Step = Callable[..., None]
Operands = dict[str, Tensor]
Copies = list[tuple[Tensor, Tensor]]  # a user's memory, and its padded copy
# The operands of `adam_step`, in its order.
OPERANDS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema")


class StepValues(NamedTuple):
    """What all rows of one param group and step count are updated with."""

    step: float  # counts from 1
    scalars: Tensor  # shape (SCALARS,), of the arithmetic's dtype, on the host
    flags: Flags


class ReferenceRunner:
    """Runs one launch group on the backend "reference" or "compiled"."""

    def __init__(self, group: LaunchGroup, backend: str) -> None:
        self.backend, self.device, self.compute = backend, group.device, group.compute
        self.rows = group.rows
        self.grads: Sequence[Tensor] = ()
        positions = [row.param_index for row in group.rows]
        self.partial_sums = PartialSums(positions, [], torch.empty(0, device=group.device))
        self.counters = StepCounters(group.rows, group.device)
        self.spans = [
            ReferenceRows(launch, span, backend == "compiled")
            for launch in group.launches
            for span in launch.spans
        ]
        self.count_indexes = [self.counters.index[span.row.grad_index] for span in self.spans]

    def begin(self, grads: Sequence[Tensor], addresses: Sequence[int], capturing: bool) -> None:
        if capturing:
            raise RuntimeError(
                f"backend={self.backend!r} cannot be captured in a CUDA graph; use backend='triton'"
            )
        self.grads = grads

    def square_sum(self) -> Tensor:
        no_grad = torch.empty(0, device=self.device)  # where another rank counts it
        grads = [self._flat_grad(row) if row.in_norm else no_grad for row in self.rows]
        sums = square_sums(grads)
        self.partial_sums.chunks = list(map(len, sums))
        self.partial_sums.values = torch.cat(sums)
        return total(self.partial_sums.values)

    def _flat_grad(self, row: Row) -> Tensor:
        """The gradient's elements in the order in which the kernel reads them: the state's."""
        grad = self.grads[row.grad_index]
        if same_order(row.param, grad):
            return as_flat(as_real(grad))
        return as_flat(torch.empty_like(row.param, dtype=row.grad_dtype).copy_(as_real(grad)))

    def prepare(self, hyper: Hyper, transform: GradTransform) -> None:
        """Compile, before this group or another one is changed, as a compiler may fail."""
        if self.backend != "compiled":
            return
        numbers = transform.read(hyper[0].max_grad_norm, hyper[0].skip_grad_norm)
        if not numbers.skip:
            for span, values in zip(self.spans, self._values(hyper, numbers), strict=True):
                span.compile(values)

    def run(self, hyper: Hyper, transform: GradTransform) -> None:
        # Let go of the gradients: `zero_grad()` should free their memory, not the next step.
        grads, self.grads = self.grads, ()
        # The same for every param group.
        numbers = transform.read(hyper[0].max_grad_norm, hyper[0].skip_grad_norm)
        if transform.stats is not None:
            transform.stats[table.GRAD_NORM] = numbers.grad_norm
            transform.stats[table.GRAD_SCALE] = numbers.grad_scale
            transform.stats[table.SKIPPED_STEPS] += numbers.skip
        if numbers.skip:
            return
        of_spans = self._values(hyper, numbers)
        if self.backend == "compiled":
            for span, values in zip(self.spans, of_spans, strict=True):
                span.compile(values)
        self.counters.advance()
        pending = Pending()
        for span, values in zip(self.spans, of_spans, strict=True):
            span.update(values, grads, pending)
        pending.run()

    def _values(self, hyper: Hyper, numbers: GradTransformValues) -> list[StepValues]:
        """What each span is updated with in the step that is about to be made."""
        counts = self.counters.following()
        # Most rows share a param group and a step count, so they share their scalars, too.
        shared: dict[tuple[int, float], StepValues] = {}
        of_spans: list[StepValues] = []
        for span, index in zip(self.spans, self.count_indexes, strict=True):
            group, step = key = (span.row.group, counts[index])
            if key not in shared:
                in_float64 = scalars(step, hyper[group], numbers)
                rounded = torch.tensor(in_float64, dtype=self.compute, device="cpu")
                flags = Flags.of(rounded, span.row.options.cautious)
                shared[key] = StepValues(step, rounded, flags)
            of_spans.append(shared[key])
        return of_spans


class Pending:
    """Updates of memory that no other one shares, which wait until all are known.

    All are prepared before the first one runs, which takes half as long as between two of them:
    an update drives everything else out of the caches.
    """

    def __init__(self) -> None:
        self.chunks: list[ArrayChunk] = []
        self.calls: list[Callable[[], None]] = []
        self.copies: Copies = []  # to copy back after that

    def run(self) -> None:
        step_chunks(self.chunks)
        for call in self.calls:
            call()
        _copy_back(self.copies)


class StepCounters:
    """The step counters of one launch group, advanced with as few calls as possible.

    Counters of one buffer are advanced together, and so are those that are alone in theirs.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        by_buffer = grouped(rows, lambda row: id(row.param_state.counters)).values()
        shared = [members for members in by_buffer if len(members) > 1]
        alone = [members[0] for members in by_buffer if len(members) == 1]
        self.buffers: list[tuple[Tensor, Tensor]] = []  # counters, and indexes of ours among them
        for members in shared:
            indexes = [row.param_state.counter for row in members]
            # On the host first, whatever the user's default device.
            on_host = torch.tensor(indexes, dtype=torch.int64, device="cpu")
            self.buffers.append((_steps(members[0]), on_host.to(device)))
        self.alone = [_steps(row)[row.param_state.counter] for row in alone]
        in_order = [row for members in [*shared, alone] for row in members]
        # grad_index of a row -> where its count is in what `following` returns.
        self.index = {row.grad_index: i for i, row in enumerate(in_order)}

    def following(self) -> list[float]:
        """The counts of the step that is about to be made."""
        counts: list[float] = []
        for steps, indexes in self.buffers:
            counts += (steps[indexes] + 1).tolist()
        if self.alone:
            counts += (torch.stack(self.alone) + 1).tolist()
        return counts

    def advance(self) -> None:
        """Add one to each counter."""
        for steps, indexes in self.buffers:
            steps[indexes] += 1
        if self.alone:
            foreach_add_(self.alone, 1)


def _steps(row: Row) -> Tensor:
    counters = row.param_state.counters
    assert counters is not None  # every row has state
    return counters.steps


class ReferenceRows:
    """Coalesced rows as flat tensors, ready to be updated."""

    def __init__(self, launch: Launch, span: CoalescedRows, compiled: bool) -> None:
        self.row, self.numel = span.first, span.numel
        self.launch = launch
        # Storages of their own: compiled code must not take two slices of one segment for aliases.
        self.operands = {
            key: Slot(slot.segment, slot.start, self._length(key, slot)).flat()
            for key, slot in self.row.slots.items()
            if slot
        }
        self.staged = _staged_copies(span, self.operands)
        # A user's own memory may end before the last slot does, and gradients come from users.
        ends = [x.numel() for x in self.operands.values()]
        ends += [] if "grad" in self.operands else [self.numel]
        self.ends_within_slot = min(ends) < align(self.numel)
        self.compiled_step: CompiledStep | None = None
        dtypes = {key: x.dtype for key, x in self.operands.items()} | {"grad": launch.grad}
        self.dtypes = tuple(map(dtypes.get, OPERANDS))
        # What is always here is viewed once; most gradients come anew with each step.
        self.arrays: dict[str, ArrayOperand] | None = None
        plain = launch.recipe.weights is None and not compiled
        if plain and suits(self.row.param.device, self.row.compute):
            self.arrays = {key: ArrayOperand.of(x) for key, x in self.operands.items()}
        # Temporaries of a chunk stay in the CPU's cache. A GPU has none worth staying in.
        chunk = CHUNK if self.row.param.device.type == "cpu" else self.numel
        starts = range(0, self.numel, chunk)
        self.chunks = [(start, min(start + chunk, self.numel)) for start in starts]

    def _length(self, key: str, slot: Slot) -> int:
        """Elements to view: whole slots, so that groups and vectors are full.

        A user's own tensor ends where it ends.
        """
        whole = align(self.numel) // (GROUP if key in GROUPED else 1)
        return min(whole, slot.segment.numel() - slot.start)

    def compile(self, values: StepValues) -> None:
        """Make the code for these values, unless it has been made."""
        # A multiplication by 1 is nothing next to the memory's time, and saves a variant.
        flags = values.flags._replace(has_multiplier=True)
        threads = torch.get_num_threads()
        self.compiled_step = compiled_step(self.dtypes, values.scalars.dtype, flags, threads)

    def update(self, values: StepValues, grads: Sequence[Tensor], pending: Pending) -> None:
        """Step all rows.

        Args:
            grads: of every parameter that has one, in order.
            pending: takes what can wait for other rows.
        """
        if not self.staged:
            self._update(values, grads, pending)
            return
        self.staged.load_params()
        self.staged.load_grads(grads)
        # Pages share their memory, so this one cannot wait.
        page = Pending()
        self._update(values, grads, page)
        page.run()
        self.staged.store_params()

    def _update(self, values: StepValues, grads: Sequence[Tensor], pending: Pending) -> None:
        if self.arrays is not None:
            pending.chunks += self._chunks(self.arrays, values, grads)
            return
        operands = self.operands
        if "grad" not in operands:
            operands = operands | {"grad": as_flat(as_real(grads[self.row.grad_index]))}
        if self.compiled_step is not None:
            self._compiled(self.compiled_step, operands, values, pending)
        elif self.launch.recipe.weights is None:
            self._plain(operands, values)
        else:
            self._by_recipe(operands, values)

    def _chunks(
        self, arrays: dict[str, ArrayOperand], values: StepValues, grads: Sequence[Tensor]
    ) -> list[ArrayChunk]:
        if "grad" not in arrays:
            grad = as_flat(as_real(grads[self.row.grad_index]))
            arrays = arrays | {"grad": ArrayOperand.of(with_own_storage(grad))}
        operands = [arrays.get(key) for key in OPERANDS]
        return chunks_of(operands, self.numel, values.scalars, values.flags)

    def _plain(self, operands: Operands, values: StepValues) -> None:
        for start, end in self.chunks:
            part = {key: tensor[start:end] for key, tensor in operands.items()}
            step: Step = adam_step
            step(*map(part.get, OPERANDS), values.scalars, values.flags, EAGER)

    def _compiled(
        self, step: CompiledStep, operands: Operands, values: StepValues, pending: Pending
    ) -> None:
        def add(part: Operands) -> None:
            in_order = map(part.get, OPERANDS)
            pending.calls.append(functools.partial(step, *in_order, values.scalars))

        if not self.ends_within_slot:
            add(operands)
            return
        # Compiled code takes whole slots alone. Where a user's memory ends within one, the last
        # slot is stepped on a padded copy.
        body = self.numel // SLOT_ALIGN * SLOT_ALIGN
        if body:
            add({key: x[:body] for key, x in operands.items()})
        tail = {key: x[body:] for key, x in operands.items()}
        tail, copies = _to_whole_slots(tail, SLOT_ALIGN)
        add(tail)
        pending.copies += copies

    def _by_recipe(self, operands: Operands, values: StepValues) -> None:
        row, seed, recipe = self.row, self.row.options.seed, self.row.options.recipe
        step, device = int(min(values.step, LAST_STEP)), row.param.device
        share = elements_per_draw(recipe.states)
        for start, end in self.chunks:
            whole = align(end - start)
            memory = self._recipe_memory(operands, start, end)
            memory, copies = _to_whole_slots(memory, whole)
            # One word per element, keyed by what never changes: the seed, the step, and the
            # element's place in the full parameter.
            count = whole if recipe.random else 0
            bits = random_words(
                seed, start, step, row.param_index, count, device, row.global_offset, share
            )
            recipe_step(recipe, memory, values.scalars, values.flags, bits)
            _copy_back(copies)

    @staticmethod
    def _recipe_memory(operands: Operands, start: int, end: int) -> Operands:
        """The operands of one chunk, with whole groups of what the recipe stores."""
        whole = start + align(end - start)
        memory = {}
        for key, tensor in operands.items():
            if key in GROUPED:
                memory[key] = tensor[start // GROUP : whole // GROUP]
            elif key in ("param", "grad"):
                memory[key] = tensor[start:end]
            else:
                # Behind the end codes are zeros and stay so, as they never have a gradient: they do
                # not reach their group's scale.
                memory[key] = tensor[start:whole]
        return memory


def _staged_copies(span: CoalescedRows, operands: Operands) -> StagedCopies | None:
    """How staged rows get into their scratch memory; None if the rows are updated in place."""
    scratch = [row.scratch for row in span.rows if row.scratch]
    if not scratch:
        return None
    params = [row.param for row in span.rows]
    grad_indexes = [row.grad_index for row in span.rows]
    is_real = not any(row.user_param.is_complex() for row in span.rows)
    if is_real and JoinedCopies.suits(params):
        pages = (operands["param"], operands["grad"])
        return JoinedCopies(params, scratch, grad_indexes, pages)
    return StagedCopies(params, scratch, grad_indexes)


def _to_whole_slots(operands: Operands, numel: int) -> tuple[Operands, Copies]:
    """Pad operands to `numel` elements with zeros, where a user's memory ends within a slot.

    Returns what to step, and for `_copy_back` the pairs of a user's memory and its padded copy.
    """
    padded, copies = {}, []
    for key, x in operands.items():
        missing = 0 if key in GROUPED else numel - x.numel()
        padded[key] = pad(x, (0, missing)) if missing else x
        if missing and key != "grad":
            copies.append((x, padded[key]))
    return padded, copies


def _copy_back(copies: Copies) -> None:
    for memory, copy in copies:
        memory.copy_(copy[: len(memory)])
