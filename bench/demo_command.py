"""`demo`: train, show, draw and record. The training is in `demo.py`."""

from __future__ import annotations

import argparse
import importlib.util

from . import demo, demo_picture, demo_report, record
from .record import Recorder
from .text import load_corpus


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if the losses agree and `flatten` changes no bit, else 1."""
    recorder = Recorder("demo", {"steps": arguments.steps, "seed": arguments.seed}, arguments.device)
    with demo_report.progress(arguments.steps) as on_step:
        outcome = demo.train(load_corpus(), arguments.steps, arguments.seed, arguments.device, on_step)
    demo_report.print_table(outcome)
    print(demo_report.verdict_text(outcome))
    if arguments.json:
        recorder.results.append(demo.result(outcome))
        record.write(recorder.record(), arguments.json)
        print(f"record: {arguments.json}")
    if importlib.util.find_spec("matplotlib"):
        demo_picture.draw(outcome, arguments.out)
        print(f"picture: {arguments.out}")
    else:
        print("picture: none, because matplotlib is not installed (pip install matplotlib)")
    return 0 if outcome.passed else 1
