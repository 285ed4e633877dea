"""The record of a run: one JSON object, the same envelope for every command. No measuring, no
tables here.

Schema "fused-adam-bench/1". A reader refuses another name; a new key does not change it, another
meaning does.

    schema     "fused-adam-bench/1"
    command    "step", "host", "memory", "accuracy", "verify", "suite", "demo", "env", or "recipes"
    for
               `demo --precision`
    arguments  the command's options, by name, as text, numbers, booleans or lists of them
    machine    device, cpu, cores, threads, memory_bytes, cache_bytes, load (of one minute, at the
    start), system,
               versions, commit, and on a GPU gpu, gpu_memory_bytes, gpu_capability, gpu_runtime
    started    when, UTC, ISO 8601
    seconds    how long it took
    results    one object per measurement: see the module of the command (`step.py`, ...)
    left_out   what was asked for and not measured: {"name", "reason"}, where it matters "case", and
    "failed": true if
               it is an optimizer of ours that broke or was wrong
    notes      what a reader of the numbers has to know, in words

A statistic is {"median", "low", "high", "rounds"}: median and quartiles over the rounds of one
interleaved run. A ratio is such a statistic of time / time in the same round. Times end in _us or
_ms, sizes in _bytes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..arguments import STDOUT
from . import machine

SCHEMA = "fused-adam-bench/1"
KEYS = (
    "schema",
    "command",
    "arguments",
    "machine",
    "started",
    "seconds",
    "results",
    "left_out",
    "notes",
)

Record = dict[str, Any]


@dataclass
class Recorder:
    """Collects one run's results."""

    command: str
    arguments: dict[str, Any]
    device: torch.device
    results: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        # At the start: a minute of measuring is itself a load of one.
        self._machine = machine.describe(self.device)

    def leave_out(self, name: str, reason: str, failed: bool = False, **case: Any) -> None:
        """Note what was asked for and could not be measured. failed: it is ours, and should have
        been.
        """
        entry: dict[str, Any] = {"name": name, "reason": reason}
        entry |= {"case": case} if case else {}
        entry |= {"failed": True} if failed else {}
        if entry not in self.left_out:
            self.left_out.append(entry)

    def record(self) -> Record:
        """Everything so far."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "arguments": self.arguments,
            "machine": self._machine,
            "started": self._started,
            "seconds": round(time.monotonic() - self._begin, 1),
            "results": self.results,
            "left_out": self.left_out,
            "notes": self.notes,
        }


def write(record: Record, path: Path) -> None:
    """Write to a file, or to standard output for `-`. Raises OSError."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
    else:
        path.write_text(text)


def read(path: Path) -> Record:
    """Read a record. Raises ValueError, naming the file, if it is none or of another schema."""
    try:
        record = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not a JSON file: {error}") from None
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{str(path)!r} has the schema {found!r}; this version reads {SCHEMA!r}")
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"{str(path)!r} lacks {', '.join(missing)}")
    return dict(record)
