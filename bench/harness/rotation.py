"""What memory holds of a job's optimizers, and their steps over sets of buffers in rotation.

Between two steps on one set of buffers so much else is read that caches are cold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import timing
from .machine import cache_bytes, free_bytes
from .optimizers import Case, OptimizerSpec
from .results import Recorder
from .shapes import Shape, numel
from .timing import seconds_of
from .workload import Instance, Parity, instantiate

# Steps before the clock starts; `--quick` asks for less.
WARM_UP, QUICK_WARM_UP = 2, 1
# Between two steps on one set of buffers this many times the last cache goes by.
CACHES = 3
MOST_SETS = 32
# What may be taken of the memory that is free.
SHARE = 0.9
SEGMENT_BYTES = 1 << 30
# On a GPU steps queue up behind each other for this long: in training the host is ahead too.
QUEUE_SECONDS = 0.05


@dataclass
class Job:
    """One model under one case and mode, and what is known of its optimizers."""

    model: str
    shapes: Sequence[Shape]
    case: Case
    mode: str
    quick: bool = False
    families: dict[str, str] = field(default_factory=dict)
    parities: dict[str, Parity] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)

    @property
    def words(self) -> dict[str, Any]:
        """What is measured, as results have it."""
        case = self.case
        return {
            "model": self.model,
            "tensors": len(self.shapes),
            "parameters": numel(self.shapes),
            "dtype": str(case.dtype).removeprefix("torch."),
            "grad_dtype": str(case.grad_dtype).removeprefix("torch."),
            "amsgrad": case.options.amsgrad,
            "clip": case.options.clip,
            "ema": case.options.ema_decay,
        }


def one_bytes(spec: OptimizerSpec, job: Job) -> float:
    """Memory that one optimizer with its parameters and gradients takes while it steps; state as
    torch's.
    """
    param, grad = job.case.dtype.itemsize, job.case.grad_dtype.itemsize
    state = (3 if job.case.options.amsgrad else 2) * param
    if job.case.options.ema_decay is not None:
        state += max(4, param)
    elements = numel(job.shapes)
    # Random numbers are drawn in float32; flat buffers are filled a segment at a time.
    moment = min(elements * (param + grad), SEGMENT_BYTES) + 4 * max(map(math.prod, job.shapes))
    return elements * (param + grad + state + spec.scratch * param) + moment


def limit_bytes(device: torch.device) -> int:
    """Memory of the limits: two buffers to copy, on a GPU as much again for the accesses."""
    return (2 if device.type == "cpu" else 4) * timing.COPY_BYTES


def fitting(specs: Sequence[OptimizerSpec], job: Job, recorder: Recorder) -> list[OptimizerSpec]:
    """Those that memory holds, each alone; the others are left out with the reason.

    Raises MemoryError if it does not hold any.
    """
    device, free = job.case.device, free_bytes(job.case.device)
    need = {spec.name: one_bytes(spec, job) + limit_bytes(device) for spec in specs}
    fit = [spec for spec in specs if not free or need[spec.name] <= SHARE * free]

    def text(number: float) -> str:
        return (
            f"needs {number / 1e9:,.1f} GB on {device.type} for one optimizer, "
            f"{free / 1e9:,.1f} GB are free; try a shard ({job.model.partition('/')[0]}/64)"
        )

    if specs and not fit:
        raise MemoryError(f"{job.model} in {job.words['dtype']} {text(min(need.values()))}")
    for spec in specs:
        if spec not in fit:
            recorder.leave_out(spec.name, text(need[spec.name]), **place(job))
    return fit


def residency(specs: Sequence[OptimizerSpec], job: Job) -> tuple[bool, int]:
    """Whether memory holds all optimizers at once, and how many sets of buffers each gets so that
    caches are cold.
    """
    device, free = job.case.device, free_bytes(job.case.device)
    need = [one_bytes(spec, job) for spec in specs]
    largest = max(need) + limit_bytes(device)
    # What goes by between two steps on one set. On a GPU, where an optimizer's steps queue up, that
    # is its other sets alone: of each at least parameters and gradients. On a CPU every other
    # optimizer and the copy have their turn.
    between = (
        largest
        if device.type == "cpu"
        else numel(job.shapes) * (job.case.dtype.itemsize + job.case.grad_dtype.itemsize)
    )
    sets = min(MOST_SETS, max(1, math.ceil(CACHES * cache_bytes(device) / max(1.0, between))))
    while sets > 1 and free and sets * sum(need) + largest > SHARE * free:
        sets -= 1
    return not free or sets * sum(need) + largest <= SHARE * free, sets


class BufferRotation:
    """The sets of buffers of one optimizer, one step on each in turn."""

    def __init__(self, instances: Sequence[Instance], job: Job) -> None:
        self.instances = instances
        self.device = job.case.device
        self.calls = [capture(c) if job.mode == "graph" else c.step for c in instances]
        for call in self.calls:
            for _ in range(QUICK_WARM_UP if job.quick else WARM_UP):
                call()
        self.order = self._cycle()
        self.repeats = 1
        if self.device.type != "cpu":
            once = seconds_of(next(self.order), self.device)
            self.repeats = max(1, min(200, math.ceil(QUEUE_SECONDS / once)))

    def _cycle(self) -> Iterator[Callable[[], object]]:
        while True:
            yield from self.calls

    def measure(self) -> float:
        """Seconds per step."""
        if self.repeats == 1:
            return seconds_of(next(self.order), self.device)
        return seconds_of(lambda: next(self.order)(), self.device, self.repeats)


def capture(instance: Instance) -> Callable[[], object]:
    """The step as a CUDA graph; returns its replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            instance.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        instance.step()
    replay: Callable[[], object] = graph.replay
    return replay


def make_rotation(
    spec: OptimizerSpec, sets: Sequence[list[torch.Tensor]], job: Job
) -> BufferRotation | str:
    """One optimizer over every set of buffers, warmed up; or the reason why not."""
    instances = []
    for params in sets:
        instance = instantiate(spec, params, job.case)
        if isinstance(instance, str):
            return instance
        instances.append(instance)
    turns = BufferRotation(instances, job)
    first = instances[0]
    job.held[spec.name] = first.state_bytes() / first.numel
    job.moved[spec.name] = first.moved_bytes(job.case.options.clip is not None) / first.numel
    return turns


def place(job: Job) -> dict[str, Any]:
    """Where an optimizer was left out."""
    return {"model": job.model, "dtype": job.words["dtype"], "mode": job.mode}
