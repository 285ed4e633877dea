"""The verdict: how far two loss curves may lie apart, and whether they do. Pure functions; no
torch, no training here.

The tolerance is derived, not chosen. Two correct AdamWs hold the same formula and round
differently. What moves every element of the model alike are the scalars of a step, of which each
optimizer rounds two on its own to float32: the step size and the square root of the second bias
correction. In the worst case all four errors of 2^-24 point one way, at
every step: that is a learning rate off by a factor of 1 + 2^-22. The roundings of single elements
    are as large, but
point in random directions and cancel: nudging every weight by one unit in its last place after
every one of 300 steps moved the loss by 7e-7 at most, where torch's own single-tensor and fused
AdamW came to differ by 1e-3 (at lr 2e-3).

So a yardstick run, torch's own AdamW with the learning rate times 1 + 2^-22, measures what the
allowed error does to this model on these batches, training's own amplification included. Its effect
changes sign and size from step to step, so the largest difference so far counts, and never less
than the last digits of the two losses compared. `MARGIN` is
for what the yardstick leaves out: errors whose sign changes from step to step, the roundings of
single elements and of the decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The yardstick's learning rate: four roundings of 2^-24, all in one direction.
YARDSTICK_LR_FACTOR = 1 + 2**-22
MARGIN = 4.0


@dataclass(frozen=True)
class Verdict:
    """Whether a loss curve agrees with the reference's.

    ratio: the largest |difference| / tolerance of all steps; they agree if it is at most 1.
    step: where that is, from 1; difference and tolerance: there, in nats.
    """

    ratio: float
    step: int
    difference: float
    tolerance: float

    @property
    def agree(self) -> bool:
        """Whether every step is within its tolerance."""
        return self.ratio <= 1


def resolution(loss: float) -> float:
    """The distance between neighbouring float32 numbers at this loss."""
    return math.ldexp(1.0, math.frexp(loss)[1] - 24) if math.isfinite(loss) else math.nan


def tolerances(reference: Sequence[float], yardstick: Sequence[float]) -> list[float]:
    """How far a loss may lie from the reference's, per step, in nats: see the top of this file."""
    largest, result = 0.0, []
    for expected, nudged in zip(reference, yardstick, strict=True):
        # Twice: equal weights but for their last bits give losses that differ by up to two of their
        # units (37 seeds).
        largest = max(largest, abs(nudged - expected), 2 * resolution(expected))
        result.append(MARGIN * largest)
    return result


def judge(
    reference: Sequence[float], candidate: Sequence[float], yardstick: Sequence[float]
) -> Verdict:
    """Compare two loss curves of equal length, in nats, one value per step. A loss that is not
    finite never agrees.

    Raises ValueError if the lengths differ or there is no step.
    """
    if not len(reference) == len(candidate) == len(yardstick) > 0:
        lengths = f"{len(reference)}, {len(candidate)} and {len(yardstick)}"
        raise ValueError(
            f"reference, candidate and yardstick have {lengths} losses; they need equally many, at least one"
        )
    worst = Verdict(ratio=-1.0, step=0, difference=0.0, tolerance=0.0)
    limits = tolerances(reference, yardstick)
    for step, (expected, found, limit) in enumerate(
        zip(reference, candidate, limits, strict=True), start=1
    ):
        difference = abs(found - expected)
        finite = math.isfinite(difference) and math.isfinite(limit)
        ratio = difference / limit if finite else math.inf
        if ratio > worst.ratio:
            worst = Verdict(ratio, step, difference, limit)
    return worst
