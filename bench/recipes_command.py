"""`demo --precision`: train, show, draw and record. The training and the verdict are in
`convergence.py`.
"""

from __future__ import annotations

import argparse
import importlib.util

from . import convergence, recipes_picture, tables
from .harness.console import Screen
from .harness.results import Recorder, write

STEPS, SEEDS = 1000, 3


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if every recipe passes, else 1."""
    names = list(
        dict.fromkeys(n for name in arguments.precision for n in convergence.names_of(name))
    )
    steps, count = arguments.steps or STEPS, arguments.seeds or SEEDS
    options = {"precision": names, "steps": steps, "seed": arguments.seed, "seeds": count}
    recorder = Recorder("recipes", options, arguments.device)
    screen = Screen()
    with screen.progress("trained") as tell:
        seeds = range(arguments.seed, arguments.seed + count)
        results = convergence.train(names, steps, seeds, arguments.device, tell)
    recorder.results = convergence.json_ready(results)
    found = recorder.record()
    for table in tables.tables_of(found):
        screen.table(table)
    if arguments.json:
        write(found, arguments.json)
        screen.print(f"record: {arguments.json}")
    if importlib.util.find_spec("matplotlib"):
        recipes_picture.draw(found, arguments.out)
        screen.print(f"picture: {arguments.out}")
    else:
        screen.print("picture: none, because matplotlib is not installed (pip install matplotlib)")
    return 0 if all(result["passed"] is not False for result in results) else 1
