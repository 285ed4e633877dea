"""`stream`: steps with state in host memory, next to pinned copies and to state on the GPU.

A result is one recipe on one model:
    model, tensors, parameters, dtype, optimizer, family
    state_bytes     all state that a step copies in, and out again
    stream_ms       statistic of a step with `state_device="cpu"`, all of its copies included
    resident_ms     the same with state on the GPU, or null where that does not fit
    gb_per_s        statistic of state bytes over time, in each direction
    copy_gb_per_s   statistic of pinned copies in both directions at once, in the same rounds
    share_of_copy   ratio of the two
    peak_bytes      the most that a step took on the GPU besides parameters and gradients; null
                    where the system does not report memory
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adam import FusedAdamW

from .harness.console import Progress, Table, exact_bytes, spread
from .harness.optimizers import OURS, Case, dtypes_of, recipes_of
from .harness.results import Record, Recorder, unique
from .harness.session import Session
from .harness.shapes import Shape, numel
from .harness.timing import (
    give_back_memory,
    interleaved,
    ratio,
    seconds_of,
    statistic,
    warm_up_seconds,
)
from .harness.workload import copy_params, make_params, one_line, released
from .memory import MemoryMeter

SECONDS, QUICK_SECONDS = 60.0, 10.0
COPY_BYTES = 256 << 20
COPIES = 8  # that queue up in each direction
STEPS = 3  # that queue up, as in training: the last copies of one run along with the next
RECIPES = ("none", "split24-int8")


def run(arguments: argparse.Namespace) -> int:
    """Time steps with state on the host; returns the exit code. Raises ValueError for a recipe."""
    session = Session(arguments)
    recipes = recipes_of(arguments.precision or RECIPES)
    models = session.models(["gpt2"] if arguments.quick else ["llama-3-8b/8"])
    jobs = [(name, recipe) for name in models for recipe in recipes]
    seconds = (arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)) / len(jobs)
    with session.measuring() as progress:
        for model, recipe in jobs:
            dtype = dtypes_of(recipe)[0]
            case = Case(session.device, dtype, dtype)
            name = f"FusedAdamW {recipe or ''}".strip()
            if session.device.type == "cpu":
                reason = "state of parameters on a CPU is in host memory anyway: it needs a GPU"
                session.recorder.leave_out(name, reason, model=model)
                continue
            with released():
                try:
                    measure(session.recorder, model, models[model], recipe, case, seconds, progress)
                except (RuntimeError, ValueError) as error:
                    session.recorder.leave_out(name, one_line(error), failed=True, model=model)
    return session.finish(tables)


class PinnedCopies:
    """Copies of a large pinned buffer to the device, and of another one back, at the same time."""

    def __init__(self, device: torch.device, nbytes: int = COPY_BYTES) -> None:
        self.device, self.nbytes = device, nbytes
        self.streams = [torch.get_device_module(device).Stream(device) for _ in range(2)]
        pinned = device.type != "cpu"
        self.host = [
            torch.ones(nbytes, dtype=torch.uint8, pin_memory=pinned, device="cpu") for _ in range(2)
        ]
        self.on_device = [memory.to(device) for memory in self.host]

    def gb_per_s(self, seconds: float) -> float:
        """In each direction, of copies that took so long."""
        return self.nbytes / seconds / 1e9

    def measure(self) -> float:
        """Seconds per copy."""
        return seconds_of(self._copy, self.device) / COPIES

    def _copy(self) -> None:
        module = torch.get_device_module(self.device)
        (stream_in, stream_out), (host_in, host_out) = self.streams, self.host
        for _ in range(COPIES):
            with module.stream(stream_in):
                self.on_device[0].copy_(host_in, non_blocking=True)
            with module.stream(stream_out):
                host_out.copy_(self.on_device[1], non_blocking=True)


def stepper(params: Sequence[Tensor], recipe: str | None, **options: Any) -> FusedAdamW:
    """FusedAdamW after its first step, which makes all state."""
    optimizer = FusedAdamW(params, lr=1e-4, precision=recipe, **options)
    optimizer.step()
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state but the step counters."""
    entries = optimizer.state.values()
    return sum(value.nbytes for entry in entries for key, value in entry.items() if key != "step")


def measure(
    recorder: Recorder,
    model: str,
    shapes: Sequence[Shape],
    recipe: str | None,
    case: Case,
    seconds: float,
    progress: Progress,
) -> None:
    """Time one recipe on one model, and record it."""
    name = f"FusedAdamW {recipe or ''}".strip()
    progress(f"{model}: {name}", 0.0)
    meter = MemoryMeter(case.device)
    params = make_params(shapes, case)
    meter.reset()
    before = meter.used()
    streamed = stepper(params, recipe, state_device="cpu")
    streamed.step()
    peak = meter.peak() - before
    measures: dict[str, Callable[[], float]] = {
        "stream": lambda: seconds_of(streamed.step, case.device, STEPS)
    }
    try:
        resident = stepper(copy_params(params), recipe)
        measures["resident"] = lambda: seconds_of(resident.step, case.device, STEPS)
    except torch.OutOfMemoryError:
        give_back_memory()
    copies = PinnedCopies(case.device)
    measures["copy"] = copies.measure
    samples = interleaved(
        measures,
        seconds,
        on_round=lambda share: progress(f"{model}: {name}", share),
        warm_up=warm_up_seconds(case.device),
    )
    held = state_bytes(streamed)
    rates = [held / time / 1e9 for time in samples["stream"]]
    limits = [copies.gb_per_s(time) for time in samples["copy"]]
    recorder.results.append(
        {
            "model": model,
            "tensors": len(shapes),
            "parameters": numel(shapes),
            "dtype": str(case.dtype).removeprefix("torch."),
            "optimizer": name,
            "family": OURS,
            "state_bytes": held,
            "stream_ms": _milliseconds(samples["stream"]),
            "resident_ms": _milliseconds(samples["resident"]) if "resident" in samples else None,
            "gb_per_s": statistic(rates),
            "copy_gb_per_s": statistic(limits),
            "share_of_copy": ratio(rates, limits),
            "peak_bytes": peak if meter.works else None,
        }
    )


def _milliseconds(seconds: Sequence[float]) -> dict[str, Any]:
    return statistic([1e3 * value for value in seconds])


def tables(record: Record) -> list[Table]:
    """One table per model."""
    found = []
    for model in unique(record["results"], "model"):
        results = [result for result in record["results"] if result["model"] == model]
        title = (
            f"state on the host: {model}, {results[0]['parameters']:,} parameters in "
            f"{results[0]['tensors']:,} tensors; GB/s are those of each direction"
        )
        rows = [
            [
                f"{result['optimizer']}, {result['dtype']}",
                exact_bytes(result["state_bytes"] / result["parameters"]),
                spread(result["stream_ms"]),
                "does not fit" if result["resident_ms"] is None else spread(result["resident_ms"]),
                spread(result["gb_per_s"]),
                spread(result["copy_gb_per_s"]),
                f"{result['share_of_copy']['median']:.0%}",
                "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e9:.2f}",
            ]
            for result in results
        ]
        columns = [
            "optimizer",
            "state B/param.",
            "step, ms",
            "state on the GPU, ms",
            "GB/s",
            "pinned copy, GB/s",
            "share",
            "peak GB",
        ]
        found.append(Table(title, columns, [*rows]))
    return found
