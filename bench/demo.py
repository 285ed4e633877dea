"""The demo: one GPT trained in lockstep by torch's AdamW and by ours, then compared. No drawing, no
tables here.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_adam import FusedAdamW

from .harness.corpus import Corpus, draw_batch
from .harness.gpt import GPT, Shape
from .verdict import YARDSTICK_LR_FACTOR, Verdict, judge

TORCH, FUSED, FLAT, YARDSTICK = "torch AdamW", "FusedAdamW", "FusedAdamW flatten", "yardstick"
LR, WEIGHT_DECAY = 1e-3, 0.1
BATCH = 8
VALIDATION_BATCHES = 8
# The training loss reported is the mean over this many last steps: one batch's loss is noise.
LAST_STEPS = 20


@dataclass
class Run:
    """One model, its optimizer, and what was measured on them, step by step.

    losses: nats per character; step_ms: zero_grad, forward, backward and optimizer; optimizer_ms:
        `optimizer.step()`.
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
    def optimizer_share(self) -> float:
        """Median optimizer time over median step time."""
        return statistics.median(self.optimizer_ms) / statistics.median(self.step_ms)

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
    """The runs by name, and the two questions answered: do the losses agree, and does `flatten`
    change a bit?
    """

    runs: dict[str, Run]
    verdict: Verdict
    same_bits: bool
    device: torch.device
    seed: int

    @property
    def steps(self) -> int:
        """How many steps were trained."""
        return len(self.runs[TORCH].losses)

    @property
    def device_name(self) -> str:
        """The device in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return "CPU, one thread"

    @property
    def passed(self) -> bool:
        """Both questions answered with yes."""
        return self.verdict.agree and self.same_bits


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors of the optimizer's state, in the order of its parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        value
        for param in params
        for _, value in sorted(optimizer.state[param].items())
        if torch.is_tensor(value)
    ]


def same_bits(one: Run, other: Run) -> bool:
    """Whether all losses, final weights and states of two runs are equal in every bit (NaNs and
    signs of zero too).
    """

    def tensors(run: Run) -> list[Tensor]:
        losses = torch.tensor([*run.losses, run.validation_loss], dtype=torch.float64)
        return [losses, *run.model.parameters(), *state_tensors(run.optimizer)]

    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)

    mine, theirs = tensors(one), tensors(other)
    return len(mine) == len(theirs) and all(
        torch.equal(bits(a), bits(b)) for a, b in zip(mine, theirs, strict=True)
    )


def schedule(steps: int) -> Callable[[int], float]:
    """The learning rate's factor per step: a linear rise over the first tenth, then half a cosine
    down to a tenth.
    """
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        cosine = 0.55 + 0.45 * math.cos(math.pi * min(step / steps, 1))
        return min((step + 1) / warm_up, cosine)

    return factor


def param_groups(model: GPT) -> list[dict[str, Any]]:
    """Decay for matrices, none for vectors."""
    return [
        {
            "params": [param for param in model.parameters() if param.dim() >= 2],
            "weight_decay": WEIGHT_DECAY,
        },
        {"params": [param for param in model.parameters() if param.dim() < 2], "weight_decay": 0.0},
    ]


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
        optimizer = torch.optim.AdamW(
            groups, lr=LR * (YARDSTICK_LR_FACTOR if name == YARDSTICK else 1)
        )
    return Run(
        name, model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))
    )


@contextlib.contextmanager
def determinism() -> Iterator[None]:
    """Repeatable arithmetic in torch while it lasts; the settings and the global generator's state
    are put back.
    """
    # cuBLAS reads it once, when it first starts; it stays set:
    # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        memory.fill_uninitialized_memory,
    )
    warn_only, threads = (
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_num_threads(),
    )
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # it would write every new tensor once more
    # Bits then do not rest on the number of cores. Two threads take 45 ms a step instead of 72, but
    # beside one busy process 132 ms instead of 70: they wait for each other.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):  # models are made on the CPU
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)


def train(
    corpus: Corpus,
    steps: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[Sequence[Run]], None],
) -> Outcome:
    """Train all runs on the same batches, one step of each in turn, so that a busy machine slows
    all alike.

    Args:
        on_step: called with all runs after every step.
    """
    synchronize = torch.get_device_module(device).synchronize
    with determinism():
        shape = Shape(len(corpus.characters))
        names = (TORCH, FUSED, FLAT, YARDSTICK)
        runs = {name: make_run(name, shape, steps, seed, device) for name in names}
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            inputs, targets = (
                x.to(device) for x in draw_batch(corpus.train, BATCH, shape.context, generator)
            )
            for run in runs.values():
                run.train_step(inputs, targets, synchronize)
            on_step(list(runs.values()))
        batches = [
            draw_batch(corpus.validation, BATCH, shape.context, generator)
            for _ in range(VALIDATION_BATCHES)
        ]
        with torch.no_grad():
            for run in runs.values():
                losses = [
                    run.model(inputs.to(device), targets.to(device)).item()
                    for inputs, targets in batches
                ]
                run.validation_loss = statistics.fmean(losses)
    verdict = judge(*(runs[name].losses for name in (TORCH, FUSED, YARDSTICK)))
    return Outcome(runs, verdict, same_bits(runs[FUSED], runs[FLAT]), device, seed)


def result(outcome: Outcome) -> dict[str, Any]:
    """Everything measured, as a record takes it. Losses in nats per character, times in ms."""
    return {
        "device": outcome.device_name,
        "seed": outcome.seed,
        "steps": outcome.steps,
        "parameters": outcome.runs[TORCH].parameters,
        "runs": {
            name: {
                "train_loss": run.train_loss,
                "validation_loss": run.validation_loss,
                "step_ms": statistics.median(run.step_ms),
                "optimizer_ms": statistics.median(run.optimizer_ms),
                "optimizer_share": run.optimizer_share,
                "state_bytes": run.state_bytes,
                "losses": run.losses,
            }
            for name, run in outcome.runs.items()
        },
        "verdict": {
            **asdict(outcome.verdict),
            "agree": outcome.verdict.agree,
            "same_bits": outcome.same_bits,
            "passed": outcome.passed,
        },
    }
