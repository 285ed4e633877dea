"""`verify`: does this machine give the promised bits, and how fast is its memory?

A result: {"check": "hash", "backend", "flatten", "steps", "digest", "expected", "same"}, or
{"check": "copy", "gb_per_s": statistic}.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import promise
from .harness.launches import no_interpreter
from .harness.optimizers import OURS
from .harness.results import Recorder
from .harness.timing import copy_bandwidth
from .harness.workload import one_line

LONG, SHORT = 1000, 30


def plan(device: torch.device, quick: bool) -> list[tuple[str, int, bool]]:
    """Backend, steps and `flatten` of each run: what the time allows."""
    if device.type != "cpu":
        return [("triton", LONG, False), ("triton", LONG, True)]
    reference = [("reference", SHORT if quick else LONG, flatten) for flatten in (False, True)]
    # The interpreter takes milliseconds per program: half a minute for the short hash on a busy
    # machine.
    return reference if quick else [*reference, ("triton", SHORT, False)]


def measure(
    recorder: Recorder, device: torch.device, quick: bool, progress: Callable[[str, float], None]
) -> None:
    """Check the hashes, then measure the copy bandwidth."""
    # Bits do not rest on threads; thousands of tiny steps are faster on one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = plan(device, quick)
    for number, (backend, steps, flatten) in enumerate(runs):
        words = f"hash, {backend}{', flatten' if flatten else ''}, {steps} steps"
        progress(words, number / (len(runs) + 1))
        reason = no_interpreter() if backend == "triton" and device.type == "cpu" else None
        if reason:
            recorder.leave_out(words, reason)
            continue
        try:
            digest = promise.digest(steps, device, backend, flatten)
        except Exception as error:
            recorder.leave_out(words, one_line(error), failed=True)
            continue
        expected = promise.HASHES[steps]
        check = {
            "check": "hash",
            "backend": backend,
            "flatten": flatten,
            "steps": steps,
            "family": OURS,
        }
        recorder.results.append(
            {**check, "digest": digest, "expected": expected, "same": digest == expected}
        )
        if digest != expected:
            recorder.leave_out(words, f"wrong: {digest[:16]} is not {expected[:16]}", failed=True)
    torch.set_num_threads(threads)
    progress("copy bandwidth", len(runs) / (len(runs) + 1))
    recorder.results.append({"check": "copy", "gb_per_s": copy_bandwidth(device)})
