"""Pictures of records, with matplotlib. Nothing is measured, trained or judged here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import machine
from .console import three_digits, times
from .optimizers import OURS, TORCH
from .oracle import MARGIN, loss_tolerances, resolution
from .results import Record, Result, case_title, unique

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#1f2430", "#6b7280", "#e3e6ec"
BLUE, RED, SILVER, SAND, AMBER = "#0b63c5", "#c9372c", "#b4bac6", "#e0a458", "#ffb000"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "legend.frameon": False,
}
COLORS = {OURS: BLUE, TORCH: SILVER}
MARKERS = "osD^vP*X"
SMOOTH_STEPS = 15


def draw(records: Sequence[Record], path: Path) -> None:
    """Write one picture as a PNG: of a demo, of a convergence run, or of all step and host results.

    Raises ValueError if there is nothing to draw, OSError if the file cannot be written.
    """
    import matplotlib

    alone = {"demo": demo_figure, "convergence": convergence_figure, "recipes": convergence_figure}
    maker = alone.get(records[0]["command"]) if len(records) == 1 else None
    with matplotlib.rc_context(STYLE):
        figure = maker(records[0]) if maker and records[0]["results"] else panel_figure(records)
        figure.savefig(path, format="png")


# Panels of step and host.


def drawable(records: Sequence[Record]) -> list[tuple[str, list[Result], str]]:
    """The panels, with the device: "host" per record, "step" per model, case and mode."""
    panels: list[tuple[str, list[Result], str]] = []
    for record in records:
        device = record["machine"]["device"]
        if record["command"] == "host" and record["results"]:
            panels.append(("host", record["results"], device))
        elif record["command"] == "step":
            groups: dict[str, list[Result]] = {}
            for result in record["results"]:
                groups.setdefault(case_title(result), []).append(result)
            panels += [("step", results, device) for results in groups.values()]
        elif record["command"] == "suite":
            panels += drawable(record["results"])
    return panels


def panel_figure(records: Sequence[Record]) -> Figure:
    """One panel below the other."""
    from matplotlib.figure import Figure

    panels = drawable(records)
    if not panels:
        raise ValueError("there is nothing to draw: no results of step or host")
    heights = [1.3 + 0.42 * (len(own) if kind == "step" else 11) for kind, own, _ in panels]
    figure = Figure(figsize=(10, sum(heights) + 0.6), dpi=130, layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for number, (kind, results, device) in enumerate(panels):
        axes = figure.add_subplot(grid[number])
        if kind == "host":
            draw_host(axes, results)
        else:
            draw_step(axes, results, device)
    figure.supxlabel(machine.line(records[0]["machine"]), fontsize=8, color=GREY)
    return figure


def draw_step(axes: Axes, results: list[Result], device: str) -> None:
    """A bar per optimizer: the bandwidth it reaches, with the memory's limit as a line."""
    results = sorted(results, key=lambda result: result["gb_per_s"]["median"])
    for place, result in enumerate(results):
        rate = result["gb_per_s"]
        around = [[rate["median"] - rate["low"]], [rate["high"] - rate["median"]]]
        color = COLORS.get(result["family"], SAND)
        axes.barh(place, rate["median"], xerr=around, color=color, ecolor=GREY)
        speed = times(result["speedup"])
        text = f" {three_digits(result['step_ms']['median'])} ms" + f", {speed}" * (speed != "-")
        axes.text(rate["high"], place, text, va="center", color=INK, fontsize=9)
    ceiling = results[0].get("ceiling_gb_per_s")  # records of earlier versions have none
    limit = (ceiling or results[0]["copy_gb_per_s"])["median"]
    name = "the faster of a copy and the update's accesses alone"
    name = name if results[0].get("move_gb_per_s") else "copy of a large buffer"
    label = f"{name}: {three_digits(limit)} GB/s"
    if device == "cpu" and any(result["gb_per_s"]["median"] > limit for result in results):
        label += " (bytes read and written)\nA bar may pass this line: before a CPU writes a copy,"
        label += "\nit reads the memory it will overwrite; an update in place does not."
    axes.axvline(limit, color=RED, linewidth=1.5, label=label)
    axes.set_yticks(range(len(results)), [result["optimizer"] for result in results])
    axes.set_xlim(0, 1.25 * max(limit, *(result["gb_per_s"]["high"] for result in results)))
    axes.set_xlabel(
        "GB/s that a perfect step would move (right of it: time, and times as fast as torch fused)"
    )
    axes.set_title(case_title(results[0]), loc="left", fontsize=11)
    # Below the axis: inside, it would hide bars.
    # On white, so that the line behind it does not cross out words.
    white = {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 1.0}
    axes.legend(loc="lower right", fontsize=9, **white)


def draw_host(axes: Axes, results: list[Result]) -> None:
    """A curve per optimizer: time per step against the number of tensors."""
    for number, name in enumerate(unique(results, "optimizer")):
        own = [result for result in results if result["optimizer"] == name]
        axes.plot(
            [result["tensors"] for result in own],
            [result["step_us"]["median"] for result in own],
            marker=MARKERS[number % len(MARKERS)],
            color=COLORS.get(own[0]["family"], SAND),
            linestyle="-" if own[0]["family"] == OURS else "--",
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("number of tensors")
    axes.set_ylabel("us per step")
    axes.set_title("What a step costs on the host", loc="left", fontsize=11)
    axes.legend(loc="upper left", ncols=2, fontsize=8)


# The demo: loss curves, and how far they lie apart.


def finite(value: float | None) -> float:
    """A loss of a record, where None is one that was not finite."""
    return math.nan if value is None else value


def smooth(values: Sequence[float], width: int = SMOOTH_STEPS) -> list[float]:
    """The mean over `width` steps around each step: fewer at the start, where losses fall fast, and
    at the end.
    """
    means = []
    for i in range(len(values)):
        reach = min(width // 2, i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def demo_figure(record: Record) -> Figure:
    """Loss curves above, their distances below."""
    from matplotlib.figure import Figure

    [result] = record["results"]
    figure = Figure(figsize=(10, 9.2), dpi=150)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.095, right=0.97, top=0.865, bottom=0.125, hspace=0.17)
    figure.text(0.02, 0.951, demo_title(result["verdict"]), fontsize=17, fontweight="bold")
    subtitle = (
        f"GPT of {result['parameters'] / 1e6:.1f} M parameters learning the characters of Python's "
        f"standard library; seed {result['seed']}, {result['device']}"
    )
    figure.text(0.02, 0.92, subtitle, color=GREY)
    losses = {name: list(map(finite, run["losses"])) for name, run in result["runs"].items()}
    draw_losses(upper, result, losses)
    draw_differences(lower, losses)
    lower.set_xlabel("training step")
    lower.set_xlim(0, result["steps"] + 1)
    lower.locator_params(axis="x", integer=True)
    figure.align_ylabels([upper, lower])
    yardstick = (
        r"The yardstick is torch's AdamW with its learning rate times $1 + 2^{-22}$: as far off as "
        "the four float32 roundings\nof a step's scalars can be. What that does to the loss is "
        f"what rounding explains; {MARGIN:g} times its largest effect is allowed."
    )
    figure.text(0.095, 0.02, yardstick, color=GREY, fontsize=9.5, linespacing=1.5)
    return figure


def demo_title(verdict: dict[str, Any]) -> str:
    """The outcome in one line."""
    if not verdict["agree"]:
        ratio = "far beyond" if verdict["ratio"] is None else f"{verdict['ratio']:,.1f} times"
        return f"FusedAdamW leaves torch's curve: {ratio} the tolerance"
    if not verdict["same_bits"]:
        return "FusedAdamW follows torch's AdamW, but flatten=True changes bits"
    return "Three optimizers, one curve: FusedAdamW follows torch's AdamW"


# Widest first: three curves that lie on one another must all be seen.
LINES: tuple[dict[str, Any], ...] = (
    {"color": SILVER, "linewidth": 8, "solid_capstyle": "round"},
    {"color": BLUE, "linewidth": 3},
    {"color": AMBER, "linewidth": 1.6, "linestyle": (0, (4, 3))},
)


def draw_losses(axes: Axes, result: Result, losses: dict[str, list[float]]) -> None:
    """Torch's curve and ours, smoothed, over torch's single steps."""
    steps = range(1, result["steps"] + 1)
    for (name, own), style in zip(losses.items(), LINES, strict=False):
        end = finite(result["runs"][name]["train_loss"])
        axes.plot(steps, smooth(own), label=f"{name}: {end:.6f} at the end", zorder=3, **style)
    reference = next(iter(losses.values()))
    axes.plot(steps, reference, color=GREY, linewidth=0.7, alpha=0.55, label="single steps")
    axes.set_title(f"Training loss, mean of {SMOOTH_STEPS} steps", loc="left", fontsize=12)
    axes.set_ylabel("loss (nats per character)")
    axes.legend(loc="upper right", handlelength=3.5)


def draw_differences(axes: Axes, losses: dict[str, list[float]]) -> None:
    """Each run's distance from torch's loss, the yardstick's, and the tolerance."""
    (_, reference), (fused, ours), (flat, flattened), (_, yardstick) = losses.items()
    steps = range(1, len(reference) + 1)
    limits = loss_tolerances(reference, yardstick)
    # A log axis has no zero: equal losses are drawn on a line of their own, below the smallest
    # difference there is.
    equal = resolution(min(filter(math.isfinite, reference), default=1.0)) / 4

    def dots(own: Sequence[float], label: str, color: str, size: float) -> float:
        distances = [max(abs(a - b), equal) for a, b in zip(own, reference, strict=True)]
        axes.plot(steps, distances, "o", c=color, ms=size, mew=0, label=label)
        return max(filter(math.isfinite, distances), default=equal)

    axes.set_yscale("log")
    dots(yardstick, "yardstick: what rounding may do", "#a9b0bd", 3.2)
    top = 100 * max(*filter(math.isfinite, limits), dots(ours, fused, BLUE, 6), equal)
    dots(flattened, flat, AMBER, 2.6)
    axes.fill_between(steps, limits, top, color="#fbe0dd", linewidth=0)
    label = f"tolerance: {MARGIN:g} $\\times$ the yardstick's largest so far"
    axes.plot(steps, limits, color=RED, linewidth=1.5, label=label)
    axes.set_ylim(equal / 2, top)
    axes.set_yticks([equal, *(10.0**k for k in range(-7, 1) if 10.0**k < top)])
    axes.yaxis.set_major_formatter(
        lambda y, _: "equal" if y == equal else f"$10^{{{round(math.log10(y))}}}$"
    )
    axes.minorticks_off()
    axes.set_title("How far each step's loss lies from torch's", loc="left", fontsize=12)
    axes.set_ylabel("|loss $-$ torch's loss| (nats)")
    axes.legend(loc="upper left", ncols=2, handlelength=1.5)


# Convergence: how far each recipe ends from fp32 AdamW, and how it gets there.


def convergence_figure(record: Record) -> Figure:
    """Losses at the end above, on the way below."""
    from matplotlib.figure import Figure

    results, options = record["results"], record["arguments"]
    rows = 0.36 * len(results)
    figure = Figure(figsize=(10, 3.9 + rows), dpi=110)
    upper, lower = figure.subplots(2, 1, height_ratios=[rows, 2.4])
    figure.subplots_adjust(left=0.235, right=0.97, top=0.83, bottom=0.1, hspace=0.55)
    title = "How far from fp32 AdamW does each precision recipe end?"
    figure.text(0.02, 0.94, title, fontsize=16, fontweight="bold")
    text = (
        f"GPT of {results[0]['parameters']:,} parameters on Python's standard library, "
        f"{options['steps']} steps, {options['seeds']} seeds"
    )
    figure.text(0.02, 0.9, text, color=GREY)
    draw_ends(upper, results)
    draw_ways(lower, results, options["steps"])
    return figure


def row_color(place: int, result: Result) -> str:
    """fp32 AdamW comes first, torch's bf16 AdamW second, then ours and others."""
    if place < 2:
        return (GREY, RED)[place]
    return SAND if result["stated_state_bytes"] is None else BLUE


def draw_ends(axes: Axes, results: list[Result]) -> None:
    """A row per optimizer: a dot per seed, a bar at their mean, less fp32 AdamW's mean."""
    center = statistics.fmean(map(finite, results[0]["validation_losses"]))
    limit = finite(results[0]["limit"])
    if math.isfinite(limit):
        label = "as far as fp32 AdamW's seeds are apart"
        axes.axvspan(-limit, limit, color="#dbe7f5", linewidth=0, label=label)
    for place, result in enumerate(results):
        color = row_color(place, result)
        ends = [finite(loss) - center for loss in result["validation_losses"]]
        axes.plot(ends, [place] * len(ends), "o", color=color, alpha=0.45, markersize=6)
        axes.plot([statistics.fmean(ends)], [place], "|", color=color, ms=15, mew=3.5)
    names = [f"{result['name']}, {result['state_bytes']:.4g} B" for result in results]
    axes.set_yticks(range(len(results)), names, fontsize=10)
    axes.set_ylim(len(results) - 0.4, -0.6)
    title = "Validation loss at the end: dots are seeds, bars their mean"
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel("loss less fp32 AdamW's mean (nats per character)")
    if math.isfinite(limit):
        axes.legend(loc="lower right", fontsize=9)


def draw_ways(axes: Axes, results: list[Result], steps: int) -> None:
    """Training loss less fp32 AdamW's of the same seed and batches, mean over seeds."""
    reference = results[0]["curves"]
    points = len(reference[0])
    places = [steps * (i + 0.5) / points for i in range(points)]
    labels = {
        RED: results[1]["name"],
        BLUE: "each of the recipes",
        SAND: "8-bit optimizers of other projects",
    }
    for place, result in enumerate(results[1:], start=1):
        differences = [
            [finite(a) - finite(b) for a, b in zip(own, fp32, strict=True)]
            for own, fp32 in zip(result["curves"], reference, strict=True)
        ]
        mean = [statistics.fmean(values) for values in zip(*differences, strict=True)]
        style: dict[str, Any] = (
            {"linewidth": 2.6} if place == 1 else {"linewidth": 1.2, "alpha": 0.7}
        )
        color = row_color(place, result)
        label = labels.pop(color, None)
        axes.plot(places, mean, color=color, label=label, **style)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlim(0, steps)
    title = "Training loss less fp32 AdamW's on the same batches, mean over seeds"
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel("training step")
    axes.set_ylabel("nats")
    axes.legend(loc="upper left", fontsize=9)
