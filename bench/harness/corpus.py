"""The training text: Python's own standard library, as character numbers. No model and no training
here.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LIMIT_CHARACTERS = 1_000_000
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Text as numbers.

    train, validation: int64, one number per character, on the CPU; the last tenth of the text is
        for validation.
    characters: the vocabulary, sorted; a number is an index into it.
    """

    train: Tensor
    validation: Tensor
    characters: str


def read_text(limit_characters: int = LIMIT_CHARACTERS) -> str:
    """The first `limit_characters` of the standard library's modules, in the order of their names.

    Only files of pure ASCII, so that the vocabulary stays near a hundred characters.

    Raises FileNotFoundError if this Python has no standard library as source files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    missing = limit_characters
    for path in sorted(folder.glob("*.py")):
        if not missing:
            break
        content = path.read_bytes()
        if content.isascii():
            parts.append(content.decode("ascii").replace("\r\n", "\n")[:missing])
            missing -= len(parts[-1])
    if missing == limit_characters:
        raise FileNotFoundError(f"the folder {folder} has no Python source files to train on")
    return "".join(parts)


def load_corpus(limit_characters: int = LIMIT_CHARACTERS) -> Corpus:
    """The text of `read_text` as numbers, split into training and validation part."""
    text = read_text(limit_characters)
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    numbers = torch.tensor([number[character] for character in text])
    train = int(len(numbers) * (1 - VALIDATION_SHARE))
    return Corpus(numbers[:train], numbers[train:], characters)


def draw_batch(
    numbers: Tensor, batch: int, time: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random excerpts: inputs and, one character later, targets; both int64, (batch, time)."""
    starts = torch.randint(len(numbers) - time, (batch, 1), generator=generator)
    index = starts + torch.arange(time)
    return numbers[index], numbers[index + 1]
