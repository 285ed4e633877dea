"""The demo's picture: the loss curves, and how far they lie apart. No training, no judgement here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo import FLAT, FUSED, TORCH, YARDSTICK, Outcome
from .verdict import MARGIN, resolution, tolerances

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH_STEPS = 15
INK, GREY, PALE = "#1f2430", "#6b7280", "#e3e6ec"
# Widest first: three curves that lie on one another must all be seen.
LINES: dict[str, dict[str, Any]] = {
    TORCH: {"color": "#b4bac6", "linewidth": 8, "solid_capstyle": "round"},
    FUSED: {"color": "#0b63c5", "linewidth": 3},
    FLAT: {"color": "#ffb000", "linewidth": 1.6, "linestyle": (0, (4, 3))},
}
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


def smooth(values: Sequence[float], width: int = SMOOTH_STEPS) -> list[float]:
    """The mean over `width` steps around each step: fewer at the start, where losses fall fast, and
    at the end.
    """
    result = []
    for i in range(len(values)):
        reach = min(width // 2, i)
        window = values[i - reach : i + reach + 1]
        result.append(sum(window) / len(window))
    return result


def draw(outcome: Outcome, path: Path) -> None:
    """Write the picture as a PNG. Raises OSError if the file cannot be written, ImportError without
    matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 8.6), dpi=150)
        upper, lower = figure.subplots(2, 1, sharex=True)
        figure.subplots_adjust(left=0.095, right=0.97, top=0.855, bottom=0.07, hspace=0.17)
        title, subtitle = _titles(outcome)
        figure.text(0.02, 0.948, title, fontsize=17, fontweight="bold")
        figure.text(0.02, 0.915, subtitle, color=GREY)
        _draw_losses(upper, outcome)
        _draw_differences(lower, outcome)
        lower.set_xlabel("training step")
        lower.set_xlim(0, outcome.steps + 1)
        lower.locator_params(axis="x", integer=True)
        figure.align_ylabels([upper, lower])
        figure.savefig(path, format="png")


def _titles(outcome: Outcome) -> tuple[str, str]:
    verdict, parameters = outcome.verdict, outcome.runs[TORCH].parameters / 1e6
    if not verdict.agree:
        title = f"FusedAdamW leaves torch's curve: {verdict.ratio:,.1f} times the tolerance"
    elif not outcome.same_bits:
        title = "FusedAdamW follows torch's AdamW, but flatten=True changes bits"
    else:
        title = "Three optimizers, one curve: FusedAdamW follows torch's AdamW"
    text = (
        f"GPT of {parameters:.1f} M parameters learning the characters of Python's standard library"
    )
    return title, f"{text}; seed {outcome.seed}, {outcome.device_name}"


def _draw_losses(axes: Axes, outcome: Outcome) -> None:
    steps = range(1, outcome.steps + 1)
    for name, line in LINES.items():
        run = outcome.runs[name]
        axes.plot(
            steps,
            smooth(run.losses),
            label=f"{name}: {run.train_loss:.6f} at the end",
            zorder=3,
            **line,
        )
    axes.plot(
        steps,
        outcome.runs[TORCH].losses,
        color=GREY,
        linewidth=0.7,
        alpha=0.55,
        label="single steps",
    )
    axes.set_title(f"Training loss, mean of {SMOOTH_STEPS} steps", loc="left", fontsize=12)
    axes.set_ylabel("loss (nats per character)")
    axes.legend(loc="upper right", handlelength=3.5)


def _draw_differences(axes: Axes, outcome: Outcome) -> None:
    steps = range(1, outcome.steps + 1)
    reference, yardstick = outcome.runs[TORCH].losses, outcome.runs[YARDSTICK].losses
    limits = tolerances(reference, yardstick)
    # A log axis has no zero: equal losses are drawn on a line of their own, below the smallest
    # difference there is.
    equal = resolution(min(filter(math.isfinite, reference), default=1.0)) / 4

    def dots(name: str, label: str, color: str, size: float) -> float:
        distances = [
            max(abs(a - b), equal)
            for a, b in zip(outcome.runs[name].losses, reference, strict=True)
        ]
        axes.plot(
            steps, distances, "o", color=color, markersize=size, markeredgewidth=0, label=label
        )
        return max(filter(math.isfinite, distances), default=equal)

    axes.set_yscale("log")
    dots(YARDSTICK, r"yardstick: torch AdamW, lr $\times\,(1 + 2^{-22})$", "#a9b0bd", 3.2)
    top = 100 * max(*limits, dots(FUSED, FUSED, LINES[FUSED]["color"], 6))
    dots(FLAT, FLAT, LINES[FLAT]["color"], 2.6)
    axes.fill_between(steps, limits, top, color="#fbe0dd", linewidth=0)
    label = f"tolerance: {MARGIN:g} $\\times$ the yardstick's largest so far"
    axes.plot(steps, limits, color="#c9372c", linewidth=1.5, label=label)
    axes.set_ylim(equal / 2, top)
    axes.set_yticks([equal, *(10.0**k for k in range(-7, 1) if 10.0**k < top)])
    axes.yaxis.set_major_formatter(
        lambda y, _: "equal" if y == equal else f"$10^{{{round(math.log10(y))}}}$"
    )
    axes.minorticks_off()
    axes.set_title("How far each step's loss lies from torch's", loc="left", fontsize=12)
    axes.set_ylabel("|loss $-$ torch's loss| (nats)")
    axes.legend(loc="upper left", ncols=2, handlelength=1.5)
