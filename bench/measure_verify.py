"""`verify`: does this machine give the promised bits, and how fast is its memory?

A result: {"check": "hash", "backend", "flatten", "steps", "digest", "expected", "same"}, or
{"check": "copy", "gb_per_s": statistic}.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import promise
from .peers import OURS
from .record import Recorder
from .stub import no_interpreter
from .timing import copy_bandwidth
from .workload import one_line

LONG, SHORT = 1000, 30


def plan(device: torch.device, quick: bool) -> list[tuple[str, int]]:
    """Backends and how many steps each can take in the time."""
    if device.type != "cpu":
        return [("triton", LONG)]
    # The interpreter takes milliseconds per program.
    return [("reference", SHORT if quick else LONG), ("triton", SHORT)]


def measure(recorder: Recorder, device: torch.device, quick: bool, progress: Callable[[str, float], None]) -> None:
    """Check the hashes, then measure the copy bandwidth."""
    # Bits do not rest on threads; thousands of tiny steps are faster on one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = [(backend, steps, flatten) for backend, steps in plan(device, quick) for flatten in (False, True)]
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
        check = {"check": "hash", "backend": backend, "flatten": flatten, "steps": steps, "family": OURS}
        recorder.results.append({**check, "digest": digest, "expected": expected, "same": digest == expected})
        if digest != expected:
            recorder.leave_out(words, f"wrong: {digest[:16]} is not {expected[:16]}", failed=True)
    torch.set_num_threads(threads)
    progress("copy bandwidth", len(runs) / (len(runs) + 1))
    recorder.results.append({"check": "copy", "gb_per_s": copy_bandwidth(device)})
