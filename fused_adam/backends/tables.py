"""The tables that kernels read: what their rows say, and how they get to the device.

Their columns are those of `fused_adam_kernels/table.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adam_kernels import table

from ..numerics.codecs import elements_per_draw
from ..plan import CoalescedRows, Row
from ..state.memory import send
from .pieces import Part, advanced_offset

# Name of an operand -> its column among a row's addresses.
COLUMNS = {
    "param": table.PARAM,
    "grad": table.GRAD,
    "exp_avg": table.EXP_AVG,
    "exp_avg_sq": table.EXP_AVG_SQ,
    "max_exp_avg_sq": table.MAX_EXP_AVG_SQ,
    "master_weight": table.EXTRA,
    "remainder": table.EXTRA,
    "exp_avg_ratio": table.EXP_AVG,
    "exp_avg_sq_lattice": table.EXP_AVG_SQ,
    "exp_avg_ratio_scale": table.EXP_AVG_SCALE,
    "exp_avg_sq_lattice_scale": table.EXP_AVG_SQ_SCALE,
    "ema": table.EMA,
}


def on_host(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor on the host, whatever the user's default device and dtype."""
    return torch.tensor(values, dtype=dtype, device="cpu")


class DeviceTable:
    """A device's copy of numbers that the host decides, made anew whenever they change.

    The copy is never rewritten. So no upload can overtake the step before it, and a captured graph
    keeps what it was captured with.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.key: object = None
        self.tensor = torch.empty(0, device=device)
        self.spare: Tensor | None = None  # pinned memory for an upload within a capture
        self.captured: list[Tensor] = []  # what graphs read, for as long as this lives

    def get(self, key: object, make: Callable[[], Tensor], capturing: bool) -> Tensor:
        """The tensor on the device.

        Args:
            key: a value that is equal as long as the numbers are.
            make: gives the numbers on the host; called when the key changes.
            capturing: whether the stream is being captured in a CUDA graph.
        """
        if key != self.key:
            # The table outlives the user's inference mode, and is written to outside of it.
            with torch.inference_mode(False):
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
        """The values in pinned memory, where the device is a GPU.

        It comes from torch's allocator, which gives a block out again only when the copy from it is
        done.
        """
        if self.device.type == "cpu":
            return values
        if capturing and self.spare is not None and self.spare.shape == values.shape:
            host, self.spare = self.spare.copy_(values), None
            return host
        if not capturing and self.spare is None:
            # Allocating pinned memory is better done before a capture than in it.
            self.spare = torch.empty_like(values, pin_memory=True)
        return values.pin_memory()


class Update(NamedTuple):
    """One launch of the update: the kernel, and which row and chunk each program takes."""

    launch: Callable[..., None]
    blocks: Tensor  # int32, shape (B, 2), see `table.py`


class Work(NamedTuple):
    """A row of the row table, and how many elements an update covers."""

    row: int
    numel: int


def table_row(row: Row, span: CoalescedRows | None) -> list[int]:
    """One row of the row table.

    Args:
        row: gradients that move have address 0 for now.
        span: what is updated with the row's scalars, if it is the first of coalesced rows. The
            others have no elements of their own to update.
    """
    columns = [0] * table.ROW
    for key, slot in row.slots.items():
        columns[COLUMNS[key]] = slot.address if slot else 0
    columns[table.STEP] = row.param_state.step_address
    columns[table.GROUP] = row.group
    columns[table.NUMEL] = span.numel if span else 0
    columns[table.GRAD_NUMEL] = row.param.numel()
    columns[table.SEED], columns[table.PARAM_INDEX] = row.options.seed, row.param_index
    columns[table.GLOBAL_OFFSET] = row.global_offset if row.options.recipe.random else 0
    return columns


def part_row(owner: Sequence[int], part: Part, buffer: int) -> list[int]:
    """The row of a part.

    Args:
        owner: the row of the span that it is a part of.
        part: what to update.
        buffer: the address of the buffer that its state is in.
    """
    row, columns = part.span.first, list(owner)
    for key, place in part.state.items():
        columns[COLUMNS[key]] = buffer + place.offset
    columns[table.PARAM] += part.start * row.param.element_size()
    columns[table.NUMEL] = part.numel
    if row.options.recipe.random:
        share = elements_per_draw(row.options.recipe.states)
        columns[table.GLOBAL_OFFSET] = advanced_offset(row.global_offset, part.start, share)
    return columns
