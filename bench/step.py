"""`step`: how long a whole step takes on a model's parameters, and how far that is from the
memory's limit.

A result:
    model, tensors, parameters, dtype, grad_dtype, amsgrad, clip, optimizer, family
    mode           "eager" or "graph"
    step_ms        statistic
    speedup        ratio of torch fused's time to this one's, or null
    pairs          name of each variant of ours -> ratio of this one's time to that variant's
    held_bytes     state per parameter, step counters not counted
    moved_bytes    per parameter: what a perfect step with this state reads and writes
    gb_per_s       statistic of moved bytes over time
    copy_gb_per_s  statistic of `copy_` of a large buffer in the same rounds
    share_of_copy  ratio of the two
    move_gb_per_s  as copy_gb_per_s, of a kernel with the update's accesses and no arithmetic; null
    on a CPU ceiling_gb_per_s   the one of the two whose median is higher share_of_ceiling   ratio
    of gb_per_s to it gate           {"error", "allowed", "rms", "allowed_rms"}: see `parity.py`
    buffer_sets    how many sets of parameters, gradients and state are stepped on in turn
    resident       false: memory does not hold all optimizers at once, so each is made anew for
        every turn

An optimizer that memory does not hold even alone is left out, and the others are measured.

`mode` eager: Python, launches and the device's work. graph: the device's work alone, by replay of a
    CUDA graph.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .harness.machine import cache_bytes, free_bytes
from .harness.optimizers import BASELINE, OURS, Case, OptimizerSpec
from .harness.parity import Parity, judge
from .harness.results import Recorder
from .harness.shapes import Shape, numel
from .harness.timing import (
    COPY_BYTES,
    Bandwidth,
    CopyBandwidth,
    give_back_memory,
    interleaved,
    ratio,
    seconds_of,
    statistic,
    warm_up_seconds,
)
from .harness.workload import Instance, copy_params, instantiate, make_params, one_line, released

MODES = ("eager", "graph")
COPY, MOVE = "copy", "the update's accesses"
WARM_UP = 2
TURNS, STEPS_PER_TURN = 5, 3
# Making an optimizer anew has kept a GPU busy already: its clocks need no whole second of steps.
TURN_WARM_UP = 0.25
# Between two steps on one set of buffers this many times the last cache goes by.
CACHES = 3
MOST_SETS = 32
# What may be taken of the memory that is free.
SHARE = 0.9
SEGMENT_BYTES = 1 << 30
# On a GPU steps queue up behind each other for this long, so that starting and ending do not count.
QUEUE_SECONDS = 0.01


@dataclass
class Job:
    """One model under one case and mode, and what is known of its optimizers."""

    model: str
    shapes: Sequence[Shape]
    case: Case
    mode: str
    families: dict[str, str] = field(default_factory=dict)
    gates: dict[str, Parity] = field(default_factory=dict)
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
        }


def one_bytes(spec: OptimizerSpec, job: Job) -> float:
    """Memory that one optimizer with its parameters and gradients takes while it steps; state as
    torch's.
    """
    param, grad = job.case.dtype.itemsize, job.case.grad_dtype.itemsize
    state = (3 if job.case.options.amsgrad else 2) * param
    elements = numel(job.shapes)
    # Random numbers are drawn in float32; flat buffers are filled a segment at a time.
    moment = min(elements * (param + grad), SEGMENT_BYTES) + 4 * max(map(math.prod, job.shapes))
    return elements * (param + grad + state + spec.scratch * param) + moment


def limit_bytes(device: torch.device) -> int:
    """Memory of what bandwidths are held against: two buffers to copy, on a GPU as much again for
    the accesses.
    """
    return (2 if device.type == "cpu" else 4) * COPY_BYTES


def fitting(specs: Sequence[OptimizerSpec], job: Job, recorder: Recorder) -> list[OptimizerSpec]:
    """Those that memory holds, each alone; the others are left out with the reason.

    Raises MemoryError if it does not hold any.
    """
    device, free = job.case.device, free_bytes(job.case.device)
    need = {spec.name: one_bytes(spec, job) + limit_bytes(device) for spec in specs}
    fit = [spec for spec in specs if not free or need[spec.name] <= SHARE * free]

    def text(number: float) -> str:
        return (
            f"needs {number / 1e9:,.1f} GB on {device.type} for one optimizer, {free / 1e9:,.1f} GB are free; "
            f"try a shard ({job.model.partition('/')[0]}/64)"
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
            for _ in range(WARM_UP):
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


def make_turns(
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


def passing(specs: Sequence[OptimizerSpec], job: Job, recorder: Recorder) -> list[OptimizerSpec]:
    """Those that pass the gate; the others are left out with the reason."""
    passed = []
    for spec in specs:
        ours = spec.family == OURS
        if job.mode == "graph" and not spec.captures:
            recorder.leave_out(
                spec.name, "its step cannot be captured in a CUDA graph", **place(job)
            )
            continue
        try:
            verdict = judge(spec, job.case)
        except Exception as error:  # another project's step may fail however it likes
            recorder.leave_out(spec.name, one_line(error), failed=ours, **place(job))
            continue
        if isinstance(verdict, str):
            recorder.leave_out(spec.name, verdict)
        elif not verdict.passed:
            recorder.leave_out(spec.name, verdict.text, failed=ours, **place(job))
        else:
            job.gates[spec.name], job.families[spec.name] = verdict, spec.family
            passed.append(spec)
    return passed


def place(job: Job) -> dict[str, Any]:
    """Where an optimizer was left out."""
    return {"model": job.model, "dtype": job.words["dtype"], "mode": job.mode}


def measure(
    recorder: Recorder,
    specs: Sequence[OptimizerSpec],
    job: Job,
    seconds: float,
    progress: Callable[[str, float], None],
) -> None:
    """Measure every optimizer on one model, interleaved, and record it. Raises MemoryError."""
    progress(f"{job.model} {job.words['dtype']} {job.mode}: parity gate", 0.0)
    if job.mode == "graph":
        job.case = replace(job.case, options=replace(job.case.options, capturable=True))
    chosen = passing(specs, job, recorder)
    chosen = fitting(chosen, job, recorder)
    if not chosen:
        return
    resident, sets = residency(chosen, job)
    progress(f"{job.model} {job.words['dtype']} {job.mode}", 0.0)

    def on_round(share: float) -> None:
        progress(f"{job.model} {job.words['dtype']} {job.mode}", share)

    with released():
        run = measure_resident if resident else measure_in_turns
        rates, limits = run(chosen, job, sets, seconds, recorder, on_round)
    recorder.results += results(rates, limits, job, sets, resident)


def leave_out(name: str, error: Exception, job: Job, recorder: Recorder) -> None:
    """Record why an optimizer has no time: ours failed, unless memory was full or a graph could not
    be captured.
    """
    refused = job.mode == "graph" or isinstance(error, torch.OutOfMemoryError)
    ours = job.families.get(name) == OURS
    recorder.leave_out(name, one_line(error), failed=ours and not refused, **place(job))


def make_limits(job: Job, recorder: Recorder) -> dict[str, Bandwidth]:
    """What bandwidths are held against here."""
    device = job.case.device
    limits: dict[str, Bandwidth] = {COPY: CopyBandwidth(device)}
    if device.type != "cpu":
        try:
            from .harness.stream import AccessBandwidth  # imports triton

            limits[MOVE] = AccessBandwidth(device, COPY_BYTES // 8)
        except Exception as error:  # a copy is a limit too
            leave_out(MOVE, error, job, recorder)
    return limits


def try_turns(
    spec: OptimizerSpec, sets: Sequence[list[torch.Tensor]], job: Job, recorder: Recorder
) -> BufferRotation | None:
    """As `make_turns`; a reason is recorded, and memory is given back."""
    turns: BufferRotation | str | None = None
    try:
        turns = make_turns(spec, sets, job)
    except Exception as error:
        leave_out(spec.name, error, job, recorder)
    if turns is None:
        give_back_memory()  # the error, which held on to it, is gone
        return None
    if isinstance(turns, str):
        recorder.leave_out(spec.name, turns, **place(job))
        return None
    return turns


Times = dict[str, list[float]]


def measure_resident(
    specs: Sequence[OptimizerSpec],
    job: Job,
    sets: int,
    seconds: float,
    recorder: Recorder,
    on_round: Callable[[float], None],
) -> tuple[Times, Times]:
    """All optimizers in memory at once: A B C, A B C, a step each. Times of optimizers, and rates
    of limits.
    """
    sources = [make_params(job.shapes, job.case, seed) for seed in range(sets)]
    turns: dict[str, BufferRotation] = {}
    for spec in specs:
        made = try_turns(spec, [copy_params(params) for params in sources], job, recorder)
        if made is not None:
            turns[spec.name] = made
    del sources, made
    limits = make_limits(job, recorder)

    def on_error(name: str, error: Exception) -> None:
        if name not in turns:
            raise error
        leave_out(name, error, job, recorder)
        del turns[name]

    samples = interleaved(
        {
            **{name: lambda name=name: turns[name].measure() for name in turns},  # type: ignore[misc]
            **{name: limit.measure for name, limit in limits.items()},
        },
        seconds,
        on_round=on_round,
        warm_up=warm_up_seconds(job.case.device),
        on_error=on_error,
    )
    return {name: samples[name] for name in turns}, {
        name: list(map(limit.gb_per_s, samples[name])) for name, limit in limits.items()
    }


def measure_in_turns(
    specs: Sequence[OptimizerSpec],
    job: Job,
    sets: int,
    seconds: float,
    recorder: Recorder,
    on_round: Callable[[float], None],
) -> tuple[Times, Times]:
    """One optimizer in memory at a time, made anew for every turn: A B C, A B C, some steps each.
    As above.
    """
    times: Times = {spec.name: [] for spec in specs}
    rates: Times = {}
    begin = time.monotonic()
    for done in range(1, TURNS + 1):
        for spec in specs:
            if spec.name in times:
                with released():
                    taken = take_turn(spec, job, recorder)
                if taken is None:
                    del times[spec.name]
                else:
                    times[spec.name].append(taken)
        with released():
            for name, limit in make_limits(job, recorder).items():
                rates.setdefault(name, []).append(limit.gb_per_s(limit.measure()))
        on_round(done / TURNS)
        if done >= 2 and time.monotonic() - begin > seconds:
            break
    # A limit that did not fit in every turn has no pair in some.
    return times, {name: own for name, own in rates.items() if len(own) == done}


def take_turn(spec: OptimizerSpec, job: Job, recorder: Recorder) -> float | None:
    """Seconds per step of an optimizer that is made for this turn; None if it has none, and the
    reason is recorded.
    """
    try:
        turns = try_turns(spec, [make_params(job.shapes, job.case)], job, recorder)
        if turns is None:
            return None
        begin = time.monotonic()
        while job.case.device.type != "cpu" and time.monotonic() - begin < TURN_WARM_UP:
            turns.measure()
        return statistics.median(turns.measure() for _ in range(STEPS_PER_TURN))
    except Exception as error:
        leave_out(spec.name, error, job, recorder)
        return None


def results(
    times: Times, rates: Times, job: Job, sets: int, resident: bool
) -> list[dict[str, Any]]:
    """What one interleaved run gave: `times` of optimizers, `rates` in GB/s of what they are held
    against.
    """
    found = []
    copies, moves = rates[COPY], rates.get(MOVE)
    ceilings = max(rates.values(), key=statistics.median)
    ours = [name for name in times if job.families[name] == OURS]
    for name, own in times.items():
        reached = [job.moved[name] * numel(job.shapes) / seconds / 1e9 for seconds in own]
        found.append(
            {
                **job.words,
                "optimizer": name,
                "family": job.families[name],
                "mode": job.mode,
                "step_ms": statistic([seconds * 1e3 for seconds in own]),
                "speedup": ratio(times[BASELINE], own) if BASELINE in times else None,
                "pairs": {other: ratio(own, times[other]) for other in ours if other != name},
                "held_bytes": job.held[name],
                "moved_bytes": job.moved[name],
                "gb_per_s": statistic(reached),
                "copy_gb_per_s": statistic(copies),
                "share_of_copy": ratio(reached, copies),
                "move_gb_per_s": statistic(moves) if moves else None,
                "ceiling_gb_per_s": statistic(ceilings),
                "share_of_ceiling": ratio(reached, ceilings),
                "gate": asdict(job.gates[name]),
                "buffer_sets": sets,
                "resident": resident,
            }
        )
    return found
