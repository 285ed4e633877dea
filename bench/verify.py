"""`verify`: does this machine give the promised bits, and how fast is its memory?

The promise in one number is the SHA-256 of all weights and moments after a fixed training. It
stands here and nowhere else in the code. Integer arithmetic makes the gradients, so that no random
generator of any version takes part.

A result: {"check": "hash", "backend", "flatten", "steps", "digest", "expected", "same"}, {"check":
"copy", "gb_per_s": statistic}, or {"check": "step", and a result of `step`}.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adam import FusedAdam

from .harness import machine
from .harness.console import Progress, Table, spread, three_digits, times
from .harness.launches import no_interpreter
from .harness.optimizers import OURS, Case, peers, variants
from .harness.results import Record, Recorder, Result, left_out_lines
from .harness.rotation import Job
from .harness.session import Session
from .harness.shapes import shapes_of
from .harness.timing import copy_bandwidth
from .harness.workload import one_line
from .step import measure as measure_step

STEPS = 1000
SHORT_STEPS = 30  # Triton's interpreter takes milliseconds per program
HASH = "869091b3e33581671e0dc8a745e4edf241f38d0f87a8d85883fe6f45228027af"
SHORT_HASH = "55aa245e1e179c7e87e83c9fd087e61927c7bbbc6edc9613fd60d453ec24a92f"
HASHES = {STEPS: HASH, SHORT_STEPS: SHORT_HASH}

# Seconds after which no further hash is computed, and no glance at the speed begins: all of it
# takes about a minute, however busy the machine is.
HASH_SECONDS, GLANCE_LIMIT = 40.0, 45.0
GLANCE_MODEL, GLANCE_SECONDS = "resnet50", 10.0


def run(arguments: argparse.Namespace) -> int:
    """Check the promise on this machine, print one block to paste; returns the exit code."""
    session = Session(arguments)
    recorder, device = session.recorder, session.device
    with session.measuring() as progress:
        measure(recorder, device, arguments.quick, progress)
        if not arguments.quick:
            glance(recorder, device, session.seconds_left(GLANCE_LIMIT), progress)
    record = recorder.record()
    session.screen.print("\n".join(["```", *lines(record), "```"]))
    session.write(record)
    return session.exit_code(record)


# The training whose hash is promised.

GROUPS: tuple[dict[str, Any], ...] = (
    {"weight_decay": 0.1},
    {"weight_decay": 0.01, "amsgrad": True, "lr": 3e-3},
    {"weight_decay": 0.1, "decoupled_weight_decay": False, "betas": (0.8, 0.99), "maximize": True},
)


class Kind(NamedTuple):
    """What one of the parameters is; `group` is an index into GROUPS."""

    numel: int
    dtype: torch.dtype
    group: int


# Sizes around a vector, a slot and nothing.
PARAMS = {
    f"{numel}-{dtype}-{group}": Kind(numel, getattr(torch, dtype), group)
    for group in range(len(GROUPS))
    for dtype in ("float32", "bfloat16")
    for numel in (1, 131, 1000)
}


def noise(numel: int, seed: int) -> Tensor:
    """float64 numbers in [-1, 1), the same on every machine: a multiplicative hash, then an exact
    scaling.
    """
    x = (torch.arange(numel, dtype=torch.int64) + 1) * 2654435761 + seed * 40503
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    x = (x ^ (x >> 13)) * 3266489917 % 2**32
    return (x ^ (x >> 16)).double() / 2**31 - 1


def start(device: torch.device | str, only: torch.dtype | None = None) -> dict[str, Tensor]:
    """The parameters, by name: of one dtype, or all."""
    return {
        name: torch.nn.Parameter(noise(kind.numel, seed).to(kind.dtype).to(device))
        for seed, (name, kind) in enumerate(PARAMS.items())
        if only in (None, kind.dtype)
    }


def train(
    params: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    first: int = 0,
    deadline: float = math.inf,
) -> None:
    """Train `steps` steps, numbered from `first`.

    The learning rate changes as a scheduler's would. Gradients follow the weights, so that errors
    would grow. Raises TimeoutError if `deadline`, a time of `time.monotonic`, passes.
    """
    for step in range(first, first + steps):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no time left after {step} of {first + steps} steps")
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * (1 - step / 2000)
        for seed, param in enumerate(params.values()):
            wave = noise(param.numel(), 100 + seed + 1000 * step).float().to(param.device)
            grad = (0.5 * param.detach().float() + wave).to(param.dtype)
            if param.grad is None:
                param.grad = grad
            else:
                param.grad.copy_(grad)
        optimizer.step()


def digest(params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> str:
    """SHA-256 of weights and state in one order, whatever the optimizer's. Needs no numpy."""
    sha = hashlib.sha256()
    for name, param in params.items():
        for key, value in {"param": param.detach(), **optimizer.state[param]}.items():
            sha.update(f"{name} {key}".encode())
            sha.update(bytes(value.cpu().contiguous().reshape(-1).view(torch.uint8).tolist()))
    return sha.hexdigest()


def trained_digest(
    steps: int, device: torch.device, backend: str, flatten: bool, deadline: float = math.inf
) -> str:
    """The digest after `steps` steps. Raises TimeoutError as `train` does."""
    params = start(device)
    groups = [
        {"params": [params[name] for name, kind in PARAMS.items() if kind.group == number], **own}
        for number, own in enumerate(GROUPS)
    ]
    optimizer = FusedAdam(
        groups, lr=1e-2, decoupled_weight_decay=True, backend=backend, flatten=flatten
    )
    train(params, optimizer, steps, deadline=deadline)
    return digest(params, optimizer)


# The checks.


class Check(NamedTuple):
    """One training to hash."""

    backend: str
    steps: int
    flatten: bool

    @property
    def text(self) -> str:
        return f"hash, {self.backend}{', flatten' if self.flatten else ''}, {self.steps} steps"


def plan(device: torch.device, quick: bool) -> list[Check]:
    """What the time allows, the slowest last."""
    if device.type != "cpu":
        return [Check("triton", STEPS, flatten) for flatten in (False, True)]
    steps = SHORT_STEPS if quick else STEPS
    reference = [Check("reference", steps, flatten) for flatten in (False, True)]
    # The interpreter takes half a minute for the short hash on a busy machine.
    return reference if quick else [*reference, Check("triton", SHORT_STEPS, False)]


def measure(recorder: Recorder, device: torch.device, quick: bool, progress: Progress) -> None:
    """Check the hashes, then measure the copy bandwidth."""
    # Bits do not depend on threads; thousands of tiny steps are faster on one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    checks = plan(device, quick)
    begin = time.monotonic()
    try:
        for number, check in enumerate(checks):
            progress(check.text, number / (len(checks) + 1))
            # The first is never left out: without a hash nothing would be verified.
            deadline = begin + HASH_SECONDS if number else math.inf
            check_hash(recorder, device, check, deadline)
    finally:
        torch.set_num_threads(threads)
    progress("copy bandwidth", len(checks) / (len(checks) + 1))
    recorder.results.append({"check": "copy", "gb_per_s": copy_bandwidth(device)})


def check_hash(recorder: Recorder, device: torch.device, check: Check, deadline: float) -> None:
    """Compare one hash with the promised one."""
    reason = no_interpreter() if check.backend == "triton" and device.type == "cpu" else None
    if reason:
        recorder.leave_out(check.text, reason)
        return
    try:
        own = trained_digest(check.steps, device, check.backend, check.flatten, deadline)
    except TimeoutError as error:
        recorder.leave_out(check.text, f"{error}, {HASH_SECONDS:.0f} s in all")
        return
    except Exception as error:
        recorder.leave_out(check.text, one_line(error), failed=True)
        return
    expected = HASHES[check.steps]
    bits = {"digest": own, "expected": expected, "same": own == expected}
    recorder.results.append({"check": "hash", **check._asdict(), "family": OURS, **bits})
    if own != expected:
        reason = f"wrong: {own[:16]} is not {expected[:16]}"
        recorder.leave_out(check.text, reason, failed=True)


def glance(recorder: Recorder, device: torch.device, left: float, progress: Progress) -> None:
    """A glance at the speed: ours and torch fused on one model. left: seconds."""
    if left <= 0:
        recorder.leave_out(GLANCE_MODEL, f"no time left of {GLANCE_LIMIT:.0f} s")
        return
    part = Recorder("step", {}, device)
    job = Job(GLANCE_MODEL, shapes_of(GLANCE_MODEL), Case(device), "eager")
    specs = [*variants(device, "auto", None), peers()["torch-fused"]]
    try:
        measure_step(part, specs, job, min(GLANCE_SECONDS, left / 2), progress)
    finally:
        recorder.results += [{"check": "step", **result} for result in part.results]
        recorder.left_out += part.left_out


# The block to paste.


def lines(record: Record) -> list[str]:
    """The block that people paste."""
    where = f"fused-adam verify: {machine.line(record['machine'])}"
    return [where, *map(line, record["results"]), *record["notes"], *left_out_lines(record)]


def line(result: Result) -> str:
    """One check in words."""
    if result["check"] == "hash":
        flatten = ", flatten" if result["flatten"] else ""
        wrong = f"NOT the promised {result['expected'][:16]}"
        return (
            f"hash {result['digest'][:16]} ({result['backend']}{flatten}, {result['steps']} steps)"
            f": {'as promised' if result['same'] else wrong}"
        )
    if result["check"] == "copy":
        return f"copy bandwidth: {spread(result['gb_per_s'])} GB/s"
    return (
        f"{result['model']} {result['dtype']}, {result['optimizer']}: {spread(result['step_ms'])} "
        f"ms, {three_digits(result['gb_per_s']['median'])} GB/s, {times(result['speedup'])} torch "
        "fused"
    )


def tables(record: Record) -> list[Table]:
    """The same lines, as a table of one column."""
    return [Table("verify", ["check"], [[line(result)] for result in record["results"]])]
