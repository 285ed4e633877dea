"""The record of a run: one JSON object, the same envelope for every command.

Schema "fused-adam-bench/1". A reader refuses another name. A new key does not change the name;
another meaning of a key does.

    schema     "fused-adam-bench/1"
    command    "step", "host", "memory", "stream", "accuracy", "schemes", "verify", "suite", "demo",
               "env", "convergence" ("recipes" in older records); parts of a suite: "tests",
               "ceiling", "sweep"
    arguments  the command's options by name: text, numbers, booleans, or lists of them
    machine    device, cpu, cores, threads, memory_bytes, cache_bytes, load (of one minute, at the
               start), system, versions, commit; on a GPU also gpu, gpu_memory_bytes,
               gpu_capability, gpu_runtime
    started    when, UTC, ISO 8601
    seconds    how long it took
    results    one object per measurement: see the command's file (`step.py`, ...)
    left_out   what was asked for and not measured: {"name", "reason"}, where it matters "case",
               and "failed": true for an optimizer of ours that broke or was wrong
    notes      what a reader of the numbers has to know, in words

A statistic is {"median", "low", "high", "rounds"}: median and quartiles over the rounds of one
interleaved run. A ratio is such a statistic of time / time in the same round. Times end in _us or
_ms, sizes in _bytes. A number that is not finite is null.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import machine

SCHEMA = "fused-adam-bench/1"
STDOUT = Path("-")
# What a reader relies on before it looks into the results of a command.
TYPES: dict[str, type | tuple[type, ...]] = {
    "schema": str,
    "command": str,
    "arguments": dict,
    "machine": dict,
    "started": str,
    "seconds": (int, float),
    "results": list,
    "left_out": list,
    "notes": list,
}

Record = dict[str, Any]
Result = dict[str, Any]


@dataclass
class Recorder:
    """Collects one run's results."""

    command: str
    arguments: dict[str, Any]
    device: torch.device
    results: list[Result] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        # At the start: a minute of measuring is itself a load of one.
        self._machine = machine.describe(self.device)

    def leave_out(self, name: str, reason: str, failed: bool = False, **case: Any) -> None:
        """Note what was asked for and not measured. failed: it is ours, and should have been."""
        entry: dict[str, Any] = {"name": name, "reason": reason}
        entry |= {"case": case} if case else {}
        entry |= {"failed": True} if failed else {}
        if entry not in self.left_out:
            self.left_out.append(entry)

    def record(self) -> Record:
        """Everything so far, as JSON takes it."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "arguments": self.arguments,
            "machine": self._machine,
            "started": self._started,
            "seconds": round(time.monotonic() - self._begin, 1),
            "results": json_ready(self.results),
            "left_out": self.left_out,
            "notes": self.notes,
        }


def json_ready(value: Any) -> Any:
    """Numbers that are not finite as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{str(path)!r} has the schema {schema!r}; this version reads {SCHEMA!r}")
    missing = [key for key in TYPES if key not in record]
    if missing:
        raise ValueError(f"{str(path)!r} lacks {', '.join(missing)}")
    for key, wanted in TYPES.items():
        if not isinstance(record[key], wanted):
            raise ValueError(f"{str(path)!r} has {key}={record[key]!r:.60}, of a wrong type")
    return dict(record)


def unique(results: Iterable[Result], key: str) -> list[Any]:
    """The values of a key, in order of appearance."""
    return list(dict.fromkeys(result[key] for result in results))


def case_title(result: Result) -> str:
    """What a result of `step` stepped on, in words."""
    grads = "" if result["grad_dtype"] == result["dtype"] else f", {result['grad_dtype']} gradients"
    more = f"{', amsgrad' if result['amsgrad'] else ''}{', clipped' if result['clip'] else ''}"
    more += averaged(result)
    turns = "" if result["resident"] else ", one optimizer in memory at a time"
    return (
        f"{result['model']}: {result['parameters']:,} parameters in {result['tensors']:,} tensors, "
        f"{result['dtype']}{grads}{more}; {result['mode']}{turns}"
    )


def averaged(result: Result) -> str:
    """Words for a title, if weights were averaged. Records of 0.1.0 do not say."""
    return "" if result.get("ema") is None else ", weights averaged"


def failures(record: Record) -> list[dict[str, Any]]:
    """What of ours broke or was wrong, in every part of a record."""
    parts = record["results"] if record["command"] == "suite" else [record]
    return [entry for part in parts for entry in part["left_out"] if entry.get("failed")]


def left_out_lines(record: Record) -> list[str]:
    """One line per optimizer that was not measured, with the reason."""
    lines = []
    for entry in record["left_out"]:
        case = "".join(f", {value}" for value in entry.get("case", {}).values())
        lines.append(f"not measured: {entry['name']}{case}: {entry['reason']}")
    return list(dict.fromkeys(lines))
