"""Steps on state in host memory: copies in, launches and copies out, ordered by events.

A ring of buffers on the device holds the state of a few pieces. While one is updated, the next is
copied in and the last one out, on streams of their own. The host enqueues all of it and waits for
nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pieces import Piece, Run

BUFFERS = 3  # one is filled, one updated, one emptied
# Names of queues. COMPUTE is the stream that is current when a step runs.
IN, COMPUTE, OUT = "copy in", "compute", "copy out"

Work = Callable[[], None]


class Streams:
    """The queues of one device. Each runs what it is given in order, and none waits for another.

    Tests put in their place what records the order, or runs it in any other order that is allowed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.streams = {queue: self.module.Stream(device) for queue in (IN, OUT)}

    def _stream(self, queue: str) -> Any:
        return self.streams.get(queue) or self.module.current_stream(self.device)

    def run(self, queue: str, work: Work) -> None:
        """Enqueue what `work` enqueues."""
        if queue == COMPUTE:
            work()
            return
        with self.module.stream(self.streams[queue]):
            work()

    def record(self, queue: str) -> Any:
        """Return an event that happens when all that was enqueued so far is done."""
        return self._stream(queue).record_event()

    def wait(self, queue: str, event: Any) -> None:
        """Let what is enqueued from now on begin after the event."""
        self._stream(queue).wait_event(event)

    def share(self, memory: Tensor) -> None:
        """Let the memory be given out again only when the copies from it are done."""
        # Whatever else is done with a buffer comes before a copy out.
        memory.record_stream(self.streams[OUT])

    def synchronize(self) -> None:
        """Wait for all copies out."""
        self.streams[OUT].synchronize()


class Copy:
    """One run of a segment on the host, and its memory in a buffer.

    A plan may outlive the state that it was made for, and must not keep it alive: so the segment is
    referred to weakly. Guards see to it that it is there when a step runs.
    """

    def __init__(self, run: Run, buffer: Tensor) -> None:
        dtype = run.segment.dtype
        self.segment, self.start, self.end = weakref.ref(run.segment), run.start, run.end
        self.on_device = buffer[run.offset : run.offset + run.nbytes].view(dtype)
        first = run.segment.data_ptr() + run.start * run.segment.element_size()
        self.addresses = range(first, first + run.nbytes)

    def _on_host(self) -> Tensor:
        segment = self.segment()
        assert segment is not None
        return segment[self.start : self.end]

    def copy_in(self) -> None:
        self.on_device.copy_(self._on_host(), non_blocking=True)

    def copy_out(self) -> None:
        self._on_host().copy_(self.on_device, non_blocking=True)


class Buffer:
    """One buffer of a ring, and what was last done with it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.copies: Sequence[Copy] = ()  # those of the piece that was in it last
        self.emptied: Any = None  # the event that their copies out are done


class StreamedPiece(NamedTuple):
    """A piece that always goes through the same buffer, so tables with its addresses stay right."""

    buffer: Buffer
    copies: list[Copy]  # in the order of their addresses on the host


class Ring:
    """The buffers of one optimizer on one device.

    Args:
        device: of the parameters.
        nbytes: of each buffer.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.nbytes, self.streams = nbytes, Streams(device)
        self.buffers = [
            Buffer(torch.empty(nbytes, dtype=torch.uint8, device=device)) for _ in range(BUFFERS)
        ]
        for buffer in self.buffers:
            self.streams.share(buffer.memory)
        # Others may have used the memory on this stream a moment ago.
        self.streams.wait(IN, self.streams.record(COMPUTE))
        self.next = 0
        self.pending = False  # whether copies out may be running

    def assign(self, pieces: Sequence[Piece]) -> list[StreamedPiece]:
        """Give each piece its buffer, in turn.

        The turn goes on from plan to plan. With `step_in_backward` a plan may have one piece alone,
        and would otherwise wait for the one before it.
        """
        assigned = []
        for piece in pieces:
            buffer = self.buffers[self.next]
            self.next = (self.next + 1) % BUFFERS
            copies = [Copy(run, buffer.memory) for run in piece.runs]
            copies.sort(key=lambda copy: copy.addresses.start)
            assigned.append(StreamedPiece(buffer, copies))
        return assigned

    def step(self, piece: StreamedPiece, update: Work) -> None:
        """Copy the piece in, update it, and copy it out.

        Args:
            piece: what `assign` returned.
            update: launches the update on the current stream.
        """
        streams, buffer = self.streams, piece.buffer
        for other in self.buffers:
            # The buffer has to be empty. Another one may still hold newer values of this state: of
            # the step before, or of a parameter that is listed twice. What was in a buffer before
            # its last piece is on the host: the last one was copied in after that.
            if other.emptied is not None and (
                other is buffer or _overlap(other.copies, piece.copies)
            ):
                streams.wait(IN, other.emptied)
        streams.run(IN, partial(copy_in, piece))
        streams.wait(COMPUTE, streams.record(IN))
        streams.run(COMPUTE, update)
        streams.wait(OUT, streams.record(COMPUTE))
        # Set before anything is enqueued: should it fail, nobody reads state without waiting.
        self.pending = True
        streams.run(OUT, partial(copy_out, piece))
        buffer.copies, buffer.emptied = piece.copies, streams.record(OUT)

    def finish(self) -> None:
        """Wait until all state is on the host."""
        if self.pending:
            self.streams.synchronize()
            self.pending = False


def copy_in(piece: StreamedPiece) -> None:
    for copy in piece.copies:
        copy.copy_in()


def copy_out(piece: StreamedPiece) -> None:
    for copy in piece.copies:
        copy.copy_out()


def _overlap(copies: Sequence[Copy], others: Sequence[Copy]) -> bool:
    """Whether some memory of the host is in both. State in disorder has a copy per parameter."""
    i, j = 0, 0
    while i < len(copies) and j < len(others):
        mine, theirs = copies[i].addresses, others[j].addresses
        if mine.stop <= theirs.start:
            i += 1
        elif theirs.stop <= mine.start:
            j += 1
        else:
            return True
    return False
