"""Cuts a launch group into pieces whose state fits one buffer on the device.

With `state_device="cpu"` a step works on one piece after the other. This file decides which
elements each piece has, which host memory is copied for it, and where in the buffer that lies. It
copies and launches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..plan import CoalescedRows, Launch
from ..precision import CODED, GROUP, GROUPED, EntrySpec
from ..state.memory import Slot, align

# Large rows are cut at multiples of this many elements: whole blocks of a launch, so no program has
# less to do than its neighbours, and whole groups, so no scale belongs to two pieces.
CUT = 1024
# Runs begin on a whole line of the device's memory. 16 bytes are what vector accesses need.
RUN_ALIGN = 128
# Kernels split the number of a draw, which serves 4 or 8 elements, into two words of 32 bits. Parts
# that span no multiple of this many elements have one high word each: see `advanced_offset`.
HIGH_WORD = 1 << 34
# Pieces follow the order of these on the host, so that neighbours are copied together.
FIRST_MOMENTS = ("exp_avg", CODED["exp_avg"][0])


@dataclass(slots=True, eq=False)
class Run:
    """Elements `start` to `end` of a segment on the host, copied as one.

    `offset` is where they lie in the buffer, in bytes.
    """

    segment: Tensor
    start: int
    end: int
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return (self.end - self.start) * self.segment.element_size()


class InRun(NamedTuple):
    """Where one operand of a part begins: so many elements after the start of a run."""

    run: Run
    skipped: int

    @property
    def offset(self) -> int:
        """Bytes from the start of the buffer."""
        return self.run.offset + self.skipped * self.run.segment.element_size()


@dataclass(slots=True, eq=False)
class Part:
    """Elements of one span that a piece updates."""

    launch: int  # the number of the launch within its group
    span: CoalescedRows
    start: int  # a multiple of CUT, counted from the start of the span
    numel: int
    state: dict[str, InRun]


@dataclass(slots=True, eq=False)
class Piece:
    """What is updated together, and the runs that are copied for it."""

    parts: list[Part]
    runs: list[Run]


def state_bytes(entries: Iterable[tuple[str, EntrySpec]], numel: int) -> int:
    """Bytes that the state of one parameter takes in buffers, however it is cut.

    Args:
        entries: names and specs of its state.
        numel: elements of the parameter, a complex one counting two.
    """
    sizes = [
        align(numel) // (GROUP if key in GROUPED else 1) * spec.dtype.to_real().itemsize
        for key, spec in entries
    ]
    return sum(sizes) + RUN_ALIGN * len(sizes)


def cut(launches: Sequence[Launch], capacity: int) -> list[Piece]:
    """Cut what these launches update into pieces, in the order of the state on the host.

    Every piece but the last fills its buffer, whatever the sizes of the parameters.

    Args:
        launches: those of one launch group.
        capacity: bytes of a buffer.
    """
    spans = [(number, span) for number, launch in enumerate(launches) for span in launch.spans]
    spans.sort(key=lambda item: _place(item[1]))
    filling = _Filling(capacity)
    pieces: list[Piece] = []
    for number, span in spans:
        start = 0
        while start < span.numel:
            numel = filling.room(span, start)
            if not numel:
                pieces.append(filling.piece())
                filling = _Filling(capacity)
                continue
            filling.add(number, span, start, numel)
            start += numel
    if filling.parts:
        pieces.append(filling.piece())
    return pieces


def _place(span: CoalescedRows) -> int:
    """The address of the span's first moments on the host."""
    slots = map(span.first.slots.get, FIRST_MOMENTS)
    return next(slot.address for slot in slots if slot)


def _state(span: CoalescedRows) -> list[tuple[str, Slot, int]]:
    """Per entry of the state: its name, slot, and how many elements share one of its."""
    first = span.first
    return [
        (key, slot, GROUP if key in GROUPED else 1)
        for key in first.entries
        if (slot := first.slots[key]) is not None
    ]


class _Filling:
    """A piece that is being filled."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0  # `used` counts one RUN_ALIGN too much per run
        self.parts: list[Part] = []
        self.runs: list[Run] = []
        self.last: dict[int, Run] = {}  # id of a segment -> the run that may be continued

    def room(self, span: CoalescedRows, start: int) -> int:
        """How many elements from `start` on fit.

        Raises ValueError if an empty buffer is too small.
        """
        state = _state(span)
        group_bytes = sum(
            slot.segment.element_size() * (GROUP // share) for _, slot, share in state
        )
        free = self.capacity - self.used - RUN_ALIGN * len(state)
        fitting = max(free, 0) // group_bytes * GROUP
        left = min(span.numel - start, HIGH_WORD - start % HIGH_WORD)
        numel = left if align(left) <= fitting else fitting // CUT * CUT
        if not numel and not self.parts:
            raise ValueError(
                f"a buffer of {self.capacity} bytes is too small for the state of {CUT} elements"
            )
        return numel

    def add(self, launch: int, span: CoalescedRows, start: int, numel: int) -> None:
        state = {
            key: self._in_run(slot, start // share, align(numel) // share)
            for key, slot, share in _state(span)
        }
        self.parts.append(Part(launch, span, start, numel, state))

    def _in_run(self, slot: Slot, skipped: int, count: int) -> InRun:
        """Add elements of a slot to the run that they continue, or to a new one."""
        start = slot.start + skipped
        run = self.last.get(id(slot.segment))
        if run is None or run.end != start:
            run = self.last[id(slot.segment)] = Run(slot.segment, start, start)
            self.runs.append(run)
            self.used += RUN_ALIGN
        run.end += count
        self.used += count * slot.segment.element_size()
        return InRun(run, start - run.start)

    def piece(self) -> Piece:
        """The piece, with its runs one behind the other in the buffer."""
        offset = 0
        for run in self.runs:
            run.offset = offset
            offset += -(-run.nbytes // RUN_ALIGN) * RUN_ALIGN
        return Piece(self.parts, self.runs)


def advanced_offset(global_offset: int, start: int, share: int) -> int:
    """The offset that gives elements from `start` on the random bits that they have anyway.

    A part of a row counts its elements from zero, so its key begins `start` elements later. Kernels
    add the offset's draw to the element's in two words of 32 bits, with nothing carried between
    them, and so does this.

    Args:
        global_offset: of the whole row.
        start: a multiple of GROUP.
        share: how many elements share a draw: 4 or 8.
    """
    draw, more = global_offset // share, start // share
    low, high = (draw + more) & 0xFFFFFFFF, (draw >> 32) + (more >> 32)
    return ((high << 32) + low) * share + global_offset % share
