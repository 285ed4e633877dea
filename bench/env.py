"""`env`: what machine this is, and which optimizers run on it.

A result: {"optimizer", "family"} of one that can be made here. The others are left out with the
reason.
"""

from __future__ import annotations

import argparse

import torch

from .harness.console import Table
from .harness.optimizers import Case, make, peers, variants
from .harness.results import Record
from .harness.session import Session


def run(arguments: argparse.Namespace) -> int:
    """Say what is here: machine, versions, optimizers; returns the exit code."""
    session = Session(arguments)
    case, recorder = Case(session.device), session.recorder
    for spec in [*variants(session.device, None, None), *peers().values()]:
        param = torch.nn.Parameter(torch.zeros(8, device=session.device))
        optimizer = make(spec, [param], case)
        if isinstance(optimizer, str):
            recorder.leave_out(spec.name, optimizer)
        else:
            recorder.results.append({"optimizer": spec.name, "family": spec.family})
    return session.finish(tables)


def tables(record: Record) -> list[Table]:
    """What runs here."""
    rows = [[result["optimizer"], result["family"], "yes"] for result in record["results"]]
    machine = record["machine"]
    memory = f"memory {machine['memory_bytes'] / 1e9:.0f} GB"
    cache = f"last cache {machine['cache_bytes'] / 2**20:.0f} MiB"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    columns = ["optimizer", "family", "runs"]
    return [Table("optimizers that run here", columns, [*rows], [f"{memory}, {cache}", versions])]
