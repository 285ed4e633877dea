"""The command line: arguments in, exit code out. No training, no measuring here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import demo, picture, report
from .text import load_corpus

DEVICES = ("auto", "cpu", "cuda")
MOST_STEPS = 1_000_000


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


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


def device(text: str) -> torch.device:
    """An argument type: a device of DEVICES that is there."""
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(f"{text!r} is not known; allowed: {', '.join(DEVICES)}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("'cuda' is not available here; allowed: auto, cpu")
    return torch.device("cuda" if text == "cuda" or (text == "auto" and torch.cuda.is_available()) else "cpu")


def make_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command, and those of its sub-commands by name."""
    parser = argparse.ArgumentParser("fused-adam-bench", description="Try and measure fused-adam.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "train a small GPT with torch's AdamW, FusedAdamW and FusedAdamW(flatten=True), and compare"
    sub = commands.add_parser("demo", help=text, description=text, allow_abbrev=False)
    sub.set_defaults(run=run_demo)
    sub.add_argument(
        "--steps", type=whole_number(1, MOST_STEPS), default=250, metavar="N", help="training steps (default: 250)"
    )
    sub.add_argument(
        "--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="N", help="of weights and batches (default: 0)"
    )
    sub.add_argument(
        "--device",
        type=device,
        default="auto",
        metavar="{" + ",".join(DEVICES) + "}",
        help="auto: cuda if there is one",
    )
    sub.add_argument(
        "--out", type=new_file(".png"), default="demo.png", metavar="PNG", help="the picture (default: demo.png)"
    )
    sub.add_argument("--json", type=new_file(".json"), metavar="JSON", help="write everything measured to this file")
    return parser, commands.choices


def run_demo(arguments: argparse.Namespace) -> int:
    """Train, show, draw and record. Returns 0 if the losses agree and `flatten` changes no bit, else 1."""
    with report.progress(arguments.steps) as on_step:
        outcome = demo.train(load_corpus(), arguments.steps, arguments.seed, arguments.device, on_step)
    report.print_table(outcome)
    print(report.verdict_text(outcome))
    if arguments.json:
        arguments.json.write_text(json.dumps(demo.record(outcome), indent=1) + "\n")
        print(f"record: {arguments.json}")
    if importlib.util.find_spec("matplotlib"):
        picture.draw(outcome, arguments.out)
        print(f"picture: {arguments.out}")
    else:
        print("picture: none, because matplotlib is not installed (pip install matplotlib)")
    return 0 if outcome.passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` without the program's name, by default the process's own. Returns the exit code.

    0: all is well; 1: the optimizers disagree; 2: bad arguments, or a file that cannot be read or written.
    """
    parser, commands = make_parsers()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands[arguments.command]
        options = ", ".join(option for action in command._actions for option in action.option_strings)
        command.error(f"{unknown[0]!r} is not known; allowed: {options}")
    try:
        code: int = arguments.run(arguments)
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return code
