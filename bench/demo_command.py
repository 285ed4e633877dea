"""`demo`: train, show, draw and record. The training is in `demo.py`."""

from __future__ import annotations

import argparse
import importlib.util

from . import demo, demo_picture, demo_report, recipes_command
from .harness.corpus import load_corpus
from .harness.results import Recorder, write

STEPS = 250


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if the losses agree and `flatten` changes no bit, else 1; with --precision, if
    every recipe passes.

    Raises ValueError if `--seeds` comes without `--precision`.
    """
    if arguments.precision:
        return recipes_command.run(arguments)
    if arguments.seeds:
        raise ValueError(
            f"--seeds {arguments.seeds} goes with --precision alone; leave it out, or use --seed"
        )
    steps = arguments.steps or STEPS
    recorder = Recorder("demo", {"steps": steps, "seed": arguments.seed}, arguments.device)
    with demo_report.progress(steps) as on_step:
        outcome = demo.train(load_corpus(), steps, arguments.seed, arguments.device, on_step)
    demo_report.print_table(outcome)
    print(demo_report.verdict_text(outcome))
    if arguments.json:
        recorder.results.append(demo.result(outcome))
        write(recorder.record(), arguments.json)
        print(f"record: {arguments.json}")
    if importlib.util.find_spec("matplotlib"):
        demo_picture.draw(outcome, arguments.out)
        print(f"picture: {arguments.out}")
    else:
        print("picture: none, because matplotlib is not installed (pip install matplotlib)")
    return 0 if outcome.passed else 1
