"""`host`: what a step costs in Python, against the number of tensors. The tensors are too small to
cost anything else.

A result: {"tensors", "optimizer", "family", "grads" ("kept" or "new"), "caches" ("cold" or
"warm"), "step_us": statistic, "ns_per_parameter": float
(of the median, the fixed part included), "speedup": ratio of torch fused's time to this one's, or
null}.

"FusedAdamW triton, no launch" is the whole Python of the Triton path, its kernel launches taken
out. "FusedAdamW DTensor" steps DTensors that one process holds whole: all that a shard costs but
communication.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed

from .harness.launches import no_interpreter, stubbed_launches
from .harness.optimizers import BASELINE, OURS, Case, OptimizerSpec, ours
from .harness.results import Recorder
from .harness.timing import interleaved, ratio, statistic, synchronize
from .harness.workload import Instance, copy_params, instantiate, make_params, one_line, released

COUNTS = (10, 100, 1000, 5000)
NUMEL = 4  # elements per tensor
STUBBED = "FusedAdamW triton, no launch"
DTENSOR = "FusedAdamW DTensor"
WARM_UP = 3


def stubbed_spec() -> OptimizerSpec:
    """Ours on Triton, to be stepped without launches."""
    spec = ours("triton", flatten=False)
    return OptimizerSpec(STUBBED, OURS, spec.make, clips=True)


def dtensor_spec(backend: str) -> OptimizerSpec:
    """Ours on DTensors."""
    return replace(ours(backend, flatten=False), name=DTENSOR)


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

    def __init__(
        self, instance: Instance, device: torch.device, new_grads: bool, warm: bool
    ) -> None:
        self.instance, self.device, self.warm = instance, device, warm
        self.stubbed = instance.spec.name == STUBBED
        # Two sets in turn: gradients of a new backward lie somewhere else than those of the last.
        self.grads = [
            [p.grad.clone() for p in instance.params if p.grad is not None]
            for _ in range(2 * new_grads)
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
    new_grads: bool,
    warm: bool,
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
            timer = HostTimer(instance, case.device, new_grads, warm)
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
    new_grads: bool,
    warm: bool,
    progress: Callable[[str, float], None],
) -> None:
    """Time every optimizer at every count, interleaved.

    Args:
        seconds: in all.
        new_grads: every step finds other gradient tensors, as after `zero_grad()` and `backward()`;
            flat buffers then have none in them, so that `flatten=True` has nothing to gain.
        warm: a step that is not timed comes before every timed one. Else the steps of the other
            optimizers come before it, and have taken the processor's caches, as a forward and
            backward pass would have.
    """
    specs = [*specs]
    reason = no_interpreter() if case.device.type == "cpu" else None
    if reason:
        recorder.leave_out(STUBBED, reason)
    else:
        specs.append(stubbed_spec())
    families = {spec.name: spec.family for spec in specs}
    for number, tensors in enumerate(counts):
        progress(f"{tensors} tensors", number / len(counts))
        with released():
            timers = make_timers(specs, tensors, case, new_grads, warm, recorder)
            samples = interleaved(
                {name: timer.measure for name, timer in timers.items()},
                seconds / len(counts),
                max_rounds=1000,
            )
            recorder.results += results(samples, families, tensors, new_grads, warm)


def results(
    samples: dict[str, list[float]],
    families: dict[str, str],
    tensors: int,
    new_grads: bool,
    warm: bool,
) -> list[dict[str, Any]]:
    """What one interleaved run gave."""
    found = []
    for name, times in samples.items():
        step_us = statistic([seconds * 1e6 for seconds in times])
        found.append(
            {
                "tensors": tensors,
                "optimizer": name,
                "family": families[name],
                "grads": "new" if new_grads else "kept",
                "caches": "warm" if warm else "cold",
                "step_us": step_us,
                "ns_per_parameter": step_us["median"] * 1e3 / tensors,
                "speedup": ratio(samples[BASELINE], times) if BASELINE in samples else None,
            }
        )
    return found
