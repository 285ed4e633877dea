"""`step`: how long a whole step takes on a model's parameters, and how far that is from the
memory's limit.

A result:
    model, tensors, parameters, dtype, grad_dtype, amsgrad, clip, ema, optimizer, family
    mode           "eager": Python, launches and the device's work
                   "graph": the device's work alone, by replay of a CUDA graph
    step_ms        statistic
    speedup        ratio of torch fused's time to this one's, or null
    pairs          name of each variant of ours -> ratio of this one's time to that variant's
    held_bytes     state and averages per parameter, step counters not counted
    moved_bytes    per parameter: what a perfect step with this state reads and writes
    gb_per_s       statistic of moved bytes over time
    copy_gb_per_s  statistic of `copy_` of a large buffer in the same rounds
    share_of_copy  ratio of the two
    move_gb_per_s  as copy_gb_per_s, of a kernel with the update's accesses and no arithmetic; null
                   on a CPU
    ceiling_gb_per_s   the one of the two whose median is higher
    share_of_ceiling   ratio of gb_per_s to it
    gate           the parity check: {"error", "allowed", "rms", "allowed_rms"}, see `Parity`
    buffer_sets    how many sets of parameters, gradients and state are stepped on in turn
    resident       false: memory does not hold all optimizers at once, so each is made anew for
                   every turn

An optimizer that memory does not hold even alone is left out, and the others are measured.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from .harness import timing
from .harness.console import Progress, Table, exact_bytes, spread, three_digits, times
from .harness.optimizers import BASELINE, OURS, OptimizerSpec
from .harness.results import Record, Recorder, Result, case_title
from .harness.rotation import BufferRotation, Job, fitting, make_rotation, place, residency
from .harness.session import Session
from .harness.shapes import numel
from .harness.timing import (
    Bandwidth,
    CopyBandwidth,
    Samples,
    give_back_memory,
    interleaved,
    ratio,
    statistic,
    warm_up_seconds,
)
from .harness.workload import check_parity, copy_params, make_params, one_line, released

MODES = ("eager", "graph")
COPY, MOVE = "copy", "the update's accesses"
SECONDS = 60.0
# `--quick` promises a minute. Importing torch and showing tables take the rest of it.
QUICK_SECONDS, QUICK_LIMIT = 10.0, 45.0
# A step of 2000 tensors takes seconds where others keep the cores busy, so `--quick` asks for less.
LEAST_ROUNDS, QUICK_LEAST_ROUNDS = 3, 2
TURNS, STEPS_PER_TURN = 5, 3
# Making an optimizer anew has kept a GPU busy already: its clocks need no whole second of steps.
TURN_WARM_UP = 0.25


def run(arguments: argparse.Namespace) -> int:
    """Time whole steps on models' parameters; returns the exit code."""
    session = Session(arguments)
    quick = arguments.quick
    models = session.models(["many-small", "resnet50"] if quick else ["gpt2", "many-small"])
    specs, case = session.timed_specs(), session.case()
    if quick and busy():
        specs = without_compiled(specs, arguments, session.recorder)
    modes = MODES if session.device.type == "cuda" else MODES[:1]
    jobs = [
        Job(name, shapes, case, mode, quick) for name, shapes in models.items() for mode in modes
    ]
    seconds = (arguments.seconds or (QUICK_SECONDS if quick else SECONDS)) / len(jobs)
    with session.measuring() as progress:
        for number, job in enumerate(jobs):
            left = session.seconds_left(QUICK_LIMIT) if quick else math.inf
            if number and left <= 0:
                reason = f"no time left of {QUICK_LIMIT:.0f} s: this machine is busy or slow"
                session.recorder.leave_out(job.model, reason, mode=job.mode)
                continue
            measure(session.recorder, specs, job, min(seconds, left / 2), progress)
    return session.finish(tables, arguments.check)


def busy() -> bool:
    """Whether other processes keep every core busy already."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] >= (os.cpu_count() or 1)


def without_compiled(
    specs: Sequence[OptimizerSpec], arguments: argparse.Namespace, recorder: Recorder
) -> list[OptimizerSpec]:
    """Leave out what would compile for an unknown time, unless `--backend` names it.

    A compiler that has started cannot be stopped in time: 15 s alone, minutes on a busy machine.
    """
    compiled = [s for s in specs if s.backend == "compiled" and arguments.backend is None]
    for spec in compiled:
        recorder.leave_out(spec.name, "compiles for long: not with --quick on a busy machine")
    return [spec for spec in specs if spec not in compiled]


def passing(specs: Sequence[OptimizerSpec], job: Job, recorder: Recorder) -> list[OptimizerSpec]:
    """Those that pass the gate; the others are left out with the reason."""
    passed = []
    for spec in specs:
        ours = spec.family == OURS
        # AveragedModel copies its count from the host, which cannot be captured.
        captures = spec.captures and (spec.averages or job.case.options.ema_decay is None)
        if job.mode == "graph" and not captures:
            recorder.leave_out(
                spec.name, "its step cannot be captured in a CUDA graph", **place(job)
            )
            continue
        try:
            parity = check_parity(spec, job.case)
        except Exception as error:  # another project's step may fail however it likes
            recorder.leave_out(spec.name, one_line(error), failed=ours, **place(job))
            continue
        if isinstance(parity, str):
            recorder.leave_out(spec.name, parity)
        elif not parity.passed:
            recorder.leave_out(spec.name, parity.text, failed=ours, **place(job))
        else:
            job.parities[spec.name], job.families[spec.name] = parity, spec.family
            passed.append(spec)
    return passed


def measure(
    recorder: Recorder, specs: Sequence[OptimizerSpec], job: Job, seconds: float, progress: Progress
) -> None:
    """Measure every optimizer on one model, interleaved, and record it. Raises MemoryError."""
    title = f"{job.model} {job.words['dtype']} {job.mode}"
    progress(f"{title}: parity check", 0.0)
    if job.mode == "graph":
        job.case = replace(job.case, options=replace(job.case.options, capturable=True))
    specs = fitting(passing(specs, job, recorder), job, recorder)
    if not specs:
        return
    resident, sets = residency(specs, job)
    progress(title, 0.0)

    def on_round(share: float) -> None:
        progress(title, share)

    rounds = Rounds()
    with released():
        try:
            if resident:
                measure_resident(specs, job, sets, seconds, recorder, on_round, rounds)
            else:
                measure_in_turns(specs, job, seconds, recorder, on_round, rounds)
        finally:  # whole rounds outlive an interrupt
            recorder.results += results(rounds.times, rounds.rates, job, sets, resident)


@dataclass
class Rounds:
    """What was measured, one number per round.

    times: seconds per step of every optimizer; rates: GB/s of every limit, in the same rounds.
    """

    times: Samples = field(default_factory=dict)
    rates: Samples = field(default_factory=dict)


def leave_out(name: str, error: Exception, job: Job, recorder: Recorder) -> None:
    """Record why an optimizer has no time.

    Ours failed, unless memory was full or a graph could not be captured.
    """
    refused = job.mode == "graph" or isinstance(error, torch.OutOfMemoryError)
    ours = job.families.get(name) == OURS
    recorder.leave_out(name, one_line(error), failed=ours and not refused, **place(job))


def make_limits(job: Job, recorder: Recorder) -> dict[str, Bandwidth]:
    """What bandwidths are compared with here."""
    device = job.case.device
    limits: dict[str, Bandwidth] = {COPY: CopyBandwidth(device)}
    if device.type != "cpu":
        try:
            from .harness.stream import AccessBandwidth  # imports triton

            limits[MOVE] = AccessBandwidth(device, timing.COPY_BYTES // 8)
        except Exception as error:  # a copy is a limit too
            leave_out(MOVE, error, job, recorder)
    return limits


def try_rotation(
    spec: OptimizerSpec, sets: Sequence[list[torch.Tensor]], job: Job, recorder: Recorder
) -> BufferRotation | None:
    """As `make_rotation`; a reason is recorded, and memory is given back."""
    rotation: BufferRotation | str | None = None
    try:
        rotation = make_rotation(spec, sets, job)
    except Exception as error:
        leave_out(spec.name, error, job, recorder)
    if rotation is None:
        give_back_memory()  # the error, which held on to it, is gone
        return None
    if isinstance(rotation, str):
        recorder.leave_out(spec.name, rotation, **place(job))
        return None
    return rotation


def measure_resident(
    specs: Sequence[OptimizerSpec],
    job: Job,
    sets: int,
    seconds: float,
    recorder: Recorder,
    on_round: Callable[[float], None],
    rounds: Rounds,
) -> None:
    """All optimizers in memory at once: A B C, A B C, a step each."""
    sources = [make_params(job.shapes, job.case, seed) for seed in range(sets)]
    rotations: dict[str, BufferRotation] = {}
    for spec in specs:
        rotation = try_rotation(spec, [copy_params(params) for params in sources], job, recorder)
        if rotation is not None:
            rotations[spec.name] = rotation
    # Whoever runs out of memory later gives it back only if nothing here refers to it.
    del sources, rotation
    limits = make_limits(job, recorder)

    def on_error(name: str, error: Exception) -> None:
        if name not in rotations:
            raise error
        leave_out(name, error, job, recorder)
        del rotations[name]

    measures: dict[str, Callable[[], float]] = {name: limits[name].measure for name in limits}
    # By name, so that a rotation that `on_error` removes is gone.
    ours = {name: lambda name=name: rotations[name].measure() for name in rotations}
    samples: Samples = {}
    warm_up = warm_up_seconds(job.case.device)
    try:
        interleaved(
            {**ours, **measures},
            seconds,
            min_rounds=QUICK_LEAST_ROUNDS if job.quick else LEAST_ROUNDS,
            on_round=on_round,
            warm_up=warm_up,
            on_error=on_error,
            samples=samples,
        )
    finally:
        rounds.times = {name: samples[name] for name in rotations if samples.get(name)}
        rounds.rates = {
            name: list(map(limit.gb_per_s, samples[name]))
            for name, limit in limits.items()
            if samples.get(name)
        }


def measure_in_turns(
    specs: Sequence[OptimizerSpec],
    job: Job,
    seconds: float,
    recorder: Recorder,
    on_round: Callable[[float], None],
    rounds: Rounds,
) -> None:
    """One optimizer in memory at a time, made anew for every turn: A B C, A B C, a few steps."""
    rounds.times = {spec.name: [] for spec in specs}
    begin = time.monotonic()
    for done in range(1, TURNS + 1):
        turn = {}
        for spec in specs:
            if spec.name in rounds.times:
                with released():
                    turn[spec.name] = take_turn(spec, job, recorder)
        with released():
            limits = make_limits(job, recorder)
            rates = {name: limit.gb_per_s(limit.measure()) for name, limit in limits.items()}
        for name, taken in turn.items():
            if taken is None:
                del rounds.times[name]
            else:
                rounds.times[name].append(taken)
        for name in list(rounds.rates):  # one that did not fit in every turn has no pair in some
            if name not in rates:
                del rounds.rates[name]
        for name, rate in rates.items():
            if done == 1 or name in rounds.rates:
                rounds.rates.setdefault(name, []).append(rate)
        on_round(done / TURNS)
        if done >= 2 and time.monotonic() - begin > seconds:
            break


def take_turn(spec: OptimizerSpec, job: Job, recorder: Recorder) -> float | None:
    """Seconds per step of an optimizer that is made for this turn; None if it has none, and the
    reason is recorded.
    """
    try:
        rotation = try_rotation(spec, [make_params(job.shapes, job.case)], job, recorder)
        if rotation is None:
            return None
        begin = time.monotonic()
        while job.case.device.type != "cpu" and time.monotonic() - begin < TURN_WARM_UP:
            rotation.measure()
        return statistics.median(rotation.measure() for _ in range(STEPS_PER_TURN))
    except Exception as error:
        leave_out(spec.name, error, job, recorder)
        return None


def results(times: Samples, rates: Samples, job: Job, sets: int, resident: bool) -> list[Result]:
    """What one interleaved run gave.

    Args:
        times: seconds per step of every optimizer, round by round.
        rates: GB/s of the limits, in the same rounds.
    """
    if not rates:
        return []  # interrupted before the first round ended
    copies, moves = rates[COPY], rates.get(MOVE)
    ceilings = max(rates.values(), key=statistics.median)
    ours = [name for name in times if job.families[name] == OURS]
    measured = []
    for name, own in times.items():
        reached = [job.moved[name] * numel(job.shapes) / seconds / 1e9 for seconds in own]
        measured.append(
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
                "gate": asdict(job.parities[name]),
                "buffer_sets": sets,
                "resident": resident,
            }
        )
    return measured


def tables(record: Record) -> list[Table]:
    """One table per model, case and mode."""
    groups: dict[str, list[Result]] = {}
    for result in record["results"]:
        groups.setdefault(case_title(result), []).append(result)
    return [one_table(title, group) for title, group in groups.items()]


def one_table(title: str, group: Sequence[Result]) -> Table:
    """A row per optimizer; below, what the limit is."""
    first = group[0]
    # Where a kernel with the update's accesses was timed too, the faster of the two is the limit.
    limit = "ceiling" if first.get("move_gb_per_s") else "copy"
    columns = ["optimizer", "ms per step", "GB/s", f"of {limit}", "vs torch fused"]
    rows = [
        [
            result["optimizer"],
            spread(result["step_ms"]),
            three_digits(result["gb_per_s"]["median"]),
            f"{result[f'share_of_{limit}']['median']:.0%}",
            times(result["speedup"]),
            exact_bytes(result["moved_bytes"]),
            exact_bytes(result["held_bytes"]),
        ]
        for result in group
    ]
    note = f"copy bandwidth in the same rounds: {spread(first['copy_gb_per_s'])} GB/s"
    if limit == "ceiling":
        move = spread(first["move_gb_per_s"])
        note += f"; of the update's accesses alone: {move} GB/s; ceiling: the faster of the two"
    return Table(title, [*columns, "B/param. moved", "state B/param."], [*rows], [note])
