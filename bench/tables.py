"""Records -> tables. Every number that a command prints goes through here, live or from a file; nothing is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import machine
from .record import Record
from .show import Table

Results = list[dict[str, Any]]


def spread(stat: dict[str, Any] | None, digits: Callable[[float], str]) -> str:
    """A median and, behind it, how far the quartiles lie from it."""
    if stat is None:
        return "-"
    half = (stat["high"] - stat["low"]) / 2
    share = f" ±{half / stat['median']:.0%}" if stat["median"] else ""
    return digits(stat["median"]) + share


def three_digits(number: float) -> str:
    """Three significant digits, never an exponent."""
    if number == 0:
        return "0"
    whole = abs(number)
    places = 0 if whole >= 100 else 1 if whole >= 10 else 2 if whole >= 1 else 3
    return f"{number:,.{places}f}"


def times(stat: dict[str, Any] | None) -> str:
    """A ratio."""
    return "-" if stat is None else f"{three_digits(stat['median'])}x"


def unique(results: Results, key: str) -> list[Any]:
    """The values of a key, in order of appearance."""
    return list(dict.fromkeys(result[key] for result in results))


def case_name(result: dict[str, Any]) -> str:
    """What was measured, whoever the optimizer, in words."""
    if "tensors" in result and "model" not in result:
        return f"{result['tensors']} tensors"
    return " ".join(str(result[key]) for key in ("model", "dtype", "mode") if key in result)


def host_tables(record: Record) -> list[Table]:
    """Python time per step, per parameter, and against torch fused."""
    results: Results = record["results"]
    counts = unique(results, "tensors")
    cells = {(result["optimizer"], result["tensors"]): result for result in results}

    def table(title: str, cell: Callable[[dict[str, Any]], str]) -> Table:
        rows: list[list[str]] = []
        for name in unique(results, "optimizer"):
            found = [cells.get((name, count)) for count in counts]
            rows.append([name, *("-" if result is None else cell(result) for result in found)])
        return Table(title, ["optimizer", *(f"{count} tensors" for count in counts)], [*rows])

    grads = "the same gradient tensors every step" if results[0]["grads"] == "kept" else "new gradient tensors per step"
    return [
        table(f"us per step ({grads})", lambda result: spread(result["step_us"], three_digits)),
        table("ns per parameter", lambda result: three_digits(result["ns_per_parameter"])),
        table("times as fast as torch fused", lambda result: times(result["speedup"])),
    ]


MAKERS: dict[str, Callable[[Record], list[Table]]] = {"host": host_tables}


def left_out_lines(record: Record) -> list[str]:
    """One line per optimizer that was not measured, with the reason."""
    lines = []
    for entry in record["left_out"]:
        case = "".join(f" {value}" for value in entry.get("case", {}).values())
        lines.append(f"not measured: {entry['name']}{case}: {entry['reason']}")
    return list(dict.fromkeys(lines))


def tables_of(record: Record) -> list[Table]:
    """All tables of a record, the last one with its notes below."""
    maker = MAKERS.get(record["command"])
    tables = maker(record) if maker and record["results"] else []
    if tables:
        tables[-1].notes += [*record["notes"], *left_out_lines(record), f"machine: {machine.line(record['machine'])}"]
    return tables
