"""`accuracy`: how far optimizers are from a float64 run of the same formula, per option and dtype.

A result: {"option", "dtype", "optimizer", "family", "steps", "elements", "mean_error",
"max_error"}: of
|parameter - float64 run| / |float64 run| after `steps` steps, null if it overflowed. Parameters and gradients are drawn
around one and exactly representable in the dtype, so that only the optimizer's own roundings count.
Under a precision recipe the parameter is all that is stored of it, master weight or remainder
included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adam import FusedAdamW

from .harness.optimizers import OURS, Case, OptimizerSpec
from .harness.oracle import Options, adamw
from .harness.results import Recorder
from .harness.workload import instantiate, one_line

OPTIONS: dict[str, Options] = {
    "lr 1e-3": Options(lr=1e-3, weight_decay=0.0),
    "lr 1e-3, decay 0.1": Options(lr=1e-3, weight_decay=0.1),
    # lr * weight_decay of 1e-8: 1 - 1e-8 is 1 in float32.
    "lr 1e-6, decay 0.01": Options(lr=1e-6, weight_decay=0.01),
    "lr 3e-2, decay 0.1": Options(lr=3e-2, weight_decay=0.1),
    "lr 1e-3, decay 0.1, amsgrad": Options(lr=1e-3, weight_decay=0.1, amsgrad=True),
}
NUMEL, STEPS = 20_000, 100


def draw(count: int, numel: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Normal numbers, rounded to the dtype."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(numel, generator=generator).to(device, dtype) for _ in range(count)]


def measure_one(
    spec: OptimizerSpec, case: Case, start: Tensor, grads: Sequence[Tensor], truth: Tensor
) -> dict[str, Any] | str:
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
    progress: Callable[[str, float], None],
    numel: int = NUMEL,
) -> None:
    """Every option, dtype and optimizer."""
    total = len(OPTIONS) * len(dtypes)
    for number, (dtype, option) in enumerate(
        (dtype, option) for dtype in dtypes for option in OPTIONS
    ):
        name = str(dtype).removeprefix("torch.")
        progress(f"{name}, {option}", number / total)
        options = OPTIONS[option]
        start, *grads = draw(steps + 1, numel, dtype, device)
        [truth] = adamw([start], [[grad] for grad in grads], options)
        case = Case(device, dtype, dtype, options)
        for spec in specs:
            try:
                found = measure_one(spec, case, start, grads, truth)
            except Exception as error:  # another project's step may fail however it likes
                recorder.leave_out(
                    spec.name,
                    one_line(error),
                    failed=spec.family == OURS,
                    option=option,
                    dtype=name,
                )
                continue
            if isinstance(found, str):
                recorder.leave_out(spec.name, found)
                continue
            words = {
                "option": option,
                "dtype": name,
                "optimizer": spec.name,
                "family": spec.family,
            }
            recorder.results.append({**words, "steps": steps, "elements": numel, **found})
