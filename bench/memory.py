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

from .harness.optimizers import OURS, OptimizerSpec
from .harness.results import Recorder
from .harness.shapes import numel
from .harness.workload import instantiate, make_params, one_line, released
from .step import Job


class MemoryMeter:
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


def measure_one(spec: OptimizerSpec, job: Job) -> dict[str, Any] | str:
    """One optimizer; or the reason for its absence."""
    meter = MemoryMeter(job.case.device)
    # Modules and compiled code that a first step brings in are not what it holds for these
    # parameters.
    first = instantiate(spec, make_params([(8,)], job.case), job.case)
    if isinstance(first, str):
        return first
    first.step()
    del first
    params = make_params(job.shapes, job.case)
    elements = numel(job.shapes)
    meter.reset()
    begin = meter.now()
    instance = instantiate(spec, params, job.case)
    if isinstance(instance, str):
        return instance
    instance.step()
    construct_peak = meter.peak() - begin
    meter.reset()
    held = meter.now() - begin
    instance.step()
    instance.step()
    step_peak = meter.peak() - begin - held
    known = meter.works

    def per_parameter(number: int) -> float | None:
        return max(0, number) / elements if known else None

    return {
        **{key: value for key, value in job.words.items() if key != "clip"},
        "optimizer": spec.name,
        "family": spec.family,
        "state_bytes": instance.state_bytes() / elements,
        "held_bytes": per_parameter(held),
        "construct_peak_bytes": per_parameter(construct_peak),
        "step_peak_bytes": per_parameter(step_peak),
    }


def measure(
    recorder: Recorder,
    specs: Sequence[OptimizerSpec],
    job: Job,
    progress: Callable[[str, float], None],
) -> None:
    """One optimizer after the other, each in memory alone."""
    for number, spec in enumerate(specs):
        progress(f"{job.model}: {spec.name}", number / len(specs))
        with released():
            try:
                found = measure_one(spec, job)
            except Exception as error:  # another project's step may fail however it likes
                recorder.leave_out(
                    spec.name, one_line(error), failed=spec.family == OURS, model=job.model
                )
                continue
        if isinstance(found, str):
            recorder.leave_out(spec.name, found)
        else:
            recorder.results.append(found)
