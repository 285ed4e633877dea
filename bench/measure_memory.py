"""`memory`: what an optimizer holds and what it takes for a moment.

A result: {"model", "tensors", "parameters", "dtype", "grad_dtype", "amsgrad", "optimizer",
"family", "state_bytes" (per parameter, step counters not counted), "held_bytes",
"construct_peak_bytes", "step_peak_bytes" (per parameter: what constructing and the first step leave
behind, the most they took, the most a later step took on top; null where the system does not
tell)}.

On a GPU by torch's allocator, on Linux by the resident size of the process, which knows pages only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .measure_step import Job
from .models import numel
from .peers import OURS, Entry
from .record import Recorder
from .workload import contend, make_params, one_line, released


class Meter:
    """Memory in use, and the most since `reset`, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.works = device.type == "cuda" or self._can_reset()

    def _can_reset(self) -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _status(self, key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
        return 0

    def reset(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken next
        self._can_reset()

    def now(self) -> int:
        return (
            torch.cuda.memory_allocated(self.device)
            if self.device.type == "cuda"
            else self._status("VmRSS:")
        )

    def peak(self) -> int:
        return (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else self._status("VmHWM:")
        )


def measure_one(entry: Entry, job: Job) -> dict[str, Any] | str:
    """One optimizer; or the reason for its absence."""
    meter = Meter(job.case.device)
    # Modules and compiled code that a first step brings in are not what it holds for these
    # parameters.
    first = contend(entry, make_params([(8,)], job.case), job.case)
    if isinstance(first, str):
        return first
    first.step()
    del first
    params = make_params(job.shapes, job.case)
    elements = numel(job.shapes)
    meter.reset()
    begin = meter.now()
    contender = contend(entry, params, job.case)
    if isinstance(contender, str):
        return contender
    contender.step()
    construct_peak = meter.peak() - begin
    meter.reset()
    held = meter.now() - begin
    contender.step()
    contender.step()
    step_peak = meter.peak() - begin - held
    known = meter.works

    def per_parameter(number: int) -> float | None:
        return max(0, number) / elements if known else None

    return {
        **{key: value for key, value in job.words.items() if key != "clip"},
        "optimizer": entry.name,
        "family": entry.family,
        "state_bytes": contender.state_bytes() / elements,
        "held_bytes": per_parameter(held),
        "construct_peak_bytes": per_parameter(construct_peak),
        "step_peak_bytes": per_parameter(step_peak),
    }


def measure(
    recorder: Recorder, entries: Sequence[Entry], job: Job, progress: Callable[[str, float], None]
) -> None:
    """One optimizer after the other, each in memory alone."""
    for number, entry in enumerate(entries):
        progress(f"{job.model}: {entry.name}", number / len(entries))
        with released():
            try:
                found = measure_one(entry, job)
            except Exception as error:  # another project's step may fail however it likes
                recorder.leave_out(
                    entry.name, one_line(error), failed=entry.family == OURS, model=job.model
                )
                continue
        if isinstance(found, str):
            recorder.leave_out(entry.name, found)
        else:
            recorder.results.append(found)
