"""`memory`: how many bytes per parameter an optimizer holds, and how many it needs for a moment.

A result is one optimizer on one model:
    model, tensors, parameters, dtype, grad_dtype, amsgrad, ema, optimizer, family
    state_bytes           optimizer state and averages, step counters not counted
    held_bytes            what constructing and the first step left behind
    construct_peak_bytes  the most that constructing and the first step took
    step_peak_bytes       the most that a later step took on top of that

All sizes are per parameter, parameters and gradients not counted. The last three are null where
the system does not report memory. On a GPU they come from torch's allocator, on Linux from the
process's resident size, which counts whole pages.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from .harness.console import Progress, Table, exact_bytes
from .harness.optimizers import OURS, OptimizerSpec
from .harness.results import Record, Recorder, Result, averaged, unique
from .harness.rotation import Job, fitting
from .harness.session import Session
from .harness.shapes import numel
from .harness.workload import instantiate, make_params, one_line, released

COLUMNS = {
    "state B/param.": "state_bytes",
    "held after a step": "held_bytes",
    "peak of construct + step": "construct_peak_bytes",
    "peak of a step": "step_peak_bytes",
}


def run(arguments: argparse.Namespace) -> int:
    """Measure what optimizers hold; returns the exit code."""
    session = Session(arguments)
    specs, case, recorder = session.specs(), session.case(), session.recorder
    default = ["resnet50"] if arguments.quick or session.device.type == "cpu" else ["gpt2"]
    with session.measuring() as progress:
        for name, shapes in session.models(default).items():
            job = Job(name, shapes, case, "eager")
            measure(recorder, fitting(specs, job, recorder), job, progress)
    return session.finish(tables)


def measure(
    recorder: Recorder, specs: Sequence[OptimizerSpec], job: Job, progress: Progress
) -> None:
    """One optimizer after the other, each in memory alone."""
    for number, spec in enumerate(specs):
        progress(f"{job.model}: {spec.name}", number / len(specs))
        with released():
            try:
                result = measure_one(spec, job)
            except Exception as error:  # another project's step may fail however it likes
                ours = spec.family == OURS
                recorder.leave_out(spec.name, one_line(error), failed=ours, model=job.model)
                continue
        if isinstance(result, str):
            recorder.leave_out(spec.name, result)
        else:
            recorder.results.append(result)


def measure_one(spec: OptimizerSpec, job: Job) -> Result | str:
    """One optimizer on one model; or the reason for its absence."""
    meter = MemoryMeter(job.case.device)
    # Modules and compiled code that a first step brings in are not what it holds for these
    # parameters.
    first = instantiate(spec, make_params([(8,)], job.case), job.case)
    if isinstance(first, str):
        return first
    first.step()
    del first

    params = make_params(job.shapes, job.case)
    meter.reset()
    before = meter.used()
    instance = instantiate(spec, params, job.case)
    if isinstance(instance, str):
        return instance
    instance.step()
    construct_peak = meter.peak() - before

    meter.reset()
    held = meter.used() - before
    instance.step()
    instance.step()
    step_peak = meter.peak() - before - held

    elements = numel(job.shapes)
    sizes = {
        "held_bytes": held,
        "construct_peak_bytes": construct_peak,
        "step_peak_bytes": step_peak,
    }
    return {
        **{key: value for key, value in job.words.items() if key != "clip"},
        "optimizer": spec.name,
        "family": spec.family,
        "state_bytes": instance.state_bytes() / elements,
        **{key: max(0, size) / elements if meter.works else None for key, size in sizes.items()},
    }


def tables(record: Record) -> list[Table]:
    """One table per model."""
    found = []
    for model in unique(record["results"], "model"):
        results = [result for result in record["results"] if result["model"] == model]
        first = results[0]
        title = (
            f"bytes per parameter: {model}, {first['parameters']:,} parameters in "
            f"{first['tensors']:,} tensors, {first['dtype']}"
            f"{', amsgrad' if first['amsgrad'] else ''}{averaged(first)}; "
            "parameters and gradients not counted"
        )
        rows = [
            [
                r["optimizer"],
                *("-" if r[k] is None else exact_bytes(r[k]) for k in COLUMNS.values()),
            ]
            for r in results
        ]
        found.append(Table(title, ["optimizer", *COLUMNS], [*rows]))
    return found


class MemoryMeter:
    """Bytes in use, and the most in use since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.works = self.cuda or self._reset_peak()

    def reset(self) -> None:
        """Start a new peak, after what nothing refers to is gone."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # freed memory must not hide what is allocated next
        self._reset_peak()

    def used(self) -> int:
        """Bytes in use now."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else self._status("VmRSS:")

    def peak(self) -> int:
        """The most bytes in use since `reset`."""
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else self._status("VmHWM:")

    @staticmethod
    def _reset_peak() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    @staticmethod
    def _status(key: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)
