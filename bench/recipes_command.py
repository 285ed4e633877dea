"""`demo --precision`: train, show, draw and record. The training and the verdict are in
`recipes.py`.
"""

from __future__ import annotations

import argparse
import importlib.util

from . import recipes, recipes_picture, record, tables
from .record import Recorder
from .show import Screen

STEPS, SEEDS = 1000, 3


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if every recipe passes, else 1."""
    names = list(dict.fromkeys(n for name in arguments.precision for n in recipes.names_of(name)))
    steps, count = arguments.steps or STEPS, arguments.seeds or SEEDS
    options = {"precision": names, "steps": steps, "seed": arguments.seed, "seeds": count}
    recorder = Recorder("recipes", options, arguments.device)
    screen = Screen()
    with screen.progress("trained") as tell:
        seeds = range(arguments.seed, arguments.seed + count)
        results = recipes.train(names, steps, seeds, arguments.device, tell)
    recorder.results = recipes.json_ready(results)
    found = recorder.record()
    for table in tables.tables_of(found):
        screen.table(table)
    if arguments.json:
        record.write(found, arguments.json)
        screen.print(f"record: {arguments.json}")
    if importlib.util.find_spec("matplotlib"):
        recipes_picture.draw(found, arguments.out)
        screen.print(f"picture: {arguments.out}")
    else:
        screen.print("picture: none, because matplotlib is not installed (pip install matplotlib)")
    return 0 if all(result["passed"] is not False for result in results) else 1
