"""`suite`: everything, in one record, under eight minutes on a GPU. Each part is a record of its
own in `results`.

Beside the records of `verify`, `step`, `host`, `memory` and `accuracy` there are three parts of its
own: "tests" ({"passed": bool, "summary": text}: the native tests, where pytest and a checkout are
there), "ceiling" ({"gb_per_s": statistic, "dtype"}: a kernel with the update's accesses and no
arithmetic; "copy_gb_per_s": statistic of `copy_` in the same rounds; the faster of the two is what
an update can reach) and "sweep" ({"model", "block", "num_warps", "step_ms": statistic, "gb_per_s":
statistic}: on request).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import accuracy, host, memory, step, verify
from .harness.launches import launch_shape
from .harness.optimizers import Case, OptimizerSpec, ours
from .harness.oracle import Options
from .harness.results import Recorder
from .harness.shapes import Shape, shapes_of
from .harness.shapes import numel as count
from .harness.timing import (
    Bandwidth,
    CopyBandwidth,
    interleaved,
    seconds_of,
    statistic,
    warm_up_seconds,
)
from .harness.workload import instantiate, make_params, released

LIMIT_SECONDS = {"cuda": 450.0, "cpu": 450.0, "quick": 45.0}
# Small ones first: what the time does not allow is at the end.
MODELS = (
    "many-small",
    "resnet50",
    "gpt2",
    "vit-b16",
    "llama-3-8b/64",
    "one-big",
    "llama-3-8b/8",
    "gpt2-xl",
)
WHOLE = "llama-3-8b"
MIXES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
MOST_ON_CPU = 200_000_000
CEILING_NUMEL = 1 << 28
SWEEP = tuple((block, warps) for block in (512, 1024, 2048, 4096) for warps in (4, 8))
TESTS_SECONDS = 150
# Of the time, when the last model starts; memory comes after.
STEP_SHARE = 0.9

Progress = Callable[[str, float], None]


@dataclass
class Suite:
    """What is run, and until when.

    dtype: of parameters and gradients, where one mix is all that is measured.
    """

    device: torch.device
    specs: Sequence[OptimizerSpec]
    options: Options
    quick: bool
    sweep: bool
    seconds: float
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.begin = time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def share(self) -> float:
        """Of the time, what is used."""
        return (time.monotonic() - self.begin) / self.seconds

    def case(self) -> Case:
        """What is measured where one mix is enough."""
        return Case(self.device, self.dtype, self.dtype, self.options)

    def part(self, command: str, **arguments: Any) -> Recorder:
        return Recorder(command, arguments, self.device)


def run(suite: Suite, recorder: Recorder, progress: Progress) -> None:
    """All parts in turn, each into `recorder.results`."""
    parts: list[tuple[str, Callable[[Suite, Progress], Recorder]]] = [
        ("verify", verify_part),
        ("tests", tests_part),
        ("ceiling", ceiling_part),
        ("host", host_part),
        ("accuracy", accuracy_part),
        ("sweep", sweep_part),
        ("step", step_part),
        ("memory", memory_part),
    ]
    for name, part in parts:
        if name == "sweep" and not suite.sweep:
            recorder.leave_out("sweep", "only with --sweep")
            continue

        def tell(text: str, share: float, name: str = name) -> None:
            progress(f"{name}: {text}", min(1.0, suite.share()))

        recorder.results.append(part(suite, tell).record())


def verify_part(suite: Suite, progress: Progress) -> Recorder:
    """The hashes and the copy bandwidth."""
    part = suite.part("verify")
    verify.measure(part, suite.device, suite.quick, progress)
    return part


def tests_part(suite: Suite, progress: Progress) -> Recorder:
    """The native tests, in a process of their own."""
    part = suite.part("tests")
    root = Path(__file__).resolve().parent.parent
    if not suite.cuda:
        reason = "native tests need a GPU; `make test` runs the others"
    elif importlib.util.find_spec("pytest") is None:
        reason = "not installed: pip install pytest hypothesis expecttest"
    elif not (root / "tests" / "test_kernel.py").is_file():
        reason = "there is no checkout here"
    else:
        progress("pytest -m gpu", 0.0)
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                command, cwd=root, capture_output=True, text=True, timeout=TESTS_SECONDS
            )
            text = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
            part.results.append({"passed": done.returncode == 0, "summary": text})
            if done.returncode:
                part.leave_out("tests", text, failed=True)
            return part
        except subprocess.TimeoutExpired:
            reason = f"took longer than {TESTS_SECONDS} s"
    part.leave_out("tests", reason)
    return part


def ceiling_part(suite: Suite, progress: Progress, numel: int = CEILING_NUMEL) -> Recorder:
    """The bandwidth of the update's accesses alone."""
    part = suite.part("ceiling", numel=numel)
    if not suite.cuda:
        part.leave_out("ceiling", "a Triton kernel's speed needs a GPU")
        return part
    progress("four reads, three writes", 0.0)
    part.results.append(measure_ceiling(suite.device, numel))
    return part


def measure_ceiling(device: torch.device, numel: int, seconds: float = 2.0) -> dict[str, Any]:
    """GB/s of `move`, and of `copy_`."""
    from .harness.stream import AccessBandwidth

    with released():
        limits: dict[str, Bandwidth] = {
            "gb_per_s": AccessBandwidth(device, numel),
            "copy_gb_per_s": CopyBandwidth(device),
        }
        measures = {name: limit.measure for name, limit in limits.items()}
        samples = interleaved(measures, seconds, min_rounds=5, warm_up=warm_up_seconds(device))
        rates = {
            name: statistic(list(map(limit.gb_per_s, samples[name])))
            for name, limit in limits.items()
        }
    return {"dtype": "float32", **rates}


def host_part(suite: Suite, progress: Progress) -> Recorder:
    """Python time per step."""
    part = suite.part("host")
    counts = host.COUNTS[: 2 if suite.quick else None]
    host.measure(
        part, suite.specs, suite.case(), counts, 0.07 * suite.seconds, False, False, progress
    )
    return part


def accuracy_part(suite: Suite, progress: Progress) -> Recorder:
    """Errors against float64."""
    part = suite.part("accuracy")
    dtypes = (suite.dtype,) if suite.quick else (torch.float32, torch.bfloat16)
    steps, numel = (10, 1000) if suite.quick else (accuracy.STEPS, accuracy.NUMEL)
    accuracy.measure(part, suite.specs, suite.device, dtypes, steps, progress, numel)
    return part


def memory_part(suite: Suite, progress: Progress) -> Recorder:
    """State and peaks."""
    part = suite.part("memory")
    model = "gpt2/64" if suite.quick else "resnet50"
    job = step.Job(model, shapes_of(model), suite.case(), "eager")
    memory.measure(part, suite.specs, job, progress)
    return part


def sweep_part(suite: Suite, progress: Progress) -> Recorder:
    """The update under other launch sizes."""
    part = suite.part("sweep")
    if not suite.cuda:
        part.leave_out("sweep", "a launch's speed needs a GPU")
        return part
    for model in ("gpt2", "many-small"):
        progress(model, 0.0)
        with released():
            part.results += measure_sweep(suite.device, model, shapes_of(model), SWEEP)
    return part


def measure_sweep(
    device: torch.device,
    model: str,
    shapes: Sequence[Shape],
    configs: Sequence[tuple[int, int]],
    seconds: float = 5.0,
    repeats: int = 20,
) -> list[dict[str, Any]]:
    """Time per step and bandwidth of every (block, num_warps), interleaved."""
    case = Case(device)
    instances = {}
    for block, warps in configs:
        made = instantiate(ours("triton", flatten=False), make_params(shapes, case), case)
        if isinstance(made, str):
            raise RuntimeError(made)
        instances[f"{block}/{warps}"] = made

    def measure(block: int, warps: int) -> float:
        with launch_shape(block, warps):
            return seconds_of(instances[f"{block}/{warps}"].step, device, repeats)

    for block, warps in configs:
        measure(block, warps)
    samples = interleaved(
        {f"{block}/{warps}": lambda b=block, w=warps: measure(b, w) for block, warps in configs},  # type: ignore[misc]
        seconds,
        warm_up=warm_up_seconds(device),
    )
    found = []
    for block, warps in configs:
        times, instance = samples[f"{block}/{warps}"], instances[f"{block}/{warps}"]
        rates = [instance.moved_bytes(clip=False) / s / 1e9 for s in times]
        words = {"model": model, "block": block, "num_warps": warps}
        found.append(
            {**words, "step_ms": statistic([s * 1e3 for s in times]), "gb_per_s": statistic(rates)}
        )
    return found


def step_part(suite: Suite, progress: Progress) -> Recorder:
    """Whole steps: every model and dtype mix, until the time is up."""
    part = suite.part("step")
    modes = step.MODES if suite.cuda else step.MODES[:1]
    jobs = [
        (model, mix, mode)
        for model in (("many-small",) if suite.quick else (*MODELS, WHOLE))
        for mix in (((suite.dtype, suite.dtype),) if suite.quick else MIXES)
        for mode in modes
    ]
    for number, (model, (dtype, grad_dtype), mode) in enumerate(jobs):
        shapes = shapes_of(model)
        words = f"{model} {dtype} {mode}".replace("torch.", "")
        if not suite.cuda and count(shapes) > MOST_ON_CPU:
            part.leave_out(words, f"over {MOST_ON_CPU // 10**6} M parameters, left to a GPU")
            continue
        left = suite.seconds * (STEP_SHARE - suite.share())
        if number and left <= 0:
            part.leave_out(words, f"no time left of {suite.seconds:.0f} s")
            continue
        job = step.Job(model, shapes, Case(suite.device, dtype, grad_dtype, suite.options), mode)
        seconds = min(20.0, max(1.0, 0.5 * left / (len(jobs) - number)))
        try:
            step.measure(part, suite.specs, job, seconds, progress)
        except MemoryError as error:
            part.leave_out(words, str(error))
    return part
