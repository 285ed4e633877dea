"""The command line: arguments in, exit code out. What a command does is in the file of its name.

Nothing here imports torch before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .harness.shapes import ALLOWED, shapes_of

if TYPE_CHECKING:
    import torch

Parser = argparse.ArgumentParser

PROGRAM = "fused-adam-bench"
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16", "float64")
BACKENDS = ("auto", "triton", "reference", "compiled")
FLATTEN = ("both", "on", "off")
# The names of `harness.optimizers.peers()`, which imports torch. A test compares them.
PEERS = (
    "torch-fused",
    "torch-foreach",
    "torch-single",
    "torch-compile",
    "optimi",
    "flashoptim",
    "torchao-8-bit",
    "bitsandbytes-32-bit",
    "bitsandbytes-8-bit",
    "apex",
    "transformer-engine",
    "deepspeed",
)
TRAINED = ("gpt2", "llama-3-8b", "tiny")  # the names of `train.MODELS`
MOST_STEPS = 1_000_000


# Argument types: text in, a checked value out, or one line that says what is allowed.


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def decay_of_averages(text: str) -> float:
    """A number of at least 0 and below 1."""
    try:
        number = float(text)
    except ValueError:
        number = 1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0 and below 1")
    return number


def new_file(suffix: str) -> Callable[[str], Path]:
    """A file with this suffix, to be written into a folder that exists."""

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
    """A new .json file, or `-` for standard output."""
    return Path("-") if text == "-" else new_file(".json")(text)


def old_file(text: str) -> Path:
    """A file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file that is there")
    return path


def one_of(allowed: Iterable[str]) -> Callable[[str], str]:
    """One of these words."""
    words = tuple(allowed)

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not known; allowed: {', '.join(words)}")
        return text

    return parse


def list_of(each: Callable[[str], object]) -> Callable[[str], list[object]]:
    """Values of type `each`, separated by commas; each once."""

    def parse(text: str) -> list[object]:
        return [each(word) for word in dict.fromkeys(text.split(","))]

    return parse


def device(text: str) -> torch.device:
    """A device of DEVICES that is there."""
    import torch

    one_of(DEVICES)(text)
    there = torch.cuda.is_available()
    if text == "cuda" and not there:
        raise argparse.ArgumentTypeError("'cuda' is not available here; allowed: auto, cpu")
    return torch.device("cuda" if there and text != "cpu" else "cpu")


def dtype(text: str) -> torch.dtype:
    """One of DTYPES."""
    import torch

    value: torch.dtype = getattr(torch, one_of(DTYPES)(text))
    return value


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """Text for which `check` raises no ValueError."""

    def parse(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse


def recipe(text: str) -> object:
    """A precision recipe's name, or `all`. Raises ValueError."""
    from .convergence import recipe_names

    return recipe_names(text)


def peer(text: str) -> None:
    """Another project's optimizer for `convergence`. Raises ValueError."""
    from .convergence import check_peer

    check_peer(text)


# Options and commands.


def words(allowed: Sequence[str], **more: Any) -> dict[str, Any]:
    """An option whose value is one of these words."""
    return {"type": one_of(allowed), "metavar": "{" + ",".join(allowed) + "}", **more}


def text(parse: Callable[[str], object], metavar: str, help: str, **more: Any) -> dict[str, Any]:
    """An option with a value of this type."""
    return {"type": parse, "metavar": metavar, "help": help, **more}


def flag(help: str) -> dict[str, Any]:
    """An option without a value."""
    return {"action": "store_true", "help": help}


ONE_MINUTE = "under a minute on two cores, at the price of noise"
SEED = whole_number(0, 2**63 - 1)
ANY_STEPS = whole_number(1, MOST_STEPS)
OPTIONS: dict[str, dict[str, Any]] = {
    "--device": {**words(DEVICES), "type": device, "default": "auto", "help": "auto: cuda if any"},
    "--json": text(new_json, "FILE|-", "write the record to this file, or to stdout"),
    "--plot": text(new_file(".png"), "PNG", "draw a picture (needs matplotlib)"),
    "--quick": flag(ONE_MINUTE),
    "--seconds": text(positive_number, "S", "how long to measure in all"),
    "--threads": text(whole_number(1, 1024), "N", "of torch on the CPU"),
    "--model": text(
        list_of(checked(shapes_of)), "NAME,...", f"default: gpt2,many-small; of: {ALLOWED}"
    ),
    "--shapes": text(old_file, "FILE", "JSON: a list of shapes, [[768, 3072], [768]]"),
    "--hf-config": text(Path, "PATH", "a Hugging Face config.json, or its folder"),
    "--backend": words(BACKENDS, help="only this one of ours (default: each of use)"),
    "--flatten": words(FLATTEN, default="both", help="flat buffers (default: both)"),
    "--peers": text(
        list_of(one_of(("none", *PEERS))),
        "NAME,...",
        f"default: all that run here; of: none, {', '.join(PEERS)}",
    ),
    "--precision": text(list_of(str), "RECIPE,...", "recipes of ours, one row each; none: without"),
    "--dtype": {
        **words(DTYPES),
        "type": dtype,
        "help": "of parameters (default: float32, with --precision the first that all serve)",
    },
    "--grad-dtype": {**words(DTYPES), "type": dtype, "help": "default: the parameters'"},
    "--amsgrad": flag("keep the maximum of the second moment"),
    "--clip": text(positive_number, "NORM", "clip the gradients' global norm"),
    "--ema": text(
        decay_of_averages,
        "DECAY",
        "average the weights: inside our step, and by torch's AveragedModel after the others'",
    ),
    "--check": text(
        positive_number,
        "MIN_RATIO",
        "exit with 1 unless the best of ours is this many times as fast as torch fused everywhere",
    ),
    "--tensors": text(list_of(whole_number(1, 10**6)), "N,N,...", "default: 10,100,1000,5000"),
    "--grads": words(
        ("kept", "new"),
        default="kept",
        help="the same gradient tensors every step, or new ones as after zero_grad() and "
        "backward() (default: kept)",
    ),
    "--caches": words(
        ("cold", "warm"),
        default="cold",
        help="cold: after the other optimizers' steps; warm: after one of its own (default: cold)",
    ),
    "--dtensors": flag("also FusedAdamW on DTensors, as after FSDP2's fully_shard"),
    "--sweep": flag("also try other launch sizes"),
    "--markdown": flag("tables as Markdown"),
    "--update": text(
        old_file, "DOCUMENT", "write its tables anew, marked <!-- bench: FILE.json -->"
    ),
    "--steps": text(ANY_STEPS, "N", "training steps (default: 250)"),
    "--seed": text(SEED, "N", "of weights and batches (default: 0)", default=0),
    "--memory": text(positive_number, "GB", "of the GPU's memory, at most (default: all of it)"),
    "--state-device": words(("cpu",), help="FusedAdamW's state in host memory"),
    "--in-backward": flag("FusedAdamW steps while backward runs (step_in_backward)"),
    "--seeds": text(whole_number(2, 100), "N", "how many seeds, from --seed on (default: 3)"),
}
MODEL = ("--model", "--shapes", "--hf-config")  # one of them
OPTIMIZERS = ("--backend", "--flatten", "--peers", "--precision")
CASE = ("--dtype", "--grad-dtype", "--amsgrad", "--clip")
TIMED = ("--device", "--json", "--plot", "--quick", "--seconds", "--threads")


class Command(NamedTuple):
    """Help, the options that act on it, and what it says otherwise of some of them."""

    help: str
    options: Sequence[str]
    changes: dict[str, dict[str, Any]] = {}  # noqa: RUF012  (nothing writes into it)


COMMANDS = {
    "step": Command(
        "time whole steps on models' parameters: ms, GB/s, share of copy bandwidth",
        (*TIMED, *MODEL, *OPTIMIZERS, *CASE, "--ema", "--check"),
    ),
    "host": Command(
        "time what a step costs in Python, against the number of tensors",
        (*TIMED, *OPTIMIZERS, *CASE, "--check", "--tensors", "--grads", "--caches", "--dtensors"),
    ),
    "memory": Command(
        "measure what optimizers hold, and take for a moment, per parameter",
        ("--device", "--json", "--quick", *MODEL, *OPTIMIZERS, *CASE, "--ema"),
        {"--model": {"help": f"default: gpt2 on a GPU, otherwise resnet50; of: {ALLOWED}"}},
    ),
    "stream": Command(
        "time steps with state on the host: ms, GB/s per direction, next to pinned copies",
        ("--device", "--json", "--quick", "--seconds", *MODEL, "--precision"),
        {"--model": {"help": f"default: llama-3-8b/8, a billion parameters; of: {ALLOWED}"}},
    ),
    "accuracy": Command(
        "compare optimizers with a float64 run of the same formula",
        ("--device", "--json", "--quick", *OPTIMIZERS, "--dtype", "--steps"),
        {
            "--dtype": text(
                list_of(dtype),
                "DTYPE,...",
                f"default: all but float64; of: {', '.join(DTYPES)}",
                dest="dtypes",
            ),
            "--steps": text(whole_number(1, 10_000), "N", "default: 100"),
        },
    ),
    "schemes": Command(
        "compare ways of storing Adam's moments in few bits, ours and other projects'",
        ("--device", "--json", "--quick", "--steps"),
        {"--steps": text(whole_number(2, 100_000), "N", "default: 2500")},
    ),
    "verify": Command(
        "check the promised bits and the memory's speed, in about a minute; a block to paste",
        ("--device", "--json", "--quick", "--threads"),
        {"--quick": {"help": "a few seconds: short hashes and the copy bandwidth alone"}},
    ),
    "suite": Command(
        "everything: under eight minutes on a GPU, one record",
        (*TIMED, *OPTIMIZERS, "--amsgrad", "--clip", "--sweep"),
    ),
    "env": Command(
        "say what machine this is and which optimizers run on it", ("--device", "--json")
    ),
    "report": Command(
        "tables, pictures and a document's tables from records",
        ("--markdown", "--plot", "--update"),
    ),
    "demo": Command(
        "train a small GPT with torch's AdamW, FusedAdamW and its flatten=True, and compare them",
        ("--device", "--json", "--plot", "--steps", "--seed"),
        {"--plot": {"default": "demo.png", "help": "the picture (default: demo.png)"}},
    ),
    "train": Command(
        "train GPT-2 or an 8 B Llama in bf16: tokens per second, peak memory, loss",
        (
            *("--device", "--json", "--model", "--peers", "--precision"),
            *("--steps", "--seed", "--memory", "--in-backward", "--state-device"),
        ),
        {
            "--model": text(
                list_of(one_of(TRAINED)), "NAME,...", f"default: gpt2; of: {', '.join(TRAINED)}"
            ),
            "--peers": text(
                list_of(one_of(("torch-fused",))), "NAME", "torch-fused, or nothing (the default)"
            ),
            "--steps": {"help": "training steps (default: 150)"},
        },
    ),
    "convergence": Command(
        "train a small GPT under precision recipes, and with torch's AdamW in fp32 and bf16",
        (
            *("--device", "--json", "--plot", "--quick"),
            *("--precision", "--peers", "--steps", "--seed", "--seeds"),
        ),
        {
            "--plot": {
                "default": "convergence.png",
                "help": "the picture (default: convergence.png)",
            },
            "--quick": {"help": "about a minute on two cores: too short to tell good from bad"},
            "--precision": {
                "type": list_of(checked(recipe)),
                "default": "all",
                "help": "default: `all` recommended ones",
            },
            "--peers": {
                "type": list_of(checked(peer)),
                "default": [],
                "help": "other projects' optimizers too: bitsandbytes-8-bit, torchao-8-bit",
            },
            "--steps": {"help": "training steps (default: 1000)"},
        },
    ),
}


def make_parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the program, and those of its commands by name."""
    parser = Parser(PROGRAM, description="Try and measure fused-adam.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        about = command.help
        sub = subparsers.add_parser(name, help=about, description=about, allow_abbrev=False)
        if name == "report":
            records = text(old_file, "RECORD", "JSON files that other commands wrote", nargs="*")
            sub.add_argument("files", **records)
        # argparse cannot print the usage of an empty group.
        models = sub.add_mutually_exclusive_group() if MODEL[0] in command.options else sub
        for option in command.options:
            group = models if option in MODEL else sub
            group.add_argument(option, **{**OPTIONS[option], **command.changes.get(option, {})})
    return parser, subparsers.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` without the program's name, by default the process's own. Returns the
    exit code.

    0: all is well; 1: optimizers disagree, or a check is not met; 2: bad arguments, a file that
    cannot be read or written, or too little memory; 130: interrupted, as a shell has it for a
    process that Ctrl-C ended.
    """
    parser, subparsers = make_parsers()
    try:
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            sub = subparsers[arguments.command]
            known = ", ".join(o for action in sub._actions for o in action.option_strings)
            sub.error(f"{unknown[0]!r} is not known; allowed: {known}")
        if sys.stdout is None:
            raise BrokenPipeError
        command = importlib.import_module(f".{arguments.command}", __package__)
        code: int = command.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return failed("interrupted", 130)
    except BrokenPipeError:
        discard_output()
        return failed("error: standard output is closed", 2)
    except (OSError, ValueError, MemoryError) as error:
        discard_output()
        return failed(f"error: {error}", 2)
    return code


def failed(text: str, code: int) -> int:
    """Say so in one line; returns the exit code."""
    print(f"{PROGRAM}: {text}", file=sys.stderr)
    return code


def discard_output() -> None:
    """Let what standard output still holds go nowhere: it would fail once more at exit."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        try:
            sys.stdout.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
