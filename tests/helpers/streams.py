"""Streams of a device, simulated: whatever is enqueued runs later, in any order that is allowed.

A CPU stands in for the device. Its launches and copies are done at once, so nothing that a real
device may reorder would ever be out of order. Here each queue runs in order, and which queue goes
next is drawn at random. Only events hold a queue back.
"""

from __future__ import annotations

import random
from collections import deque
from typing import ClassVar

import torch

from fused_adam import arguments
from fused_adam.backends import streaming, triton
from fused_adam.backends.streaming import COMPUTE, IN, OUT
from fused_adam.state import arena


class Event:
    """Happens when its queue gets to it."""

    happened = False


class ShuffledStreams:
    """Stands in for `streaming.Streams`.

    Asserts that no buffer is overwritten before its copy out, that no launch comes before its copy
    in, and that no copy out comes before its launch.
    """

    random: ClassVar = random.Random(0)
    ignored: ClassVar[tuple[str, ...]] = ()  # queues that wait for nothing, to see what goes wrong
    log: ClassVar[list[tuple[str, int, int]]] = []  # what ran: queue, number of buffer, bytes
    synchronized: ClassVar = 0  # how often the host has waited

    def __init__(self, device: torch.device) -> None:
        self.queues = {queue: deque() for queue in (IN, COMPUTE, OUT)}
        self.piece = None  # of the last copy in that was enqueued
        self.stages: dict[int, tuple[str, int]] = {}  # id of a buffer -> what it is, of which piece
        self.buffers: list[int] = []

    def run(self, queue, work):
        if queue == IN:
            (self.piece,) = work.args
        piece = self.piece
        self.queues[queue].append(lambda: self._run(queue, piece, work))

    def _run(self, queue, piece, work):
        key = id(piece.buffer)
        if key not in self.buffers:
            self.buffers.append(key)
        before = {IN: "empty", COMPUTE: "filled", OUT: "updated"}[queue]
        after = {IN: "filled", COMPUTE: "updated", OUT: "empty"}[queue]
        stage, holds = self.stages.get(key, ("empty", None))
        assert stage == before, f"{queue} of a buffer that is {stage}"
        assert queue == IN or holds == id(piece)
        self.stages[key] = after, id(piece)
        copied = 0 if queue == COMPUTE else sum(len(copy.addresses) for copy in piece.copies)
        ShuffledStreams.log.append((queue, self.buffers.index(key), copied))
        work()

    def record(self, queue):
        event = Event()
        self.queues[queue].append(lambda: setattr(event, "happened", True))
        return event

    def wait(self, queue, event):
        if queue not in self.ignored:
            self.queues[queue].append(event)

    def share(self, memory):
        """Nothing to do: memory of a CPU is freed when nothing refers to it."""

    def synchronize(self):
        ShuffledStreams.synchronized += 1
        self.drain(OUT)

    def drain(self, queue):
        """Run until this queue is empty. Others may be behind, or ahead."""
        # Some runs favour one queue all along: random choices would hardly ever starve another.
        weights = {name: self.random.choice([1, 1, 50]) for name in self.queues}
        while self.queues[queue]:
            ready = [name for name, items in self.queues.items() if items and _is_ready(items[0])]
            (name,) = self.random.choices(ready, [weights[name] for name in ready])
            item = self.queues[name].popleft()
            if not isinstance(item, Event):
                item()


def _is_ready(item):
    return not isinstance(item, Event) or item.happened


def simulate(monkeypatch, seed=0):
    """Let a CPU be a device with memory and streams of its own, and return what was simulated."""
    monkeypatch.setattr(arena, "is_apart", lambda device: True)
    monkeypatch.setattr(arena, "pinned_zeros", host_zeros)
    monkeypatch.setattr(arguments, "LEAST_STREAM_BYTES", 1)
    monkeypatch.setattr(streaming, "Streams", ShuffledStreams)
    for name, value in {
        "random": random.Random(seed),
        "log": [],
        "synchronized": 0,
        "ignored": (),
    }.items():
        monkeypatch.setattr(ShuffledStreams, name, value)
    run = triton.StreamedUpdates.run

    def run_all(self, rows, scalars):
        run(self, rows, scalars)
        # All else is done at once, as if it had been enqueued on this stream and done by now.
        self.ring.streams.drain(COMPUTE)

    monkeypatch.setattr(triton.StreamedUpdates, "run", run_all)
    return ShuffledStreams


def host_zeros(numel, *, dtype, device, asked):
    """Memory that is not pinned: there is no device to pin it for."""
    return torch.zeros(numel, dtype=dtype, device=device)
