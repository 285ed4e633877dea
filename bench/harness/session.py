"""What the commands do around their measuring: from arguments to optimizers and models, and from
results to tables, a record, a picture and an exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine, results
from .console import Progress, Screen, Table
from .launches import interpreted
from .optimizers import BASELINE, OURS, Case, OptimizerSpec, common_dtype, peers, variants
from .oracle import AdamWOptions
from .results import STDOUT, Record, Recorder, Result
from .shapes import Shape, read_hf_config, read_shapes, shapes_of

# Where a run writes to is no part of what it measured.
NOT_RECORDED = ("command", "json", "plot", "device")
FLATTEN = {"both": None, "on": True, "off": False}
INTERRUPTED = 130  # as a shell has it for a process that Ctrl-C ended

TableMaker = Callable[[Record], list[Table]]


class Session:
    """One run of a measuring command.

    Raises ValueError for a precision that is not known.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.begin = time.monotonic()
        self.arguments, self.device = arguments, arguments.device
        if getattr(arguments, "threads", None):
            torch.set_num_threads(arguments.threads)
        if self.device.type == "cpu":
            interpreted()  # before anything imports triton
        if getattr(arguments, "dtype", torch.float32) is None:
            arguments.dtype = common_dtype(arguments.precision or ())
        options = {k: plain(v) for k, v in vars(arguments).items() if k not in NOT_RECORDED}
        self.recorder = Recorder(arguments.command, options, self.device)
        # Standard output belongs to the record if that is where it goes.
        self.screen = Screen(sys.stderr if arguments.json == STDOUT else None)
        self.interrupted = False

    def seconds_left(self, limit: float) -> float:
        """Of `limit` seconds since the session began."""
        return limit - (time.monotonic() - self.begin)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Progress]:
        """Show progress while it lasts. An interrupt ends it and keeps what was measured."""
        try:
            with self.screen.progress(self.arguments.command) as progress:
                yield progress
        except KeyboardInterrupt:
            if not self.recorder.results:
                raise
            self.interrupt()

    def interrupt(self) -> None:
        """Note that this run measured less than it was asked for."""
        self.interrupted = True
        self.recorder.notes.append("interrupted: only what was measured until then is here")

    def finish(self, maker: TableMaker, check: float | None = None) -> int:
        """Show the tables, write the record, draw the picture; returns the exit code."""
        record = self.recorder.record()
        for table in all_tables(record, maker):
            self.screen.table(table)
            self.screen.print("")
        self.write(record)
        if getattr(self.arguments, "plot", None):
            draw([record], self.arguments.plot, self.screen)
        return self.exit_code(record, check)

    def write(self, record: Record) -> None:
        """Write the record where `--json` says."""
        path = self.arguments.json
        if path:
            results.write(record, path)
        if path and path != STDOUT:
            self.screen.print(f"record: {path}")

    def exit_code(self, record: Record, check: float | None = None) -> int:
        """What the command returns: interrupted, failed, or well."""
        if self.interrupted:
            print("fused-adam-bench: interrupted", file=sys.stderr)
            return INTERRUPTED
        failed = results.failures(record)
        for entry in failed:
            self.screen.print(f"FAILED: {entry['name']}: {entry['reason']}")
        missed = [] if check is None else missed_checks(record["results"], check)
        for line in missed:
            self.screen.print(f"check: FAILED: {line}")
        if check is not None and not (failed or missed):
            self.screen.print(f"check: every case reaches {check:g}x {BASELINE}")
        return 1 if failed or missed else 0

    # What was asked for.

    def specs(self) -> list[OptimizerSpec]:
        """Ours and the peers that were asked for; by default all but those that compile for long.

        Raises ValueError for a precision that is not known.
        """
        arguments = self.arguments
        specs = variants(
            self.device, arguments.backend, FLATTEN[arguments.flatten], arguments.precision or ()
        )
        for name, spec in peers().items():
            if arguments.peers is None and spec.slow:
                reason = "compiles for long: only where --peers names it"
                self.recorder.leave_out(spec.name, reason)
            elif arguments.peers is None or name in arguments.peers:
                specs.append(spec)
        return specs

    def timed_specs(self) -> list[OptimizerSpec]:
        """`specs` without kernels in Triton's interpreter, whose time says nothing."""
        specs = []
        for spec in self.specs():
            if spec.backend == "triton" and self.device.type == "cpu":
                reason = "runs in Triton's interpreter here, whose time says nothing"
                self.recorder.leave_out(spec.name, reason)
            else:
                specs.append(spec)
        return specs

    def case(self) -> Case:
        """What is stepped on, from the options that say so."""
        arguments = self.arguments
        options = AdamWOptions(
            amsgrad=arguments.amsgrad,
            clip=arguments.clip,
            ema_decay=getattr(arguments, "ema", None),
        )
        grad_dtype = arguments.grad_dtype or arguments.dtype
        return Case(self.device, arguments.dtype, grad_dtype, options)

    def models(self, default: Sequence[str]) -> dict[str, list[Shape]]:
        """Shapes by model name; `default` where none was named. Raises ValueError."""
        arguments = self.arguments
        if arguments.shapes:
            return {arguments.shapes.stem: read_shapes(arguments.shapes)}
        if arguments.hf_config:
            path = arguments.hf_config.resolve()
            name = path.stem if path.is_dir() else path.parent.name
            return {name: read_hf_config(path)}
        return {name: shapes_of(name) for name in arguments.model or default}


@contextlib.contextmanager
def on_interrupt(handler: Callable[..., object]) -> Iterator[None]:
    """While it lasts Ctrl-C does this."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread has a say in signals
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while it lasts; processes started meanwhile never see one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    arrived: list[int] = []
    # Children inherit the mask. Another thread may still take the signal, and Python then runs the
    # handler in this one: it must not raise half-way through the start of a process.
    with on_interrupt(lambda number, frame: arrived.append(number)):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if arrived:
        raise KeyboardInterrupt


def plain(value: Any) -> Any:
    """An option as JSON takes it."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.name if isinstance(value, Path) else value


def all_tables(record: Record, maker: TableMaker) -> list[Table]:
    """All tables of a record; below the last one what was left out, and where it ran."""
    tables = maker(record) if record["results"] else [Table("nothing was measured", ["result"])]
    where = f"machine: {machine.line(record['machine'])}"
    tables[-1].notes += [*record["notes"], *results.left_out_lines(record), where]
    return tables


def draw(records: Sequence[Record], path: Path, screen: Screen) -> None:
    """Draw the records' picture, or say why there is none. Raises ValueError, OSError."""
    if importlib.util.find_spec("matplotlib") is None:
        screen.print("picture: none, because matplotlib is not installed (pip install matplotlib)")
        return
    from . import plots

    plots.draw(records, path)
    screen.print(f"picture: {path}")


def missed_checks(measured: Sequence[Result], limit: float) -> list[str]:
    """A line per case in which the best of ours is not `limit` times as fast as torch fused."""
    best: dict[str, float] = {}
    for result in measured:
        if result["family"] == OURS and result["speedup"] is not None:
            words = [result[key] for key in ("model", "dtype", "mode") if key in result]
            case = " ".join(words) or f"{result['tensors']} tensors"
            best[case] = max(best.get(case, 0.0), result["speedup"]["median"])
    if not best:
        return [f"nothing of ours was measured with {BASELINE}"]
    return [
        f"{case}: {speedup:.3f}x {BASELINE}, asked for {limit:g}x"
        for case, speedup in best.items()
        if speedup < limit
    ]
