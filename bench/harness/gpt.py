"""A small character-level GPT in plain torch. Nothing here knows of optimizers, text or time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
