"""Runs sections with the Triton kernels, on a GPU or in the interpreter: tables, uploads, launches.
No arithmetic here.

Nothing here waits for the device, and all of it may be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adam_kernels import adam, norm, scalars, table

from ..numerics.scalars import GradTransform, Hyper
from ..plan import CoalescedRows, Launch, LaunchGroup, Row
from ..state.memory import as_real

copy_all = torch._foreach_copy_
# Name of an operand -> its column among a row's addresses.
COLUMNS = {
    "param": table.PARAM,
    "grad": table.GRAD,
    "exp_avg": table.EXP_AVG,
    "exp_avg_sq": table.EXP_AVG_SQ,
    "max_exp_avg_sq": table.MAX_EXP_AVG_SQ,
    "master_weight": table.EXTRA,
    "remainder": table.EXTRA,
    "exp_avg_code": table.EXP_AVG,
    "exp_avg_sq_code": table.EXP_AVG_SQ,
    "exp_avg_scale": table.EXP_AVG_SCALE,
    "exp_avg_sq_scale": table.EXP_AVG_SQ_SCALE,
}


def on_host(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor there, whatever the user's default device and dtype."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def send(host: Tensor, device: torch.device) -> Tensor:
    """The same values on the device, copied in the order of the current stream. `host` is pinned if
    it is a GPU.
    """
    return host.to(device, non_blocking=True)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A table that never changes, sent to the device without waiting for it."""
    return values if device.type == "cpu" else send(values.pin_memory(), device)


class DeviceTable:
    """Numbers that the host decides, on the device: made anew when they change, never rewritten.

    So no copy can overtake the step before it, and a captured graph keeps what it was captured
    with. Pinned memory comes from torch's allocator, which hands a block out again only when the
    copy from it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.key: object = None
        self.tensor = torch.empty(0, device=device)
        self.spare: Tensor | None = None
        self.captured: list[Tensor] = []  # what graphs read, for as long as this lives

    def get(self, key: object, make: Callable[[], Tensor], capturing: bool) -> Tensor:
        """The tensor on the device for `key`, a value to be compared; `make` gives its numbers on
        the host.
        """
        if key != self.key:
            with torch.inference_mode(
                False
            ):  # it outlives the user's mode, and is written to outside of it
                host = self._pinned(make(), capturing)
                self.tensor = send(host, self.device)
            # A captured copy happens at replay, not now: the next eager step needs one of its own.
            self.key = None if capturing else key
            if capturing:
                self.captured.append(host)
        if capturing:
            self.captured.append(self.tensor)
        return self.tensor

    def _pinned(self, values: Tensor, capturing: bool) -> Tensor:
        if self.device.type == "cpu":
            return values
        if capturing and self.spare is not None and self.spare.shape == values.shape:
            host, self.spare = self.spare.copy_(values), None
            return host
        if not capturing and self.spare is None:
            # Allocating pinned memory is better done before a capture than in it.
            self.spare = torch.empty_like(values, pin_memory=True)
        return values.pin_memory()


class TritonRunner:
    """One prologue and one update launch per dtype mix, over tables that live on the device.

    Keeps addresses, and no tensor behind them but what is staged: state and parameters that users
    move away are free.
    """

    def __init__(self, section: LaunchGroup, takes_norm: bool) -> None:
        rows = section.rows
        self.device, self.num_rows = section.device, len(rows)
        leaders = {
            span.first.grad_index: span for launch in section.launches for span in launch.spans
        }
        self.host_rows = on_host(
            [self._row(row, leaders.get(row.grad_index)) for row in rows], torch.int64
        )
        # Gradients that are used where they are: their rows, and their places among all gradients.
        moving = [
            (i, row.grad_index) for i, row in enumerate(rows) if row.slots.get("grad", 0) is None
        ]
        self.moving_rows = on_host([i for i, _ in moving], torch.int64)
        self.moving_grads = on_host([index for _, index in moving], torch.int64)
        self.row_table, self.hyper_table = DeviceTable(self.device), DeviceTable(self.device)
        self.scalars = torch.empty(
            len(rows), table.SCALARS, dtype=section.compute, device=self.device
        )
        self.prologue, self.programs = scalars.prologue(), scalars.programs(len(rows))
        position = {row.grad_index: i for i, row in enumerate(rows)}
        self.updates = [
            (adam.adam_step(*self._mix(launch), launch.amsgrad), self._blocks(launch, position))
            for launch in section.launches
            if launch.spans
        ]
        self.norm = Norm(section) if takes_norm else None
        # What a step does without: no overflow, a scale of one, no norm, nowhere to count.
        self.zero, self.one = (
            torch.full((1,), x, dtype=torch.float32, device=self.device) for x in (0.0, 1.0)
        )
        self.no_sum = torch.zeros(1, dtype=torch.float64, device=self.device)
        self.no_stats = torch.zeros(table.STATS, dtype=torch.float64, device=self.device)
        staged = [row for row in rows if row.stage and row.param.numel()]
        self.staged = (
            [row.param for row in staged],
            [row.stage[0] for row in staged if row.stage],
            [row.grad_index for row in staged],
            [row.stage[1] for row in staged if row.stage],
        )

    @staticmethod
    def _mix(launch: Launch) -> tuple[torch.dtype, torch.dtype, str, str]:
        """Element types and recipe, as the kernels name them."""
        return (
            launch.param,
            launch.grad,
            launch.recipe.weights or "native",
            launch.recipe.states or "native",
        )

    @staticmethod
    def _row(row: Row, span: CoalescedRows | None) -> list[int]:
        columns = [0] * table.ROW
        for key, slot in row.slots.items():
            columns[COLUMNS[key]] = slot.address if slot else 0
        columns[table.STEP] = row.param_state.step_address
        columns[table.GROUP] = row.group
        # A row that another one's span covers has no elements of its own to update.
        columns[table.NUMEL] = span.numel if span else 0
        columns[table.GRAD_NUMEL] = row.param.numel()
        columns[table.SEED], columns[table.ORDINAL] = row.options.seed, row.param_index
        columns[table.ORIGIN] = row.global_offset if row.options.recipe.random else 0
        return columns

    def _blocks(self, launch: Launch, position: dict[int, int]) -> Tensor:
        block = adam.launch_config(*self._mix(launch)).block
        counts = [-(-span.numel // block) for span in launch.spans]
        chunks, total = on_host(counts, torch.int64), sum(counts)
        leaders = on_host([position[span.first.grad_index] for span in launch.spans], torch.int64)
        row = torch.repeat_interleave(leaders, chunks, output_size=total)
        first = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks, output_size=total)
        chunk = torch.arange(total, device="cpu") - first
        return upload(torch.stack([row, chunk], dim=1).to(torch.int32), self.device)

    def begin(self, grads: Sequence[Tensor], addresses: Sequence[int], capturing: bool) -> None:
        self.capturing = capturing
        with self._on_device():
            # Compared whole: one list comparison costs less than picking out the gradients of this
            # section.
            key = addresses if len(self.moving_rows) else ()
            self.device_rows = self.row_table.get(
                key, lambda: self._with_grads(addresses), capturing
            )
            *_, grad_indexes, stage_grads = self.staged
            if stage_grads:
                copy_all(stage_grads, [as_real(grads[i]) for i in grad_indexes])

    def _with_grads(self, addresses: Sequence[int]) -> Tensor:
        rows = self.host_rows.clone()
        if len(self.moving_rows):
            # An array takes Python's numbers four times as fast as a tensor does.
            everywhere = torch.frombuffer(array("q", addresses), dtype=torch.int64)
            rows[self.moving_rows, table.GRAD] = everywhere[self.moving_grads]
        return rows

    def square_sum(self) -> Tensor:
        assert self.norm is not None
        with self._on_device():
            return self.norm.square_sum(self.device_rows)

    def run(self, hyper: Hyper, guard: GradTransform) -> None:
        with self._on_device():
            found_inf, grad_scale = (
                self._float(guard.found_inf, self.zero),
                self._float(guard.grad_scale, self.one),
            )
            params, stage_params, *_ = self.staged
            if params:  # not in `begin`: a section before this one may write the same memory
                copy_all(stage_params, params)
            square_sum = self.no_sum
            if guard.square_sum is not None:
                square_sum = guard.square_sum.to(self.device, non_blocking=True)
            stats = self.no_stats if guard.stats is None else guard.stats
            self.prologue(
                self.programs,
                *(self.device_rows, self._hyper(hyper), self.scalars),
                *(found_inf, grad_scale, square_sum, stats, self.num_rows),
            )
            for update, blocks in self.updates:
                update(len(blocks), self.device_rows, blocks, self.scalars)
            if params:
                copy_all(params, stage_params)

    def _float(self, value: Tensor | None, default: Tensor) -> Tensor:
        return default if value is None else value.to(self.device, torch.float32, non_blocking=True)

    def _hyper(self, hyper: Hyper) -> Tensor:
        """The groups' values on the device; those that are tensors there are copied there, unread."""
        key = [[x if x.__class__ is float else self._number(x) for x in values] for values in hyper]
        known = self.hyper_table.get(
            key,
            lambda: on_host([[0.0 if x is None else x for x in row] for row in key], torch.float64),
            self.capturing,
        )
        unread = [
            (i, j, x)
            for i, row in enumerate(hyper)
            for j, x in enumerate(row)
            if key[i][j] is None and isinstance(x, Tensor)
        ]
        if unread:
            copy_all([known[i, j] for i, j, _ in unread], [x.reshape(()) for *_, x in unread])
        return known

    def _number(self, value: float | Tensor) -> float | None:
        """A value as a number, or None if it is left on its device, where reading it would wait."""
        stays = isinstance(value, Tensor) and (
            value.device.type != "cpu" or self.device.type == "cpu"
        )
        return None if stays else float(value)

    def _on_device(self) -> Any:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.get_device_module(self.device).device(self.device)


class Norm:
    """The sum of squares of one section's gradients: a launch per gradient dtype, and one that adds
    up.
    """

    def __init__(self, section: LaunchGroup) -> None:
        blocks: dict[torch.dtype, list[tuple[int, int, int]]] = {}
        dtype_of = {
            row.grad_index: launch.grad for launch in section.launches for row in launch.rows
        }
        self.places = 0  # one for every chunk, in the order of the parameters
        for i, row in enumerate(section.rows):
            for chunk in range(-(-row.param.numel() // table.NORM_CHUNK) if row.in_norm else 0):
                blocks.setdefault(dtype_of[row.grad_index], []).append((i, chunk, self.places))
                self.places += 1
        device = section.device
        self.launches = [
            (norm.square_sum(dtype), upload(on_host(b, torch.int32), device))
            for dtype, b in blocks.items()
        ]
        self.add_up = norm.total()
        self.partials = torch.empty(self.places, dtype=torch.float64, device=device)
        self.total = torch.zeros(1, dtype=torch.float64, device=device)

    def square_sum(self, rows: Tensor) -> Tensor:
        """float64, shape (1,), the same tensor every time. `rows` is the section's table."""
        for launch, blocks in self.launches:
            launch(len(blocks), rows, blocks, self.partials)
        self.add_up(1, self.partials, self.total, self.places)
        return self.total
