"""What the demo shows on the terminal: progress, table, verdict; through rich, or as plain text
without it.

No training and no judgement here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence

from .demo import FLAT, FUSED, LAST_STEPS, TORCH, Outcome, Run
from .verdict import MARGIN

Advance = Callable[[Sequence[Run]], None]

COLUMNS = (
    *("run", "train\nloss", "valid.\nloss", "step\nms", "optim.\nshare"),
    *("state\nB/par.", "state\nMB", "same\nbits"),
)
ON_CPU = "Without a GPU FusedAdamW runs its reference in plain torch, made for equal bits, not for speed."


def has_rich() -> bool:
    """Whether rich is there to draw bars and tables."""
    return importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Advance]:
    """Show the training as it goes; yields what to call after every step."""
    if not has_rich():
        yield lambda runs: _print_progress(runs, steps)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<19}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(runs: Sequence[Run]) -> None:
            for run in runs:
                if run.name not in tasks:
                    tasks[run.name] = bars.add_task(run.name, total=steps, loss="")
                loss = f"{run.losses[-1]:.4f}"
                bars.update(tasks[run.name], completed=len(run.losses), loss=loss)

        yield advance


def _print_progress(runs: Sequence[Run], steps: int) -> None:
    done = len(runs[0].losses)
    if done == steps or done % max(1, steps // 10) == 0:
        print(
            f"step {done}/{steps}  "
            + "  ".join(f"{run.name} {run.losses[-1]:.4f}" for run in runs),
            flush=True,
        )


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """The table's cells: one row per optimizer, in the order of COLUMNS."""
    same = "yes" if outcome.same_bits else "NO"
    return [
        (
            name,
            f"{run.train_loss:.6f}",
            f"{run.validation_loss:.6f}",
            f"{statistics.median(run.step_ms):.1f}",
            f"{run.optimizer_share:.1%}",
            f"{run.state_bytes / run.parameters:.3f}",
            f"{run.state_bytes / 1e6:.2f}",
            "-" if name == TORCH else same,
        )
        for name, run in ((name, outcome.runs[name]) for name in (TORCH, FUSED, FLAT))
    ]


def print_table(outcome: Outcome) -> None:
    """Print one row per optimizer, and on a CPU what its times do not say."""
    title = f"{outcome.device_name}; train loss: mean of the last {min(LAST_STEPS, outcome.steps)} of {outcome.steps} steps"
    (_print_rich if has_rich() else _print_plain)(title, rows(outcome))
    if outcome.device.type == "cpu":
        print(ON_CPU)


def _print_rich(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _print_plain(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    lines = [tuple(column.replace("\n", " ") for column in COLUMNS), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(title)
    for line in lines:
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def verdict_text(outcome: Outcome) -> str:
    """The verdict and where it comes from, with its numbers."""
    verdict = outcome.verdict
    agree = "agrees" if verdict.agree else "DOES NOT AGREE"
    same = "are equal in every bit" if outcome.same_bits else "DIFFER IN BITS"
    return (
        f"{FUSED} {agree} with {TORCH}: the largest |difference| / tolerance is {verdict.ratio:,.2f}, at step "
        f"{verdict.step} ({verdict.difference:.1e} of {verdict.tolerance:.1e} nats).\n"
        f"The tolerance is {MARGIN:g} times what a learning rate off by four float32 roundings does: the yardstick.\n"
        f"flatten=True and False {same}: losses, weights and moments of all {outcome.steps} steps."
    )
