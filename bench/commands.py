"""What each sub-command does with its arguments: measure, show, record, draw, check. Parsing is in `cli.py`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import measure_host, record, tables
from .arguments import STDOUT
from .formula import Options
from .peers import BASELINE, OURS, Case, Entry, all_of_ours, peers
from .record import Record, Recorder
from .show import Screen

# Where a run writes to is no part of what it measured.
NOT_RECORDED = ("run", "command", "json", "plot", "out", "update", "files", "device")
FLATTEN = {"both": None, "on": True, "off": False}


def recorder_of(arguments: argparse.Namespace) -> Recorder:
    """An empty record with the command's options in it."""
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)
    options = {name: plain(value) for name, value in vars(arguments).items() if name not in NOT_RECORDED}
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


def entries_of(arguments: argparse.Namespace, recorder: Recorder) -> list[Entry]:
    """Ours and the peers that were asked for. Raises ValueError for a precision that is not known."""
    ours = all_of_ours(
        arguments.device, arguments.backend, FLATTEN[arguments.flatten], getattr(arguments, "precision", None) or ()
    )
    chosen = []
    for name, entry in peers().items():
        if arguments.peers is not None:
            if name in arguments.peers:
                chosen.append(entry)
        elif arguments.quick and entry.slow:
            recorder.leave_out(entry.name, "left out by --quick")
        else:
            chosen.append(entry)
    return [*ours, *chosen]


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
        record.write(found, arguments.json)
        if arguments.json != STDOUT:
            screen.print(f"record: {arguments.json}")
    if getattr(arguments, "plot", None):
        draw([found], arguments.plot, screen)


def draw(records: Sequence[Record], path: Path, screen: Screen) -> None:
    """Draw the records' picture, or say why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        screen.print("picture: none, because matplotlib is not installed (pip install matplotlib)")
        return
    from . import plots

    plots.draw(records, path)
    screen.print(f"picture: {path}")


def check(found: Record, limit: float | None, screen: Screen) -> int:
    """Exit code: 1 if an optimizer of ours failed, or is not `limit` times as fast as torch fused wherever measured."""
    code = 0
    for entry in found["left_out"]:
        if entry.get("failed"):
            screen.print(f"FAILED: {entry['name']}: {entry['reason']}")
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
    entries = entries_of(arguments, recorder)
    case = case_of(arguments)
    seconds = arguments.seconds or (10.0 if arguments.quick else 60.0)
    counts = arguments.tensors or measure_host.COUNTS[: 3 if arguments.quick else None]
    with screen.progress("host") as progress:
        measure_host.measure(recorder, entries, case, counts, seconds, arguments.grads == "new", progress)
    found = recorder.record()
    finish(arguments, found, screen)
    return check(found, arguments.check, screen)
