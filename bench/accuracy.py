"""`accuracy`: how far optimizers are from a float64 run of the same formula, per option and dtype.

A result: {"option", "dtype", "optimizer", "family", "steps", "elements", "mean_error",
"max_error"}: of |parameter - float64 run| / |float64 run| after `steps` steps, null if it
overflowed. Parameters and gradients are drawn around one and exactly representable in the dtype, so
that only the optimizer's own roundings count. Under a precision recipe the parameter is all that is
stored of it, master weight or remainder included.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_adam import FusedAdamW

from .harness.console import Progress, Table
from .harness.optimizers import OURS, Case, OptimizerSpec
from .harness.oracle import AdamWOptions, adam
from .harness.results import Record, Recorder, unique
from .harness.session import Session
from .harness.workload import instantiate, one_line

OPTIONS: dict[str, AdamWOptions] = {
    "lr 1e-3": AdamWOptions(lr=1e-3, weight_decay=0.0),
    "lr 1e-3, decay 0.1": AdamWOptions(lr=1e-3, weight_decay=0.1),
    # lr * weight_decay of 1e-8: 1 - 1e-8 is 1 in float32.
    "lr 1e-6, decay 0.01": AdamWOptions(lr=1e-6, weight_decay=0.01),
    "lr 3e-2, decay 0.1": AdamWOptions(lr=3e-2, weight_decay=0.1),
    "lr 1e-3, decay 0.1, amsgrad": AdamWOptions(lr=1e-3, weight_decay=0.1, amsgrad=True),
}
NUMEL, STEPS, QUICK_STEPS = 20_000, 100, 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(arguments: argparse.Namespace) -> int:
    """Compare optimizers with float64; returns the exit code."""
    session = Session(arguments)
    specs = session.specs()
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    with session.measuring() as progress:
        dtypes = arguments.dtypes or DTYPES
        measure(session.recorder, specs, session.device, dtypes, steps, progress)
    return session.finish(tables)


def normal_values(count: int, numel: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Normal numbers, rounded to the dtype."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(numel, generator=generator).to(device, dtype) for _ in range(count)]


def measure_one(
    spec: OptimizerSpec, case: Case, start: Tensor, grads: Sequence[Tensor], truth: Tensor
) -> dict[str, float | None] | str:
    """Mean and largest relative error of one optimizer; or the reason for its absence."""
    param = torch.nn.Parameter(start.clone())
    param.grad = torch.zeros_like(param)
    instance = instantiate(spec, [param], case)
    if isinstance(instance, str):
        return instance
    for grad in grads:
        param.grad.copy_(grad)
        instance.step()
    weight = param.detach()
    if isinstance(instance.optimizer, FusedAdamW) and spec.quantised:
        weight = instance.optimizer.export_fp32()["params"][0]
    error = (weight.double() - truth).abs() / truth.abs()
    errors = {"mean_error": error.mean().item(), "max_error": error.max().item()}
    return {name: value if math.isfinite(value) else None for name, value in errors.items()}


def measure(
    recorder: Recorder,
    specs: Sequence[OptimizerSpec],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    steps: int,
    progress: Progress,
    numel: int = NUMEL,
) -> None:
    """Every option, dtype and optimizer."""
    rounds = list(itertools.product(dtypes, OPTIONS.items()))
    for number, (dtype, (option, options)) in enumerate(rounds):
        words = {"option": option, "dtype": str(dtype).removeprefix("torch.")}
        progress(f"{words['dtype']}, {option}", number / len(rounds))
        start, *grads = normal_values(steps + 1, numel, dtype, device)
        truth = adam(start, grads, options)["param"]
        case = Case(device, dtype, dtype, options)
        for spec in specs:
            try:
                errors = measure_one(spec, case, start, grads, truth)
            except Exception as error:  # another project's step may fail however it likes
                ours = spec.family == OURS
                recorder.leave_out(spec.name, one_line(error), failed=ours, **words)
                continue
            if isinstance(errors, str):
                recorder.leave_out(spec.name, errors)
                continue
            names = {"optimizer": spec.name, "family": spec.family}
            sizes = {"steps": steps, "elements": numel}
            recorder.results.append({**words, **names, **sizes, **errors})


def tables(record: Record) -> list[Table]:
    """Mean relative errors: a table per dtype, a row per optimizer, a column per option."""
    found = []
    for dtype in unique(record["results"], "dtype"):
        results = [result for result in record["results"] if result["dtype"] == dtype]
        options = unique(results, "option")
        cells = {
            (result["optimizer"], result["option"]): error_text(result["mean_error"])
            for result in results
        }
        rows = [
            [name, *(cells.get((name, option), "-") for option in options)]
            for name in unique(results, "optimizer")
        ]
        title = (
            f"mean |parameter - float64 run| / |float64 run|, {dtype}, after "
            f"{results[0]['steps']} steps of {results[0]['elements']:,} elements"
        )
        found.append(Table(title, ["optimizer", *options], [*rows]))
    return found


def error_text(error: float | None) -> str:
    """A relative error; None has overflowed."""
    return "overflow" if error is None else f"{error:.2e}"
