"""A record of `demo --precision` -> its table and what the verdict says. Nothing is trained or
judged here.
"""

from __future__ import annotations

import statistics
from typing import Any

from .harness.console import Table
from .harness.results import Record

COLUMNS = [
    "optimizer",
    "weights",
    "state B/param.",
    "stated",
    "train loss",
    "valid. loss",
    "less fp32's",
    "verdict",
]


def spread(losses: list[float | None]) -> str:
    """The mean over seeds and, behind it, half the distance between the lowest and the highest."""
    finite = [loss for loss in losses if loss is not None]
    if len(finite) < len(losses):
        return "not finite"
    return f"{statistics.fmean(finite):.4f} ±{(max(finite) - min(finite)) / 2:.4f}"


def verdict(result: dict[str, Any]) -> str:
    """One word or two."""
    if result["passed"] is None:
        return "-" if result["within_limit"] else "outside"
    return "pass" if result["passed"] else "FAIL"


def recipe_tables(record: Record) -> list[Table]:
    """A row per optimizer; below, the rule of the verdict with its numbers, and whether this run
    can tell.
    """
    results, options = record["results"], record["arguments"]
    rows = [
        [
            result["name"],
            result["weights"],
            f"{result['state_bytes']:.3f}",
            f"{result['stated_state_bytes']:.3f}",
            spread(result["train_losses"]),
            spread(result["validation_losses"]),
            "-" if result["difference"] is None else f"{result['difference']:+.4f}",
            verdict(result),
        ]
        for result in results
    ]
    fp32, bf16 = results[0], results[1]
    limit = "not finite" if fp32["limit"] is None else f"{fp32['limit']:.4f}"
    title = (
        f"GPT of {fp32['parameters']:,} parameters, {options['steps']} steps, mean over {options['seeds']} seeds "
        f"± half their range, nats per character"
    )
    notes = [
        f"pass: validation loss at most {bf16['name']}'s, and at most {limit} from {fp32['name']}'s: as far as the "
        f"best and the worst of its own seeds are apart",
        "the model computes in float32 on the weights as stored: what differs is the optimizer alone",
    ]
    if bf16["within_limit"]:
        notes.append(
            f"{bf16['name']} is within that limit too: this run does not tell good from bad by it"
        )
    return [Table(title, COLUMNS, [*rows], notes)]
