"""`host`: what a step costs in Python, against the number of tensors.

The tensors are too small to cost anything else. A result: {"tensors", "optimizer", "family",
"grads" ("kept" or "new"), "caches" ("cold" or "warm"), "step_us": statistic, "ns_per_parameter":
float (of the median, the fixed part included), "speedup": ratio of torch fused's time to this
one's, or null}.

"FusedAdamW triton, no launch" is the whole Python of the Triton path without its kernel launches.
"FusedAdamW DTensor" steps DTensors that one process holds whole: all that a shard costs but
communication.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from .harness.console import Progress, Table, spread, three_digits, times
from .harness.launches import no_interpreter, stubbed_launches
from .harness.optimizers import BASELINE, OURS, Case, OptimizerSpec, ours
from .harness.results import Record, Recorder, Result, unique
from .harness.session import Session
from .harness.timing import Samples, interleaved, ratio, statistic, synchronize
from .harness.workload import Instance, copy_params, instantiate, make_params, one_line, released

COUNTS, QUICK_COUNTS = (10, 100, 1000, 5000), (10, 100, 1000)
SECONDS, QUICK_SECONDS = 60.0, 10.0
NUMEL = 4  # elements per tensor
STUBBED = "FusedAdamW triton, no launch"
DTENSOR = "FusedAdamW DTensor"
WARM_UP = 3


@dataclass(frozen=True)
class Conditions:
    """What a timed step finds.

    new_grads: other gradient tensors every step, as after `zero_grad()` and `backward()`; flat
        buffers then have none in them, so that `flatten=True` has nothing to gain.
    warm: a step that is not timed comes before every timed one. Otherwise the steps of the other
        optimizers come before it, and have taken the processor's caches, as a forward and backward
        pass would have.
    """

    new_grads: bool = False
    warm: bool = False


def run(arguments: argparse.Namespace) -> int:
    """Time the host's part of a step; returns the exit code."""
    session = Session(arguments)
    specs, quick = session.timed_specs(), arguments.quick
    if arguments.dtensors:
        specs.append(dtensor_spec(arguments.backend or "auto"))
    counts = arguments.tensors or (QUICK_COUNTS if quick else COUNTS)
    seconds = arguments.seconds or (QUICK_SECONDS if quick else SECONDS)
    conditions = Conditions(arguments.grads == "new", arguments.caches == "warm")
    with session.measuring() as progress:
        measure(session.recorder, specs, session.case(), counts, seconds, conditions, progress)
    return session.finish(tables, arguments.check)


def stubbed_spec() -> OptimizerSpec:
    """Ours on Triton, to be stepped without launches."""
    spec = ours("triton", flatten=False)
    return OptimizerSpec(STUBBED, OURS, spec.make, clips=True)


def dtensor_spec(backend: str) -> OptimizerSpec:
    """Ours on DTensors."""
    return replace(ours(backend, flatten=False), name=DTENSOR)


@contextlib.contextmanager
def own_process_group() -> Iterator[None]:
    """End the process group that `as_dtensors` makes meanwhile, but never one of the caller."""
    there = distributed.is_initialized()
    try:
        yield
    finally:
        if not there and distributed.is_initialized():
            distributed.destroy_process_group()


def as_dtensors(params: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same parameters and gradients, cut into rows over one process, in a group that is made if
    there is none.
    """
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if not distributed.is_initialized():
        name = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(name, store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (1,))
    sharded: list[Tensor] = []
    for param in params:
        assert param.grad is not None
        shard = torch.nn.Parameter(DTensor.from_local(param.detach(), mesh, [Shard(0)]))
        shard.grad = DTensor.from_local(param.grad, mesh, [Shard(0)])
        sharded.append(shard)
    return sharded


class HostTimer:
    """Times one instance's steps, in seconds."""

    def __init__(self, instance: Instance, device: torch.device, conditions: Conditions) -> None:
        self.instance, self.device, self.warm = instance, device, conditions.warm
        self.stubbed = instance.spec.name == STUBBED
        # Two sets in turn: gradients of a new backward lie somewhere else than those of the last.
        self.grads = [
            [p.grad.clone() for p in instance.params if p.grad is not None]
            for _ in range(2 * conditions.new_grads)
        ]

    def measure(self) -> float:
        with stubbed_launches() if self.stubbed else contextlib.nullcontext():
            if self.warm:
                self._measure()
            return self._measure()

    def _measure(self) -> float:
        if self.grads:
            self._exchange_grads()
        synchronize(self.device)
        begin = time.perf_counter()
        self.instance.step()
        # On a GPU until everything is queued, not until it is done.
        seconds = time.perf_counter() - begin
        synchronize(self.device)
        return seconds

    def _exchange_grads(self) -> None:
        grads: list[Tensor] = self.grads.pop(0)
        for param, grad in zip(self.instance.params, grads, strict=True):
            param.grad = grad
        self.grads.append(grads)


def make_timers(
    specs: Sequence[OptimizerSpec],
    tensors: int,
    case: Case,
    conditions: Conditions,
    recorder: Recorder,
) -> dict[str, HostTimer]:
    """One per optimizer that can be made and survives its first steps; the others are left out with
    the reason.
    """
    source = make_params([(NUMEL,)] * tensors, case)
    timers: dict[str, HostTimer] = {}
    for spec in specs:
        try:
            params = copy_params(source)
            instance = instantiate(
                spec, as_dtensors(params, case.device) if spec.name == DTENSOR else params, case
            )
            if isinstance(instance, str):
                recorder.leave_out(spec.name, instance)
                continue
            timer = HostTimer(instance, case.device, conditions)
            for _ in range(WARM_UP):
                timer.measure()
        except Exception as error:  # another project's step may fail however it likes
            recorder.leave_out(spec.name, one_line(error), failed=spec.family == OURS)
        else:
            timers[spec.name] = timer
    return timers


def measure(
    recorder: Recorder,
    specs: Sequence[OptimizerSpec],
    case: Case,
    counts: Sequence[int],
    seconds: float,
    conditions: Conditions,
    progress: Progress,
) -> None:
    """Time every optimizer at every count, interleaved. seconds: in all."""
    specs = [*specs]
    reason = no_interpreter() if case.device.type == "cpu" else None
    if reason:
        recorder.leave_out(STUBBED, reason)
    else:
        specs.append(stubbed_spec())
    families = {spec.name: spec.family for spec in specs}
    for number, tensors in enumerate(counts):
        progress(f"{tensors} tensors", number / len(counts))
        samples: Samples = {}
        with own_process_group(), released():
            timers = make_timers(specs, tensors, case, conditions, recorder)
            measures: dict[str, Callable[[], float]] = {n: t.measure for n, t in timers.items()}
            try:
                interleaved(measures, seconds / len(counts), max_rounds=1000, samples=samples)
            finally:  # whole rounds outlive an interrupt
                recorder.results += results(samples, families, tensors, conditions)


def results(
    samples: Samples, families: dict[str, str], tensors: int, conditions: Conditions
) -> list[Result]:
    """What one interleaved run gave."""
    measured = []
    for name, seconds in samples.items():
        if not seconds:
            continue  # interrupted before the first round ended
        step_us = statistic([s * 1e6 for s in seconds])
        measured.append(
            {
                "tensors": tensors,
                "optimizer": name,
                "family": families[name],
                "grads": "new" if conditions.new_grads else "kept",
                "caches": "warm" if conditions.warm else "cold",
                "step_us": step_us,
                "ns_per_parameter": step_us["median"] * 1e3 / tensors,
                "speedup": ratio(samples[BASELINE], seconds) if BASELINE in samples else None,
            }
        )
    return measured


def tables(record: Record) -> list[Table]:
    """Python time per step, per parameter, and against torch fused."""
    measured: list[Result] = record["results"]
    counts = unique(measured, "tensors")
    cells = {(result["optimizer"], result["tensors"]): result for result in measured}

    def table(title: str, cell: Callable[[Result], str]) -> Table:
        rows: list[list[str]] = []
        for name in unique(measured, "optimizer"):
            row = [cells.get((name, count)) for count in counts]
            rows.append([name, *("-" if result is None else cell(result) for result in row)])
        return Table(title, ["optimizer", *(f"{count} tensors" for count in counts)], [*rows])

    new = measured[0]["grads"] == "new"
    grads = "new gradient tensors per step" if new else "the same gradient tensors every step"
    title = f"us per step ({grads}, {measured[0]['caches']} caches)"
    steps = table(title, lambda result: spread(result["step_us"]))
    steps.columns = [*steps.columns, "first to last"]
    lines = [
        line([cells[row[0], count] for count in counts if (row[0], count) in cells])
        for row in steps.rows
    ]
    steps.rows = [[*row, text] for row, text in zip(steps.rows, lines, strict=True)]
    return [
        steps,
        table("ns per parameter", lambda result: three_digits(result["ns_per_parameter"])),
        table("times as fast as torch fused", lambda result: times(result["speedup"])),
    ]


def line(measured: Sequence[Result]) -> str:
    """The line through the first and the last count: us for no tensor, and per tensor."""
    first, last = measured[0], measured[-1]
    if first is last:
        return "-"
    rise = last["step_us"]["median"] - first["step_us"]["median"]
    slope = rise / (last["tensors"] - first["tensors"])
    return f"{first['step_us']['median'] - slope * first['tensors']:,.0f} + {slope:.3f} n"
