"""`demo`: one GPT trained in lockstep by torch's AdamW and by ours, then compared.

Its result:
    device, seed, steps, parameters
    runs     name -> {"train_loss", "validation_loss" and "losses" (nats per character), "step_ms",
             "optimizer_ms" (medians), "optimizer_share", "state_bytes"}
    verdict  {"ratio", "step", "difference", "tolerance", "agree", "same_bits", "passed"}, see
             `compare_losses`
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from fused_adam import FusedAdamW

from .harness.console import Progress, Table
from .harness.corpus import Corpus, draw_batch, load_corpus
from .harness.gpt import (
    BATCH,
    GPT,
    LAST_STEPS,
    LR,
    Shape,
    determinism,
    param_groups,
    schedule,
    state_tensors,
)
from .harness.oracle import MARGIN, YARDSTICK_LR_FACTOR, LossComparison, compare_losses
from .harness.results import Record, Result
from .harness.session import Session, on_interrupt

TORCH, FUSED, FLAT, YARDSTICK = "torch AdamW", "FusedAdamW", "FusedAdamW flatten", "yardstick"
NAMES = (TORCH, FUSED, FLAT, YARDSTICK)
STEPS = 250
VALIDATION_BATCHES = 8
COLUMNS = (
    "run",
    "train loss",
    "valid. loss",
    "step ms",
    "optim. share",
    "state B/param.",
    "state MB",
    "same bits",
)
ON_CPU = "Without a GPU FusedAdamW runs its reference: for equal bits, not for speed."


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if the losses agree and `flatten` changes no bit, else 1."""
    steps = arguments.steps = arguments.steps or STEPS
    session = Session(arguments)
    with session.measuring() as progress:
        outcome = train(load_corpus(), steps, arguments.seed, session.device, progress)
        session.recorder.results = [result(outcome)]
        if outcome.interrupted:
            session.interrupt()
    return session.finish(tables) or (0 if outcome.passed else 1)


@dataclass
class Run:
    """One model, its optimizer, and what was measured on them, step by step.

    losses: nats per character.
    step_ms: zero_grad, forward, backward and optimizer; optimizer_ms: `optimizer.step()`.
    validation_loss: nats per character, after the last step.
    """

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    validation_loss: float = math.nan

    @property
    def train_loss(self) -> float:
        """Mean training loss over the last steps, in nats per character."""
        return statistics.fmean(self.losses[-LAST_STEPS:])

    @property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(param.numel() for param in self.model.parameters())

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors in the optimizer's state."""
        return sum(tensor.nbytes for tensor in state_tensors(self.optimizer))

    def train_step(self, inputs: Tensor, targets: Tensor, synchronize: Callable[[], None]) -> None:
        """One training step on one batch, timed."""
        synchronize()
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(inputs, targets)
        loss.backward()
        synchronize()
        middle = time.perf_counter()
        self.optimizer.step()
        synchronize()
        end = time.perf_counter()
        self.scheduler.step()
        self.losses.append(loss.item())
        self.step_ms.append((end - begin) * 1e3)
        self.optimizer_ms.append((end - middle) * 1e3)


@dataclass(frozen=True)
class Outcome:
    """The runs by name, and two answers: do the losses agree, and does `flatten` change a bit?"""

    runs: dict[str, Run]
    comparison: LossComparison
    same_bits: bool
    device: torch.device
    seed: int
    interrupted: bool = False

    @property
    def steps(self) -> int:
        """How many steps were trained."""
        return len(self.runs[TORCH].losses)

    @property
    def device_name(self) -> str:
        """The device in words."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if on_gpu else "CPU, one thread"

    @property
    def passed(self) -> bool:
        """The losses agree, and `flatten` changes no bit."""
        return self.comparison.agree and self.same_bits


def train(
    corpus: Corpus, steps: int, seed: int, device: torch.device, progress: Progress
) -> Outcome:
    """Train all runs on the same batches, one step of each in turn, so that a busy machine slows
    all alike. An interrupt ends it after the step under way.
    """
    synchronize = torch.get_device_module(device).synchronize
    interrupts: list[object] = []

    def stop(*signal: object) -> None:
        if interrupts:  # pressed twice: now
            raise KeyboardInterrupt
        interrupts.append(signal)

    with determinism():
        shape = Shape(len(corpus.characters))
        runs = {name: make_run(name, shape, steps, seed, device) for name in NAMES}
        generator = torch.Generator().manual_seed(seed)
        text = "first step"
        with on_interrupt(stop):
            for step in range(1, steps + 1):
                progress(text, (step - 1) / steps)
                batch = draw_batch(corpus.train, BATCH, shape.context, generator)
                inputs, targets = (x.to(device) for x in batch)
                for own in runs.values():
                    own.train_step(inputs, targets, synchronize)
                if step % max(1, steps // 10) == 0:  # a log has a line per text
                    losses = ", ".join(f"{name} {runs[name].losses[-1]:.4f}" for name in NAMES[:2])
                    text = f"step {step}/{steps}, loss of {losses}"
                if interrupts:
                    break
        progress(text, 1.0)
        validate(list(runs.values()), corpus, device, generator)
    comparison = compare_losses(*(runs[name].losses for name in (TORCH, FUSED, YARDSTICK)))
    same = same_bits(runs[FUSED], runs[FLAT])
    return Outcome(runs, comparison, same, device, seed, bool(interrupts))


def make_run(name: str, shape: Shape, steps: int, seed: int, device: torch.device) -> Run:
    """A fresh model and optimizer: for one seed the same initial weights under every name."""
    # Made on the CPU: its generator gives the same weights on every machine.
    torch.manual_seed(seed)
    model = GPT(shape).to(device)
    groups = param_groups(model)
    optimizer: torch.optim.Optimizer
    if name in (FUSED, FLAT):
        optimizer = FusedAdamW(groups, lr=LR, flatten=name == FLAT)
    else:
        factor = YARDSTICK_LR_FACTOR if name == YARDSTICK else 1
        optimizer = torch.optim.AdamW(groups, lr=LR * factor)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))
    return Run(name, model, optimizer, scheduler)


def validate(
    runs: list[Run], corpus: Corpus, device: torch.device, generator: torch.Generator
) -> None:
    """Give every run its loss on the same text that it was not trained on."""
    context = runs[0].model.positions.shape[0]
    batches = [
        draw_batch(corpus.validation, BATCH, context, generator) for _ in range(VALIDATION_BATCHES)
    ]
    with torch.no_grad():
        for own in runs:
            losses = [own.model(x.to(device), y.to(device)).item() for x, y in batches]
            own.validation_loss = statistics.fmean(losses)


def same_bits(one: Run, other: Run) -> bool:
    """Whether all losses, final weights and states of two runs are equal in every bit (NaNs and
    signs of zero too).
    """

    def tensors(own: Run) -> list[Tensor]:
        losses = torch.tensor([*own.losses, own.validation_loss], dtype=torch.float64)
        return [losses, *own.model.parameters(), *state_tensors(own.optimizer)]

    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)

    mine, theirs = tensors(one), tensors(other)
    return len(mine) == len(theirs) and all(
        torch.equal(bits(a), bits(b)) for a, b in zip(mine, theirs, strict=True)
    )


def result(outcome: Outcome) -> Result:
    """Everything measured, as a record takes it."""
    comparison = outcome.comparison
    return {
        "device": outcome.device_name,
        "seed": outcome.seed,
        "steps": outcome.steps,
        "parameters": outcome.runs[TORCH].parameters,
        "runs": {name: run_result(own) for name, own in outcome.runs.items()},
        "verdict": {
            **asdict(comparison),
            "agree": comparison.agree,
            "same_bits": outcome.same_bits,
            "passed": outcome.passed,
        },
    }


def run_result(own: Run) -> Result:
    """What was measured on one run."""
    step_ms, optimizer_ms = statistics.median(own.step_ms), statistics.median(own.optimizer_ms)
    return {
        "train_loss": own.train_loss,
        "validation_loss": own.validation_loss,
        "step_ms": step_ms,
        "optimizer_ms": optimizer_ms,
        "optimizer_share": optimizer_ms / step_ms,
        "state_bytes": own.state_bytes,
        "losses": own.losses,
    }


def tables(record: Record) -> list[Table]:
    """A row per optimizer; below, the verdict, and on a CPU what its times do not say."""
    [found] = record["results"]
    verdict, steps = found["verdict"], found["steps"]
    same = "yes" if verdict["same_bits"] else "NO"
    rows = []
    for name in (TORCH, FUSED, FLAT):
        own = found["runs"][name]
        rows.append(
            [
                name,
                loss_text(own["train_loss"]),
                loss_text(own["validation_loss"]),
                f"{own['step_ms']:.1f}",
                f"{own['optimizer_share']:.1%}",
                f"{own['state_bytes'] / found['parameters']:.3f}",
                f"{own['state_bytes'] / 1e6:.2f}",
                "-" if name == TORCH else same,
            ]
        )
    last = min(LAST_STEPS, steps)
    title = f"{found['device']}; train loss: mean of the last {last} of {steps} steps"
    notes = [ON_CPU] if record["machine"]["device"] == "cpu" else []
    return [Table(title, COLUMNS, [*rows], [*notes, *verdict_lines(verdict, steps)])]


def loss_text(loss: float | None) -> str:
    """A loss of a record, where None is one that was not finite."""
    return "not finite" if loss is None else f"{loss:.6f}"


def verdict_lines(verdict: Result, steps: int) -> list[str]:
    """The verdict and where it comes from, with its numbers."""
    agree = "agrees" if verdict["agree"] else "DOES NOT AGREE"
    same = "are equal in every bit" if verdict["same_bits"] else "DIFFER IN BITS"
    if verdict["ratio"] is None:
        where = f"the loss of step {verdict['step']} is not finite"
    else:
        where = (
            f"the largest |difference| / tolerance is {verdict['ratio']:,.2f}, at step "
            f"{verdict['step']} ({verdict['difference']:.1e} of {verdict['tolerance']:.1e} nats)"
        )
    return [
        f"{FUSED} {agree} with {TORCH}: {where}.",
        f"The tolerance is {MARGIN:g} times what a learning rate off by four float32 roundings "
        "does: the yardstick.",
        f"flatten=True and False {same}: losses, weights and moments of all {steps} steps.",
    ]
