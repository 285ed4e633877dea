"""Runs launch groups with the Triton kernels, on a GPU or in the interpreter.

Nothing here waits for the device, and all of it may be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adam_kernels import adam, norm, scalars, table

from ..numerics.norm import PartialSums
from ..numerics.scalars import GradTransform, Hyper
from ..plan import Launch, LaunchGroup, Row
from ..state import staging
from ..state.memory import upload
from .streamed_updates import StreamedUpdates
from .streaming import Ring
from .tables import DeviceTable, Update, Work, on_host, table_row


class TritonRunner:
    """Runs one launch group: one prologue, and one update per dtype mix.

    It keeps addresses, and no tensor behind them but what is staged: state and parameters that
    users move away are free.

    Args:
        group: what to run.
        needs_norm, skip_spikes: as for `choose.bind`.
        ring: what state on the host is streamed through; None if state is on the device.
    """

    def __init__(
        self, group: LaunchGroup, needs_norm: bool, skip_spikes: bool, ring: Ring | None = None
    ) -> None:
        rows = group.rows
        self.device, self.num_rows = group.device, len(rows)
        position = {row.grad_index: i for i, row in enumerate(rows)}
        spans = [span for launch in group.launches for span in launch.spans]
        leaders = {span.first.grad_index: span for span in spans}
        table_rows = [table_row(row, leaders.get(row.grad_index)) for row in rows]
        launchers = [
            adam.adam_step(*_mix(launch), launch.amsgrad, launch.cautious, launch.ema)
            for launch in group.launches
        ]

        def make_update(number: int, work: Sequence[Work]) -> Update:
            return Update(launchers[number], _blocks(group.launches[number], work, self.device))

        self.streamed: StreamedUpdates | None = None
        self.updates: list[Update] = []
        if ring is not None:
            self.streamed = StreamedUpdates(group, make_update, ring, table_rows, position)
            table_rows += self.streamed.rows
        else:
            self.updates = [
                make_update(number, _work(launch, position))
                for number, launch in enumerate(group.launches)
                if launch.spans
            ]
        self.host_rows = on_host(table_rows, torch.int64)
        # Backward may put a gradient elsewhere at every step, unless it is staged or in a flat
        # buffer: these rows get new addresses.
        moving = [row for row in rows if row.slots["grad"] is None]
        self.moving_rows = on_host([position[row.grad_index] for row in moving], torch.int64)
        self.moving_grads = on_host([row.grad_index for row in moving], torch.int64)
        self.row_table, self.hyper_table = DeviceTable(self.device), DeviceTable(self.device)
        shape = (len(table_rows), table.SCALARS)
        self.scalars = torch.empty(shape, dtype=group.compute, device=self.device)
        averages = any(launch.ema for launch in group.launches)
        self.prologue = scalars.prologue(skip_spikes, averages)
        self.programs = scalars.programs(len(rows))
        self.norm = Norm(group) if needs_norm else None
        self.partial_sums = self.norm.partial_sums if self.norm else None
        # What the prologue reads in a step without them: no overflow, a scale of one, no norm,
        # nowhere to count.
        self.no_overflow = torch.zeros(1, dtype=torch.float32, device=self.device)
        self.no_scale = torch.ones(1, dtype=torch.float32, device=self.device)
        self.no_sum = torch.zeros(1, dtype=torch.float64, device=self.device)
        self.no_stats = torch.zeros(table.STATS, dtype=torch.float64, device=self.device)
        self.staged = _staged_copies(rows)

    def begin(self, grads: Sequence[Tensor], addresses: Sequence[int], capturing: bool) -> None:
        if capturing and self.streamed:
            raise RuntimeError(
                "state_device='cpu' cannot be captured in a CUDA graph, because copies from and to "
                "the host run on streams of their own: step outside of the graph"
            )
        self.capturing = capturing
        with self._on_device():
            # All gradients' addresses are the key: one list comparison costs less than picking out
            # those of this group.
            key = addresses if len(self.moving_rows) else ()
            self.device_rows = self.row_table.get(
                key, lambda: self._with_grads(addresses), capturing
            )
            if self.staged:
                self.staged.load_grads(grads)

    def _with_grads(self, addresses: Sequence[int]) -> Tensor:
        """The row table with the gradients' addresses of this step."""
        rows = self.host_rows.clone()
        if len(self.moving_rows):
            # An array takes Python's numbers four times as fast as a tensor does.
            all_addresses = torch.frombuffer(array("q", addresses), dtype=torch.int64)
            rows[self.moving_rows, table.GRAD] = all_addresses[self.moving_grads]
        if self.streamed:
            self.streamed.set_grads(rows)
        return rows

    def square_sum(self) -> Tensor:
        assert self.norm is not None
        with self._on_device():
            return self.norm.square_sum(self.device_rows)

    def prepare(self, hyper: Hyper, transform: GradTransform) -> None:
        """Nothing: Triton compiles a kernel when it is first launched."""

    def run(self, hyper: Hyper, transform: GradTransform) -> None:
        with self._on_device():
            # Here, not in `begin`: a group that ran before this one may have written to the same
            # parameters.
            if self.staged:
                self.staged.load_params()
            self.prologue(
                self.programs,
                self.device_rows,
                self._hyper(hyper),
                self.scalars,
                _like(self.no_overflow, transform.found_inf),
                _like(self.no_scale, transform.grad_scale),
                _like(self.no_sum, transform.square_sum),
                self.no_stats if transform.stats is None else transform.stats,
                self.num_rows,
            )
            for launch, blocks in self.updates:
                launch(len(blocks), self.device_rows, blocks, self.scalars)
            if self.streamed:
                self.streamed.run(self.device_rows, self.scalars)
            if self.staged:
                self.staged.store_params()

    def _hyper(self, hyper: Hyper) -> Tensor:
        """The param groups' values on the device: float64, shape (G, HYPER).

        Numbers are uploaded when one of them changes. Tensors on the device, whose values the host
        cannot know, are copied there at every step.
        """
        known = [
            [x if x.__class__ is float else self._number(x) for x in values] for values in hyper
        ]

        def numbers() -> Tensor:
            return on_host([[0.0 if x is None else x for x in row] for row in known], torch.float64)

        values = self.hyper_table.get(known, numbers, self.capturing)
        unknown = [
            (i, j, x)
            for i, row in enumerate(hyper)
            for j, x in enumerate(row)
            if known[i][j] is None and isinstance(x, Tensor)
            # The limit of the optimizer is read in the first row alone.
            if i == 0 or j != table.HYPER_SKIP_GRAD_NORM
        ]
        if unknown:
            targets = [values[i, j] for i, j, _ in unknown]
            staging.copy_all(targets, [x.reshape(()) for _, _, x in unknown])
        return values

    def _number(self, value: float | Tensor) -> float | None:
        """A value as a number, or None if it is copied as a tensor: reading one would wait."""
        # Launches on the CPU copy every tensor, as those on a GPU copy what lies there.
        on_device = isinstance(value, Tensor) and (
            value.device.type != "cpu" or self.device.type == "cpu"
        )
        return None if on_device else float(value)

    def _on_device(self) -> Any:
        """Launches go to the current device: this one, meanwhile."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.get_device_module(self.device).device(self.device)


def _work(launch: Launch, position: Mapping[int, int]) -> list[Work]:
    """What the launch updates; `position` of a row in the table, by its grad_index."""
    return [Work(position[span.first.grad_index], span.numel) for span in launch.spans]


def _blocks(launch: Launch, work: Sequence[Work], device: torch.device) -> Tensor:
    """The work, a block each: row and number of the chunk; int32, (B, 2)."""
    block = adam.launch_config(*_mix(launch), launch.amsgrad).block
    counts = [-(-numel // block) for _, numel in work]
    chunks, total = on_host(counts, torch.int64), sum(counts)
    rows = on_host([row for row, _ in work], torch.int64)
    row = torch.repeat_interleave(rows, chunks, output_size=total)
    first = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks, output_size=total)
    chunk = torch.arange(total, device="cpu") - first
    return upload(torch.stack([row, chunk], dim=1).to(torch.int32), device)


def _like(default: Tensor, value: Tensor | None) -> Tensor:
    """The value with the device and dtype of its default, which stands for None."""
    return default if value is None else value.to(default, non_blocking=True)


def _mix(launch: Launch) -> tuple[torch.dtype, torch.dtype, str, str]:
    """Element types and recipe, as the kernels name them."""
    weights, states = launch.recipe.weights or "native", launch.recipe.states or "native"
    return launch.param, launch.grad, weights, states


def _staged_copies(rows: Sequence[Row]) -> staging.StagedCopies | None:
    """What moves staged rows into scratch memory and back; None if no row is staged."""
    staged = [(row, row.scratch) for row in rows if row.scratch and row.param.numel()]
    if not staged:
        return None
    return staging.StagedCopies(
        [row.param for row, _ in staged],
        [scratch for _, scratch in staged],
        [row.grad_index for row, _ in staged],
    )


class Norm:
    """The sum of squares of one launch group's gradients.

    One launch per gradient dtype squares and adds within chunks; one more adds up the chunks.
    """

    def __init__(self, group: LaunchGroup) -> None:
        # Per dtype: row, chunk within it, and the chunk's place among all. Places follow the order
        # of the parameters, so the order of the sum does not depend on dtypes.
        blocks: dict[torch.dtype, list[tuple[int, int, int]]] = {}
        self.num_chunks, chunks = 0, []
        for i, row in enumerate(group.rows):
            chunks.append(-(-row.param.numel() // table.NORM_CHUNK) if row.in_norm else 0)
            for chunk in range(chunks[-1]):
                blocks.setdefault(row.grad_dtype, []).append((i, chunk, self.num_chunks))
                self.num_chunks += 1
        self.launches = [
            (norm.square_sum(dtype), upload(on_host(b, torch.int32), group.device))
            for dtype, b in blocks.items()
        ]
        self.add_up = norm.total()
        self.partials = torch.empty(self.num_chunks, dtype=torch.float64, device=group.device)
        self.total = torch.zeros(1, dtype=torch.float64, device=group.device)
        positions = [row.param_index for row in group.rows]
        self.partial_sums = PartialSums(positions, chunks, self.partials)

    def square_sum(self, rows: Tensor) -> Tensor:
        """float64, shape (1,), the same tensor every time. `rows` is the group's table."""
        for launch, blocks in self.launches:
            launch(len(blocks), rows, blocks, self.partials)
        self.add_up(1, self.partials, self.total, self.num_chunks)
        return self.total
