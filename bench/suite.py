"""`suite`: everything, in one record, under eight minutes on a GPU.

Each part is a record of its own in `results`: those of `verify`, `host`, `accuracy`, `step` and
`memory`, and three more:
    "tests"    {"passed": bool, "summary": text}: the native tests, where pytest and a checkout are
    "ceiling"  {"gb_per_s": statistic, "dtype"}: a kernel with the update's accesses and no
               arithmetic; "copy_gb_per_s": statistic of `copy_` in the same rounds; the faster of
               the two is what an update can reach
    "sweep"    {"model", "block", "num_warps", "step_ms": statistic, "gb_per_s": statistic}: on
               request
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import accuracy, host, memory, step, verify
from .harness.console import Progress, Table, spread, three_digits
from .harness.launches import launch_shape
from .harness.optimizers import Case, OptimizerSpec, common_dtype, ours
from .harness.oracle import AdamWOptions
from .harness.results import Record, Recorder, Result, left_out_lines
from .harness.rotation import Job
from .harness.session import Session, TableMaker
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
from .harness.workload import Instance, instantiate, make_params, released

SECONDS, QUICK_SECONDS = 450.0, 45.0
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
    "llama-3-8b",
)
F32, BF16 = torch.float32, torch.bfloat16
MIXES = ((F32, F32), (BF16, BF16), (BF16, F32))
MOST_ON_CPU = 200_000_000
CEILING_NUMEL = 1 << 28
SWEEP = tuple((block, warps) for block in (512, 1024, 2048, 4096) for warps in (4, 8))
TESTS_SECONDS = 150
# Of the time, when the last model starts; memory comes after.
STEP_SHARE = 0.9


@dataclass
class Suite:
    """What is run, and until when.

    dtype: of parameters and gradients, where one mix is all that is measured.
    """

    device: torch.device
    specs: Sequence[OptimizerSpec]
    options: AdamWOptions
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


def run(arguments: argparse.Namespace) -> int:
    """Run everything into one record; returns the exit code."""
    session = Session(arguments)
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    suite = Suite(
        session.device,
        session.timed_specs(),
        AdamWOptions(amsgrad=arguments.amsgrad, clip=arguments.clip),
        arguments.quick,
        arguments.sweep,
        seconds,
        common_dtype(arguments.precision or ()),
    )
    with session.measuring() as progress:
        run_parts(suite, session.recorder, progress)
    return session.finish(tables)


def run_parts(suite: Suite, recorder: Recorder, progress: Progress) -> None:
    """All parts in turn, each a record in `recorder.results`, as far as an interrupt lets them."""
    for name, part in PARTS.items():
        if name == "sweep" and not suite.sweep:
            recorder.leave_out("sweep", "only with --sweep")
            continue

        def tell(text: str, share: float, name: str = name) -> None:
            progress(f"{name}: {text}", min(1.0, suite.share()))

        own = Recorder(name, {}, suite.device)
        try:
            part(suite, own, tell)
        finally:
            recorder.results.append(own.record())


def verify_part(suite: Suite, own: Recorder, progress: Progress) -> None:
    """The hashes and the copy bandwidth."""
    verify.measure(own, suite.device, suite.quick, progress)


def tests_part(suite: Suite, own: Recorder, progress: Progress) -> None:
    """The native tests, in a process of their own."""
    root = Path(__file__).resolve().parent.parent
    if not suite.cuda:
        reason = "native tests need a GPU; `make test` runs the others"
    elif importlib.util.find_spec("pytest") is None:
        reason = "not installed: pip install pytest hypothesis expecttest"
    elif not (root / "tests" / "conftest.py").is_file():
        reason = "there is no checkout here"
    else:
        progress("pytest -m gpu", 0.0)
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                command, cwd=root, capture_output=True, text=True, timeout=TESTS_SECONDS
            )
        except subprocess.TimeoutExpired:
            reason = f"took longer than {TESTS_SECONDS} s"
        else:
            text = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
            own.results.append({"passed": done.returncode == 0, "summary": text})
            if done.returncode:
                own.leave_out("tests", text, failed=True)
            return
    own.leave_out("tests", reason)


def ceiling_part(suite: Suite, own: Recorder, progress: Progress) -> None:
    """The bandwidth of the update's accesses alone."""
    if not suite.cuda:
        own.leave_out("ceiling", "a Triton kernel's speed needs a GPU")
        return
    progress("four reads, three writes", 0.0)
    own.arguments = {"numel": CEILING_NUMEL}
    own.results.append(measure_ceiling(suite.device, CEILING_NUMEL))


def measure_ceiling(device: torch.device, numel: int, seconds: float = 2.0) -> Result:
    """GB/s of `move`, and of `copy_`."""
    from .harness.stream import AccessBandwidth

    with released():
        limits: dict[str, Bandwidth] = {
            "gb_per_s": AccessBandwidth(device, numel),
            "copy_gb_per_s": CopyBandwidth(device),
        }
        measures = {name: limit.measure for name, limit in limits.items()}
        samples = interleaved(measures, seconds, min_rounds=5, warm_up=warm_up_seconds(device))
        rates = {name: list(map(limit.gb_per_s, samples[name])) for name, limit in limits.items()}
    return {"dtype": "float32", **{name: statistic(own) for name, own in rates.items()}}


def host_part(suite: Suite, own: Recorder, progress: Progress) -> None:
    """Python time per step."""
    counts = host.COUNTS[: 2 if suite.quick else None]
    seconds = 0.07 * suite.seconds
    host.measure(own, suite.specs, suite.case(), counts, seconds, host.Conditions(), progress)


def accuracy_part(suite: Suite, own: Recorder, progress: Progress) -> None:
    """Errors against float64."""
    dtypes = (suite.dtype,) if suite.quick else (F32, BF16)
    steps, numel = (10, 1000) if suite.quick else (accuracy.STEPS, accuracy.NUMEL)
    accuracy.measure(own, suite.specs, suite.device, dtypes, steps, progress, numel)


def memory_part(suite: Suite, own: Recorder, progress: Progress) -> None:
    """State and peaks."""
    model = "gpt2/64" if suite.quick else "resnet50"
    job = Job(model, shapes_of(model), suite.case(), "eager")
    memory.measure(own, suite.specs, job, progress)


def sweep_part(suite: Suite, own: Recorder, progress: Progress) -> None:
    """The update under other launch sizes."""
    if not suite.cuda:
        own.leave_out("sweep", "a launch's speed needs a GPU")
        return
    for model in ("gpt2", "many-small"):
        progress(model, 0.0)
        with released():
            own.results += measure_sweep(suite.device, model, shapes_of(model), SWEEP)


def measure_sweep(
    device: torch.device,
    model: str,
    shapes: Sequence[Shape],
    configs: Sequence[tuple[int, int]],
    seconds: float = 5.0,
    repeats: int = 20,
) -> list[Result]:
    """Time per step and bandwidth of every (block, num_warps), interleaved."""
    case = Case(device)
    instances: dict[str, Instance] = {}
    measures: dict[str, Callable[[], float]] = {}
    for block, warps in configs:
        instance = instantiate(ours("triton", flatten=False), make_params(shapes, case), case)
        if isinstance(instance, str):
            raise RuntimeError(instance)

        def measure(block: int = block, warps: int = warps, own: Instance = instance) -> float:
            with launch_shape(block, warps):
                return seconds_of(own.step, device, repeats)

        name = f"{block}/{warps}"
        instances[name], measures[name] = instance, measure
        measure()  # compiles
    samples = interleaved(measures, seconds, warm_up=warm_up_seconds(device))
    measured = []
    for block, warps in configs:
        name = f"{block}/{warps}"
        moved = instances[name].moved_bytes(clip=False)
        measured.append(
            {
                "model": model,
                "block": block,
                "num_warps": warps,
                "step_ms": statistic([s * 1e3 for s in samples[name]]),
                "gb_per_s": statistic([moved / s / 1e9 for s in samples[name]]),
            }
        )
    return measured


def step_part(suite: Suite, own: Recorder, progress: Progress) -> None:
    """Whole steps: every model and dtype mix, until the time is up."""
    modes = step.MODES if suite.cuda else step.MODES[:1]
    jobs = [
        (model, dtype, grad_dtype, mode)
        for model in (MODELS[:1] if suite.quick else MODELS)
        for dtype, grad_dtype in (((suite.dtype, suite.dtype),) if suite.quick else MIXES)
        for mode in modes
    ]
    for number, (model, dtype, grad_dtype, mode) in enumerate(jobs):
        shapes = shapes_of(model)
        words = f"{model} {dtype} {mode}".replace("torch.", "")
        if not suite.cuda and count(shapes) > MOST_ON_CPU:
            own.leave_out(words, f"over {MOST_ON_CPU // 10**6} M parameters, left to a GPU")
            continue
        left = suite.seconds * (STEP_SHARE - suite.share())
        if number and left <= 0:
            own.leave_out(words, f"no time left of {suite.seconds:.0f} s")
            continue
        job = Job(model, shapes, Case(suite.device, dtype, grad_dtype, suite.options), mode)
        seconds = min(20.0, max(1.0, 0.5 * left / (len(jobs) - number)))
        try:
            step.measure(own, suite.specs, job, seconds, progress)
        except MemoryError as error:
            own.leave_out(words, str(error))


PARTS: dict[str, Callable[[Suite, Recorder, Progress], None]] = {
    "verify": verify_part,
    "tests": tests_part,
    "ceiling": ceiling_part,
    "host": host_part,
    "accuracy": accuracy_part,
    "sweep": sweep_part,
    "step": step_part,
    "memory": memory_part,
}


# Tables.


def tests_tables(record: Record) -> list[Table]:
    """How the native tests ended."""
    rows = [[result["summary"]] for result in record["results"]]
    return [Table("native tests", ["result"], [*rows])]


def ceiling_tables(record: Record) -> list[Table]:
    """The bandwidth of the update's accesses, and of a copy."""
    rows = [
        [r["dtype"], spread(r["gb_per_s"]), spread(r.get("copy_gb_per_s"))]
        for r in record["results"]
    ]
    title = "four reads and three writes per element, no arithmetic"
    return [Table(title, ["dtype", "GB/s", "copy GB/s"], [*rows])]


def sweep_tables(record: Record) -> list[Table]:
    """Launch sizes, fastest first."""
    results = sorted(record["results"], key=lambda r: (r["model"], r["step_ms"]["median"]))
    rows = [
        [
            *(r["model"], f"{r['block']}", f"{r['num_warps']}", spread(r["step_ms"])),
            three_digits(r["gb_per_s"]["median"]),
        ]
        for r in results
    ]
    return [Table("launch sizes", ["model", "elements", "warps", "ms per step", "GB/s"], [*rows])]


PART_TABLES: dict[str, TableMaker] = {
    "verify": verify.tables,
    "tests": tests_tables,
    "ceiling": ceiling_tables,
    "host": host.tables,
    "accuracy": accuracy.tables,
    "sweep": sweep_tables,
    "step": step.tables,
    "memory": memory.tables,
}


def tables(record: Record) -> list[Table]:
    """Those of all parts; what was left out, once."""
    found: list[Table] = []
    for part in record["results"]:
        found += PART_TABLES[part["command"]](part) if part["results"] else []
        said = {note for table in found for note in table.notes}
        if found:
            notes = [*part["notes"], *left_out_lines(part)]
            found[-1].notes += [note for note in notes if note not in said]
    return found or [Table("nothing was measured", ["result"])]
