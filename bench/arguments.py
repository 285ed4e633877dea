"""Argument types of the command line: text in, a checked value out, or one line that says what is
allowed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16", "float64")
STDOUT = Path("-")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def positive_number(text: str) -> float:
    """An argument type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def new_file(suffix: str) -> Callable[[str], Path]:
    """An argument type: a file with this suffix, to be written into a folder that exists."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix or path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is not a file name that ends in {suffix}")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(
                f"{text!r} cannot be written: the folder {str(path.parent)!r} does not exist"
            )
        return path

    return parse


def new_json(text: str) -> Path:
    """An argument type: a new .json file, or `-` for standard output."""
    return STDOUT if text == "-" else new_file(".json")(text)


def old_file(text: str) -> Path:
    """An argument type: a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file that is there")
    return path


def device(text: str) -> torch.device:
    """An argument type: a device of DEVICES that is there."""
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; allowed: {', '.join(DEVICES)}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("'cuda' is not available here; allowed: auto, cpu")
    return torch.device(
        "cuda" if text == "cuda" or (text == "auto" and torch.cuda.is_available()) else "cpu"
    )


def dtype(text: str) -> torch.dtype:
    """An argument type: one of DTYPES."""
    one_of(DTYPES)(text)
    found: torch.dtype = getattr(torch, text)
    return found


def one_of(allowed: Iterable[str]) -> Callable[[str], str]:
    """An argument type: one of these words."""
    words = tuple(allowed)

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not known; allowed: {', '.join(words)}")
        return text

    return parse


def list_of(each: Callable[[str], object]) -> Callable[[str], list[object]]:
    """An argument type: values of type `each`, separated by commas; each once."""

    def parse(text: str) -> list[object]:
        return [each(word) for word in dict.fromkeys(text.split(","))]

    return parse
