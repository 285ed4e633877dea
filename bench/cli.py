"""The command line: arguments in, exit code out. What the sub-commands do is in `commands.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import commands, convergence, demo_command, recipes_command
from .arguments import (
    DEVICES,
    DTYPES,
    device,
    dtype,
    list_of,
    new_file,
    new_json,
    old_file,
    one_of,
    positive_number,
    whole_number,
)
from .harness.optimizers import peers
from .harness.shapes import ALLOWED, shapes_of

MOST_STEPS = 1_000_000
BACKENDS = ("auto", "triton", "reference", "compiled")

Parser = argparse.ArgumentParser


def braces(words: Sequence[str]) -> str:
    """Allowed words as help shows them."""
    return "{" + ",".join(words) + "}"


def make_parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command, and those of its sub-commands by name."""
    parser = Parser(
        "fused-adam-bench", description="Try and measure fused-adam.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Parser:
        sub: Parser = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = add(
        "step",
        commands.run_step,
        "time whole steps on models' parameters: ms, GB/s, share of copy bandwidth",
    )
    add_output(sub, plot=True)
    add_models(sub)
    add_optimizers(sub)
    add_case(sub)
    add_check(sub)

    sub = add(
        "host", commands.run_host, "time what a step costs in Python, against the number of tensors"
    )
    add_output(sub, plot=True)
    add_optimizers(sub)
    add_case(sub)
    add_check(sub)
    sub.add_argument(
        "--tensors",
        type=list_of(whole_number(1, 10**6)),
        metavar="N,N,...",
        help="default: 10,100,1000,5000",
    )
    sub.add_argument(
        "--grads",
        type=one_of(("kept", "new")),
        default="kept",
        metavar="{kept,new}",
        help="the same gradient tensors every step, or new ones as after zero_grad() and backward() (default: kept)",
    )
    sub.add_argument(
        "--caches",
        type=one_of(("cold", "warm")),
        default="cold",
        metavar="{cold,warm}",
        help="cold: after the other optimizers' steps; warm: after one of its own (default: cold)",
    )
    sub.add_argument(
        "--dtensors",
        action="store_true",
        help="also FusedAdamW on DTensors, as after FSDP2's fully_shard",
    )

    sub = add(
        "memory",
        commands.run_memory,
        "measure what optimizers hold, and take for a moment, per parameter",
    )
    add_output(sub)
    add_models(sub)
    add_optimizers(sub)
    add_case(sub)

    sub = add(
        "accuracy",
        commands.run_accuracy,
        "hold optimizers against a float64 run of the same formula",
    )
    add_output(sub)
    add_optimizers(sub)
    sub.add_argument(
        "--dtype",
        dest="dtypes",
        type=list_of(dtype),
        metavar="DTYPE,...",
        help=f"of: {', '.join(DTYPES)}",
    )
    sub.add_argument("--steps", type=whole_number(1, 10_000), metavar="N", help="default: 100")

    sub = add(
        "verify",
        commands.run_verify,
        "check the promised bits and the memory's speed here; a block to paste",
    )
    add_output(sub)

    sub = add("suite", commands.run_suite, "everything: under eight minutes on a GPU, one record")
    add_output(sub, plot=True)
    add_optimizers(sub)
    sub.add_argument("--amsgrad", action="store_true", help="keep the maximum of the second moment")
    sub.add_argument(
        "--clip", type=positive_number, metavar="NORM", help="clip the gradients' global norm"
    )
    sub.add_argument("--sweep", action="store_true", help="also try other launch sizes")

    sub = add("env", commands.run_env, "say what machine this is and which optimizers run on it")
    add_output(sub)

    sub = add(
        "report", commands.run_report, "tables, pictures and a document's tables from records"
    )
    sub.add_argument(
        "files",
        nargs="*",
        type=old_file,
        metavar="RECORD",
        help="JSON files that other commands wrote",
    )
    sub.add_argument("--markdown", action="store_true", help="tables as Markdown")
    sub.add_argument(
        "--plot", type=new_file(".png"), metavar="PNG", help="draw a picture (needs matplotlib)"
    )
    sub.add_argument(
        "--update",
        type=old_file,
        metavar="DOCUMENT",
        help="write its tables anew, marked <!-- bench: FILE.json -->",
    )

    text = (
        "train a small GPT with torch's AdamW, FusedAdamW and FusedAdamW(flatten=True), and compare"
    )
    sub = add("demo", demo_command.run, text)
    sub.add_argument(
        "--precision",
        type=list_of(recipe),
        metavar="RECIPE,...",
        help="train under these precision recipes instead, or `all` recommended ones, and compare their losses with "
        "torch's AdamW in fp32 and bf16",
    )
    sub.add_argument(
        "--steps",
        type=whole_number(1, MOST_STEPS),
        metavar="N",
        help=f"training steps (default: {demo_command.STEPS}, with --precision {recipes_command.STEPS})",
    )
    sub.add_argument(
        "--seeds",
        type=whole_number(2, 100),
        metavar="N",
        help=f"with --precision: how many seeds, from --seed on (default: {recipes_command.SEEDS})",
    )
    sub.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="of weights and batches (default: 0)",
    )
    add_device(sub)
    sub.add_argument(
        "--out",
        type=new_file(".png"),
        default="demo.png",
        metavar="PNG",
        help="the picture (default: demo.png)",
    )
    sub.add_argument(
        "--json",
        type=new_file(".json"),
        metavar="JSON",
        help="write everything measured to this file",
    )
    return parser, subparsers.choices


def add_device(sub: Parser) -> None:
    sub.add_argument(
        "--device",
        type=device,
        default="auto",
        metavar=braces(DEVICES),
        help="auto: cuda if there is one",
    )


def add_output(sub: Parser, plot: bool = False) -> None:
    """Options of every command that measures: where, how long, and where to write."""
    add_device(sub)
    sub.add_argument(
        "--json",
        type=new_json,
        metavar="FILE|-",
        help="write the record to this file, or to stdout",
    )
    if plot:
        sub.add_argument(
            "--plot", type=new_file(".png"), metavar="PNG", help="draw a picture (needs matplotlib)"
        )
    sub.add_argument(
        "--quick", action="store_true", help="under a minute on two cores, at the price of noise"
    )
    sub.add_argument(
        "--seconds", type=positive_number, metavar="S", help="how long to measure in all"
    )
    sub.add_argument(
        "--threads", type=whole_number(1, 1024), metavar="N", help="of torch on the CPU"
    )


def add_optimizers(sub: Parser) -> None:
    """Options that say which optimizers take part."""
    sub.add_argument(
        "--backend",
        type=one_of(BACKENDS),
        metavar=braces(BACKENDS),
        help="only this one of ours (default: each of use)",
    )
    words = tuple(commands.FLATTEN)
    sub.add_argument(
        "--flatten",
        type=one_of(words),
        default="both",
        metavar=braces(words),
        help="flat buffers (default: both)",
    )
    known = ("none", *peers())
    sub.add_argument(
        "--peers",
        type=list_of(one_of(known)),
        metavar="NAME,...",
        help=f"default: all that run here; of: {', '.join(known)}",
    )
    sub.add_argument(
        "--precision",
        type=list_of(str),
        metavar="RECIPE,...",
        help="precision recipes of ours, one row each; none: without",
    )


def add_models(sub: Parser) -> None:
    """Options that say whose parameters are stepped on."""
    group = sub.add_mutually_exclusive_group()
    group.add_argument(
        "--model",
        type=list_of(model_name),
        metavar="NAME,...",
        help=f"default: gpt2,many-small; of: {ALLOWED}",
    )
    group.add_argument(
        "--shapes",
        type=old_file,
        metavar="FILE",
        help="JSON: a list of shapes, [[768, 3072], [768]]",
    )
    group.add_argument(
        "--hf-config", type=Path, metavar="PATH", help="a Hugging Face config.json, or its folder"
    )


def model_name(text: str) -> str:
    """An argument type: a model's name."""
    try:
        shapes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def recipe(text: str) -> str:
    """An argument type: a precision recipe's name, or `all`."""
    try:
        convergence.names_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_case(sub: Parser) -> None:
    """Options that say what is stepped on."""
    sub.add_argument(
        "--dtype",
        type=dtype,
        metavar=braces(DTYPES),
        help="of parameters (default: float32, with --precision the first that every recipe serves)",
    )
    sub.add_argument(
        "--grad-dtype", type=dtype, metavar=braces(DTYPES), help="default: the parameters'"
    )
    sub.add_argument("--amsgrad", action="store_true", help="keep the maximum of the second moment")
    sub.add_argument(
        "--clip", type=positive_number, metavar="NORM", help="clip the gradients' global norm"
    )


def add_check(sub: Parser) -> None:
    sub.add_argument(
        "--check",
        type=positive_number,
        metavar="MIN_RATIO",
        help="exit with 1 unless the best of ours is this many times as fast as torch fused in every case",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` without the program's name, by default the process's own. Returns the
    exit code.

    0: all is well; 1: optimizers disagree, or a check is not met; 2: bad arguments, a file that
    cannot be read or written, or too little memory; 130: interrupted, as a shell has it for a
    process that Ctrl-C ended.
    """
    parser, subparsers = make_parsers()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        sub = subparsers[arguments.command]
        options = ", ".join(option for action in sub._actions for option in action.option_strings)
        sub.error(f"{unknown[0]!r} is not known; allowed: {options}")
    try:
        code: int = arguments.run(arguments)
    except (OSError, ValueError, MemoryError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return code
