"""Launches whose state is on the host, each between copies of a piece of it in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fused_adam_kernels import table

from ..plan import LaunchGroup, grouped
from ..state.memory import upload
from .pieces import cut
from .streaming import Ring, StreamedPiece
from .tables import Update, Work, on_host, part_row


class StreamedLaunches(NamedTuple):
    """A piece of state that is on the host, and the launches that update it."""

    piece: StreamedPiece
    updates: list[Update]


class StreamedUpdates:
    """The updates of one launch group whose state is on the host.

    Each part of a piece has a row of its own, behind those of the parameters: with addresses in a
    buffer, and with a copy of its parameter's scalars. So the kernels are those of state on the
    device, and the prologue still counts every step once.

    Args:
        group: what to update.
        make_update: the number of a launch, and work for it -> an update of that work.
        ring: what the state is streamed through.
        table_rows: the row table of the parameters.
        position: grad_index of a row -> where it is in that table.
    """

    def __init__(
        self,
        group: LaunchGroup,
        make_update: Callable[[int, Sequence[Work]], Update],
        ring: Ring,
        table_rows: Sequence[list[int]],
        position: Mapping[int, int],
    ) -> None:
        self.ring, self.num_rows = ring, len(table_rows)
        self.rows: list[list[int]] = []
        self.pieces: list[StreamedLaunches] = []
        owners: list[int] = []
        grad_offsets: list[int] = []
        pieces = cut(group.launches, ring.nbytes)
        for piece, streamed in zip(pieces, ring.assign(pieces), strict=True):
            updates = []
            for number, parts in grouped(piece.parts, lambda part: part.launch).items():
                work = []
                for part in parts:
                    row = part.span.first
                    owners.append(position[row.grad_index])
                    grad_offsets.append(part.start * row.grad_dtype.itemsize)
                    work.append(Work(self.num_rows + len(self.rows), part.numel))
                    buffer = streamed.buffer.memory.data_ptr()
                    self.rows.append(part_row(table_rows[owners[-1]], part, buffer))
                updates.append(make_update(number, work))
            self.pieces.append(StreamedLaunches(streamed, updates))
        self.host_owners = on_host(owners, torch.int64)
        self.grad_offsets = on_host(grad_offsets, torch.int64)
        self.owners = upload(self.host_owners, group.device)

    def set_grads(self, rows: Tensor) -> None:
        """Give all parts the addresses of their gradients, which the parameters' rows have."""
        grads = rows[self.host_owners, table.GRAD] + self.grad_offsets
        rows[self.num_rows :, table.GRAD] = grads

    def run(self, rows: Tensor, scalars: Tensor) -> None:
        """Launch everything. `scalars`: the prologue has written those of the parameters."""
        of_params, of_parts = scalars[: self.num_rows], scalars[self.num_rows :]
        torch.index_select(of_params, 0, self.owners, out=of_parts)
        for piece, updates in self.pieces:
            self.ring.step(piece, partial(_launch, updates, rows, scalars))


def _launch(updates: Sequence[Update], rows: Tensor, scalars: Tensor) -> None:
    for launch, blocks in updates:
        launch(len(blocks), rows, blocks, scalars)
