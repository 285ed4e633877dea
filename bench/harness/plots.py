"""Pictures of records: bandwidth bars beside the copy limit, host cost curves. Needs matplotlib;
measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import tables
from ..demo_picture import GREY, INK, STYLE
from . import machine
from .optimizers import OURS, TORCH
from .results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {OURS: "#0b63c5", TORCH: "#b4bac6"}
OTHER_COLOR = "#e0a458"
LIMIT_COLOR = "#c9372c"
MARKERS = "osD^vP*X"


def drawable(records: Sequence[Record]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The panels: ("host", results) per record, ("step", results) per model, case and mode."""
    panels: list[tuple[str, list[dict[str, Any]]]] = []
    for record in records:
        if record["command"] == "host" and record["results"]:
            panels.append(("host", record["results"]))
        elif record["command"] == "step":
            groups: dict[str, list[dict[str, Any]]] = {}
            for result in record["results"]:
                groups.setdefault(tables.step_title(result), []).append(result)
            panels += [("step", results) for results in groups.values()]
        elif record["command"] == "suite":
            panels += drawable(record["results"])
    return panels


def draw(records: Sequence[Record], path: Path) -> None:
    """Write one picture of all `step` and `host` results. Raises ValueError if there are none,
    OSError.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = drawable(records)
    if not panels:
        raise ValueError("there is nothing to draw: no results of step or host")
    heights = [1.0 + 0.42 * (len(results) if kind == "step" else 11) for kind, results in panels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, sum(heights) + 0.6), dpi=130, layout="constrained")
        grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
        for number, (kind, results) in enumerate(panels):
            (draw_host if kind == "host" else draw_step)(figure.add_subplot(grid[number]), results)
        figure.supxlabel(machine.line(records[0]["machine"]), fontsize=8, color=GREY)
        figure.savefig(path, format="png")


def draw_step(axes: Axes, results: list[dict[str, Any]]) -> None:
    """A bar per optimizer: the bandwidth it reaches, with the copy bandwidth as a line."""
    results = sorted(results, key=lambda result: result["gb_per_s"]["median"])
    for place, result in enumerate(results):
        rate = result["gb_per_s"]
        around = [[rate["median"] - rate["low"]], [rate["high"] - rate["median"]]]
        axes.barh(
            place,
            rate["median"],
            xerr=around,
            color=COLORS.get(result["family"], OTHER_COLOR),
            ecolor=GREY,
        )
        text = f" {tables.three_digits(result['step_ms']['median'])} ms, {tables.times(result['speedup'])}"
        axes.text(rate["high"], place, text, va="center", color=INK, fontsize=9)
    ceiling = results[0].get("ceiling_gb_per_s")  # records of earlier versions have none
    limit = (ceiling or results[0]["copy_gb_per_s"])["median"]
    name = "ceiling" if results[0].get("move_gb_per_s") else "copy"
    axes.axvline(
        limit, color=LIMIT_COLOR, linewidth=1.5, label=f"{name}: {tables.three_digits(limit)} GB/s"
    )
    axes.set_yticks(range(len(results)), [result["optimizer"] for result in results])
    axes.set_xlim(0, 1.25 * max(limit, *(result["gb_per_s"]["high"] for result in results)))
    axes.set_xlabel(
        "GB/s that a perfect step would move (right of it: time, and times as fast as torch fused)"
    )
    axes.set_title(tables.step_title(results[0]), loc="left", fontsize=11)
    axes.legend(loc="lower right")


def draw_host(axes: Axes, results: list[dict[str, Any]]) -> None:
    """A curve per optimizer: time per step against the number of tensors."""
    for number, name in enumerate(tables.unique(results, "optimizer")):
        own = [result for result in results if result["optimizer"] == name]
        axes.plot(
            [result["tensors"] for result in own],
            [result["step_us"]["median"] for result in own],
            marker=MARKERS[number % len(MARKERS)],
            color=COLORS.get(own[0]["family"], OTHER_COLOR),
            linestyle="-" if own[0]["family"] == OURS else "--",
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("number of tensors")
    axes.set_ylabel("us per step")
    axes.set_title("What a step costs on the host", loc="left", fontsize=11)
    axes.legend(loc="upper left", ncols=2, fontsize=8)
