"""A small character-level GPT in plain torch, and how `demo` and `convergence` train it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LR, WEIGHT_DECAY, BATCH = 1e-3, 0.1, 8
# The training loss reported is the mean over this many last steps: one batch's loss is noise.
LAST_STEPS = 20


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT: characters it knows, characters it sees, width, heads and blocks."""

    vocabulary: int
    context: int = 64
    width: int = 192
    heads: int = 6
    blocks: int = 3


class Attention(nn.Module):
    """Causal self-attention, written out: its backward is deterministic on every device."""

    later: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        later = torch.ones(shape.context, shape.context, dtype=torch.bool).triu(1)
        self.register_buffer("later", later, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
        weights = scores.masked_fill(self.later[:time, :time], float("-inf")).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).reshape(batch, time, width))
        return mixed


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to its input after."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(),
            nn.Linear(4 * shape.width, shape.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class GPT(nn.Module):
    """Predicts the next character at every position. Radford et al. 2019, without dropout."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.characters = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Parameter(torch.empty(shape.context, shape.width))
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.blocks)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.characters.weight
        for name, param in self.named_parameters():
            if param.dim() == 2:
                # The sum over 2 * blocks residual branches keeps the variance of one.
                last = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(param, std=0.02 * ((2 * shape.blocks) ** -0.5 if last else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per character.

        Args:
            inputs, targets: int64, shape (batch, time), character numbers; time at most the
                context.
        """
        x = self.characters(inputs) + self.positions[: inputs.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# Training.


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
    # next to one busy process 132 ms instead of 70: they wait for each other.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):  # models are made on the CPU
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors of the optimizer's state, in the order of its parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        value
        for param in params
        for _, value in sorted(optimizer.state[param].items())
        if torch.is_tensor(value)
    ]
