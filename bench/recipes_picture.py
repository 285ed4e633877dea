"""The picture of `demo --precision`: how far each recipe ends from fp32 AdamW, and how it gets
there. No judgement.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_picture import GREY, INK, STYLE
from .harness.results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TORCH_COLOR, OURS_COLOR, BAND = "#c9372c", "#0b63c5", "#dbe7f5"


def draw(record: Record, path: Path) -> None:
    """Write the picture as a PNG. Raises OSError if the file cannot be written, ImportError without
    matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    results, options = record["results"], record["arguments"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.9 + 0.36 * len(results)), dpi=110)
        upper, lower = figure.subplots(2, 1, height_ratios=[0.36 * len(results), 2.4])
        figure.subplots_adjust(left=0.2, right=0.97, top=0.83, bottom=0.1, hspace=0.55)
        figure.text(
            0.02,
            0.94,
            "How far from fp32 AdamW does each precision recipe end?",
            fontsize=16,
            fontweight="bold",
        )
        text = (
            f"GPT of {results[0]['parameters']:,} parameters on Python's standard library, {options['steps']} steps, "
            f"{options['seeds']} seeds"
        )
        figure.text(0.02, 0.9, text, color=GREY)
        _draw_ends(upper, results)
        _draw_curves(lower, results, options["steps"])
        figure.savefig(path, format="png")


def _color(place: int) -> str:
    return GREY if place == 0 else TORCH_COLOR if place == 1 else OURS_COLOR


def _finite(value: float | None) -> float:
    return math.nan if value is None else value


def _draw_ends(axes: Axes, results: list[dict[str, Any]]) -> None:
    """A row per optimizer: a dot per seed, a bar at their mean, all as distance to fp32 AdamW's
    mean.
    """
    center = statistics.fmean(map(_finite, results[0]["validation_losses"]))
    limit = _finite(results[0]["limit"])
    if math.isfinite(limit):
        axes.axvspan(
            -limit, limit, color=BAND, linewidth=0, label="as far as fp32 AdamW's seeds are apart"
        )
    for place, result in enumerate(results):
        distances = [_finite(loss) - center for loss in result["validation_losses"]]
        axes.plot(
            distances, [place] * len(distances), "o", color=_color(place), alpha=0.45, markersize=6
        )
        axes.plot(
            [statistics.fmean(distances)],
            [place],
            "|",
            color=_color(place),
            markersize=15,
            markeredgewidth=3.5,
        )
    names = [f"{result['name']}\u2009, {result['state_bytes']:.3g} B" for result in results]
    axes.set_yticks(range(len(results)), names, fontsize=10)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_title(
        "Validation loss at the end: dots are seeds, bars their mean", loc="left", fontsize=12
    )
    axes.set_xlabel("loss less fp32 AdamW's mean (nats per character)")
    axes.legend(loc="lower right", fontsize=9)


def _draw_curves(axes: Axes, results: list[dict[str, Any]], steps: int) -> None:
    """Training loss less fp32 AdamW's of the same seed and batches, mean over seeds."""
    reference = results[0]["curves"]
    places = [steps * (i + 0.5) / len(reference[0]) for i in range(len(reference[0]))]
    for place, result in enumerate(results[1:], start=1):
        pairs = zip(result["curves"], reference, strict=True)
        differences = [
            [_finite(a) - _finite(b) for a, b in zip(*pair, strict=True)] for pair in pairs
        ]
        mean = [statistics.fmean(values) for values in zip(*differences, strict=True)]
        label = {1: result["name"], 2: "each of the recipes"}.get(place)
        width = 2.6 if place == 1 else 1.2
        axes.plot(
            places,
            mean,
            color=_color(place),
            linewidth=width,
            alpha=1 if place == 1 else 0.7,
            label=label,
        )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlim(0, steps)
    axes.set_title(
        "Training loss less fp32 AdamW's on the same batches, mean over seeds",
        loc="left",
        fontsize=12,
    )
    axes.set_xlabel("training step")
    axes.set_ylabel("nats")
    axes.legend(loc="upper left", fontsize=9)
