"""What each sub-command does with its arguments: measure, show, record, draw, check. Parsing is in
`cli.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import accuracy, host, memory, step, suite, tables, verify
from .arguments import STDOUT
from .harness import results
from .harness.console import Screen
from .harness.launches import interpreted
from .harness.optimizers import (
    BASELINE,
    OURS,
    Case,
    OptimizerSpec,
    all_of_ours,
    common_dtype,
    make,
    peers,
)
from .harness.oracle import Options
from .harness.results import Record, Recorder
from .harness.shapes import Shape, read_hf_config, read_shapes, shapes_of

# Where a run writes to is no part of what it measured.
NOT_RECORDED = ("run", "command", "json", "plot", "out", "update", "files", "device")
GLANCE_SECONDS = 10.0
FLATTEN = {"both": None, "on": True, "off": False}


def recorder_of(arguments: argparse.Namespace) -> Recorder:
    """An empty record with the command's options in it. Raises ValueError for a precision that is
    not known.
    """
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)
    if arguments.device.type == "cpu":
        interpreted()  # before anything imports triton
    if getattr(arguments, "dtype", torch.float32) is None:
        arguments.dtype = common_dtype(arguments.precision or ())
    options = {
        name: plain(value) for name, value in vars(arguments).items() if name not in NOT_RECORDED
    }
    return Recorder(arguments.command, options, arguments.device)


def plain(value: Any) -> Any:
    """An option as JSON takes it."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.name if isinstance(value, Path) else value


def screen_of(arguments: argparse.Namespace) -> Screen:
    """Standard output belongs to the record if that is where it goes."""
    return Screen(sys.stderr if arguments.json == STDOUT else None)


def specs_of(arguments: argparse.Namespace, recorder: Recorder) -> list[OptimizerSpec]:
    """Ours and the peers that were asked for; by default all but the slow ones.

    Raises ValueError for a precision that is not known.
    """
    ours = all_of_ours(
        arguments.device, arguments.backend, FLATTEN[arguments.flatten], arguments.precision or ()
    )
    chosen = []
    for name, spec in peers().items():
        if arguments.peers is not None:
            if name in arguments.peers:
                chosen.append(spec)
        elif spec.slow:
            recorder.leave_out(spec.name, "compiles for long: only where --peers names it")
        else:
            chosen.append(spec)
    return [*ours, *chosen]


def timed(
    specs: Sequence[OptimizerSpec], arguments: argparse.Namespace, recorder: Recorder
) -> list[OptimizerSpec]:
    """Without kernels in Triton's interpreter, whose time says nothing."""
    slow = [spec for spec in specs if spec.backend == "triton" and arguments.device.type == "cpu"]
    for spec in slow:
        recorder.leave_out(spec.name, "runs in Triton's interpreter here, whose time says nothing")
    return [spec for spec in specs if spec not in slow]


def case_of(arguments: argparse.Namespace) -> Case:
    """What is measured, from the options that name it."""
    options = Options(amsgrad=arguments.amsgrad, clip=arguments.clip)
    return Case(arguments.device, arguments.dtype, arguments.grad_dtype or arguments.dtype, options)


def finish(arguments: argparse.Namespace, found: Record, screen: Screen) -> None:
    """Show the tables, write the record, draw the picture."""
    for table in tables.tables_of(found):
        screen.table(table)
        screen.print("")
    if arguments.json:
        results.write(found, arguments.json)
        if arguments.json != STDOUT:
            screen.print(f"record: {arguments.json}")
    if getattr(arguments, "plot", None):
        draw([found], arguments.plot, screen)


def draw(records: Sequence[Record], path: Path, screen: Screen) -> None:
    """Draw the records' picture, or say why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        screen.print("picture: none, because matplotlib is not installed (pip install matplotlib)")
        return
    from .harness import plots

    plots.draw(records, path)
    screen.print(f"picture: {path}")


def failures(found: Record) -> list[dict[str, Any]]:
    """What of ours broke or was wrong, in every part of a record."""
    parts = found["results"] if found["command"] == "suite" else [found]
    return [spec for part in parts for spec in part["left_out"] if spec.get("failed")]


def check(found: Record, limit: float | None, screen: Screen) -> int:
    """Exit code: 1 if an optimizer of ours failed, or is not `limit` times as fast as torch fused
    wherever measured.
    """
    code = 0
    for spec in failures(found):
        screen.print(f"FAILED: {spec['name']}: {spec['reason']}")
        code = 1
    if limit is None:
        return code
    best: dict[str, float] = {}
    for result in found["results"]:
        if result["family"] == OURS and result["speedup"] is not None:
            case = tables.case_name(result)
            best[case] = max(best.get(case, 0.0), result["speedup"]["median"])
    if not best:
        screen.print(f"check: FAILED: nothing of ours was measured beside {BASELINE}")
        return 1
    for case, speedup in best.items():
        if speedup < limit:
            screen.print(f"check: FAILED: {case}: {speedup:.3f}x {BASELINE}, asked for {limit:g}x")
            code = 1
    if not code:
        screen.print(f"check: every case reaches {limit:g}x {BASELINE}")
    return code


def run_host(arguments: argparse.Namespace) -> int:
    """Time the host's part of a step."""
    screen, recorder = screen_of(arguments), recorder_of(arguments)
    specs, case = timed(specs_of(arguments, recorder), arguments, recorder), case_of(arguments)
    seconds = arguments.seconds or (10.0 if arguments.quick else 60.0)
    warm = arguments.caches == "warm"
    counts = arguments.tensors or host.COUNTS[: 3 if arguments.quick else None]
    if arguments.dtensors:
        specs.append(host.dtensor_spec(arguments.backend or "auto"))
    with screen.progress("host") as progress:
        host.measure(
            recorder, specs, case, counts, seconds, arguments.grads == "new", warm, progress
        )
    found = recorder.record()
    finish(arguments, found, screen)
    return check(found, arguments.check, screen)


def models_of(arguments: argparse.Namespace, default: Sequence[str]) -> dict[str, list[Shape]]:
    """Shapes by model name; `default` where none was named. Raises ValueError that says what is
    allowed.
    """
    if arguments.shapes:
        return {arguments.shapes.stem: read_shapes(arguments.shapes)}
    if arguments.hf_config:
        path = arguments.hf_config.resolve()
        return {path.stem if path.is_dir() else path.parent.name: read_hf_config(path)}
    return {name: shapes_of(name) for name in arguments.model or default}


def run_step(arguments: argparse.Namespace) -> int:
    """Time whole steps on models' parameters."""
    screen, recorder = screen_of(arguments), recorder_of(arguments)
    shapes = models_of(
        arguments, ["many-small", "resnet50"] if arguments.quick else ["gpt2", "many-small"]
    )
    specs, case = timed(specs_of(arguments, recorder), arguments, recorder), case_of(arguments)
    modes = step.MODES if arguments.device.type == "cuda" else step.MODES[:1]
    seconds = (arguments.seconds or (10.0 if arguments.quick else 60.0)) / len(shapes) / len(modes)
    with screen.progress("step") as progress:
        for name, model in shapes.items():
            for mode in modes:
                job = step.Job(name, model, case, mode)
                step.measure(recorder, specs, job, seconds, progress)
    found = recorder.record()
    finish(arguments, found, screen)
    return check(found, arguments.check, screen)


def run_memory(arguments: argparse.Namespace) -> int:
    """Measure what optimizers hold."""
    screen, recorder = screen_of(arguments), recorder_of(arguments)
    specs, case = specs_of(arguments, recorder), case_of(arguments)
    default = ["resnet50"] if arguments.quick or arguments.device.type == "cpu" else ["gpt2"]
    with screen.progress("memory") as progress:
        for name, shapes in models_of(arguments, default).items():
            job = step.Job(name, shapes, case, "eager")
            memory.measure(recorder, step.fitting(specs, job, recorder), job, progress)
    found = recorder.record()
    finish(arguments, found, screen)
    return check(found, None, screen)


def run_accuracy(arguments: argparse.Namespace) -> int:
    """Hold optimizers against float64."""
    screen, recorder = screen_of(arguments), recorder_of(arguments)
    specs = specs_of(arguments, recorder)
    dtypes = arguments.dtypes or [torch.float32, torch.bfloat16, torch.float16]
    steps = arguments.steps or (20 if arguments.quick else accuracy.STEPS)
    with screen.progress("accuracy") as progress:
        accuracy.measure(recorder, specs, arguments.device, dtypes, steps, progress)
    found = recorder.record()
    finish(arguments, found, screen)
    return check(found, None, screen)


def run_env(arguments: argparse.Namespace) -> int:
    """Say what is here: machine, versions, optimizers."""
    screen, recorder = screen_of(arguments), recorder_of(arguments)
    case = Case(arguments.device)
    for spec in [*all_of_ours(arguments.device, None, None), *peers().values()]:
        made = make(spec, [torch.nn.Parameter(torch.zeros(8, device=arguments.device))], case)
        if isinstance(made, str):
            recorder.leave_out(spec.name, made)
        else:
            recorder.results.append({"optimizer": spec.name, "family": spec.family})
    finish(arguments, recorder.record(), screen)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Check the promise on this machine; one block to paste."""
    screen, recorder = screen_of(arguments), recorder_of(arguments)
    with screen.progress("verify") as progress:
        verify.measure(recorder, arguments.device, arguments.quick, progress)
        if not arguments.quick:
            verify_step(recorder, arguments.device, progress)
    found = recorder.record()
    screen.print("```")
    screen.print("\n".join(tables.verify_lines(found)))
    screen.print("```")
    if arguments.json:
        results.write(found, arguments.json)
    return check(found, None, screen)


def verify_step(
    recorder: Recorder, device: torch.device, progress: Callable[[str, float], None]
) -> None:
    """A glance at the speed: ours beside torch fused on one model."""
    part = Recorder("step", {}, device)
    job = step.Job("resnet50", shapes_of("resnet50"), Case(device), "eager")
    specs = [*all_of_ours(device, "auto", None), peers()["torch-fused"]]
    step.measure(part, specs, job, GLANCE_SECONDS, progress)
    recorder.results += [{"check": "step", **result} for result in part.results]
    recorder.left_out += part.left_out


def run_suite(arguments: argparse.Namespace) -> int:
    """Run everything into one record."""
    screen, recorder = screen_of(arguments), recorder_of(arguments)
    specs = timed(specs_of(arguments, recorder), arguments, recorder)
    limit = suite.LIMIT_SECONDS["quick" if arguments.quick else arguments.device.type]
    options = Options(amsgrad=arguments.amsgrad, clip=arguments.clip)
    seconds = arguments.seconds or limit
    dtype = common_dtype(arguments.precision or ())
    plan = suite.Suite(
        arguments.device, specs, options, arguments.quick, arguments.sweep, seconds, dtype
    )
    with screen.progress("suite") as progress:
        suite.run(plan, recorder, progress)
    found = recorder.record()
    finish(arguments, found, screen)
    return check(found, None, screen)


def run_report(arguments: argparse.Namespace) -> int:
    """Show, draw, or write into a document what records hold."""
    screen = Screen()
    if arguments.update:
        before = arguments.update.read_text()
        after = tables.update_document(before, arguments.update.parent)
        arguments.update.write_text(after)
        screen.print(f"{arguments.update}: {'unchanged' if after == before else 'updated'}")
    found = [results.read(path) for path in arguments.files]
    for one in found:
        if arguments.markdown:
            screen.print(tables.markdown(one))
        elif one["command"] == "verify":
            screen.print("\n".join(tables.verify_lines(one)))
        else:
            for table in tables.tables_of(one):
                screen.table(table)
                screen.print("")
    if arguments.plot:
        draw(found, arguments.plot, screen)
    return 0
