"""Records -> tables. Every number that a command prints goes through here, live or from a file;
nothing is measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import machine
from .harness.console import Table, markdown_lines
from .harness.results import Record, read
from .recipes_tables import recipe_tables

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

    def line(name: str) -> str:
        """Through the first and the last count."""
        known = [cells[name, count] for count in counts if (name, count) in cells]
        first, last = known[0], known[-1]
        if first is last:
            return "-"
        rise = last["step_us"]["median"] - first["step_us"]["median"]
        slope = rise / (last["tensors"] - first["tensors"])
        return f"{first['step_us']['median'] - slope * first['tensors']:,.0f} + {slope:.3f} n"

    grads = (
        "the same gradient tensors every step"
        if results[0]["grads"] == "kept"
        else "new gradient tensors per step"
    )
    steps = table(
        f"us per step ({grads}, {results[0]['caches']} caches)",
        lambda result: spread(result["step_us"], three_digits),
    )
    steps.columns = [*steps.columns, "first to last"]
    steps.rows = [[*row, line(row[0])] for row in steps.rows]
    return [
        steps,
        table("ns per parameter", lambda result: three_digits(result["ns_per_parameter"])),
        table("times as fast as torch fused", lambda result: times(result["speedup"])),
    ]


def step_tables(record: Record) -> list[Table]:
    """One table per model, case and mode."""
    groups: dict[str, Results] = {}
    for result in record["results"]:
        groups.setdefault(step_title(result), []).append(result)
    tables = []
    for title, results in groups.items():
        # Where a kernel with the update's accesses was timed too, the faster of the two is the
        # limit.
        limit = "ceiling" if results[0].get("move_gb_per_s") else "copy"
        columns = ["optimizer", "ms per step", "GB/s", f"of {limit}"]
        columns += ["vs torch fused", "B/param. moved", "state B/param."]
        rows = [
            [
                result["optimizer"],
                spread(result["step_ms"], three_digits),
                three_digits(result["gb_per_s"]["median"]),
                f"{result[f'share_of_{limit}']['median']:.0%}",
                times(result["speedup"]),
                three_digits(result["moved_bytes"]),
                three_digits(result["held_bytes"]),
            ]
            for result in results
        ]
        copy = results[0]["copy_gb_per_s"]
        note = f"copy bandwidth in the same rounds: {spread(copy, three_digits)} GB/s"
        if limit == "ceiling":
            move = spread(results[0]["move_gb_per_s"], three_digits)
            note += f"; of the update's accesses alone: {move} GB/s; ceiling: the faster of the two"
        tables.append(Table(title, columns, [*rows], [note]))
    return tables


def step_title(result: dict[str, Any]) -> str:
    """What was stepped on, in words."""
    grads = "" if result["grad_dtype"] == result["dtype"] else f", {result['grad_dtype']} gradients"
    more = f"{', amsgrad' if result['amsgrad'] else ''}{', clipped' if result['clip'] else ''}"
    turns = "" if result["resident"] else ", one optimizer in memory at a time"
    return (
        f"{result['model']}: {result['parameters']:,} parameters in {result['tensors']:,} tensors, {result['dtype']}"
        f"{grads}{more}; {result['mode']}{turns}"
    )


def memory_tables(record: Record) -> list[Table]:
    """Bytes per parameter, one table per model."""
    columns = [
        "optimizer",
        "state B/param.",
        "held after a step",
        "peak of construct + step",
        "peak of a step",
    ]
    keys = ("state_bytes", "held_bytes", "construct_peak_bytes", "step_peak_bytes")
    tables = []
    for model in unique(record["results"], "model"):
        results = [result for result in record["results"] if result["model"] == model]
        rows = [
            [r["optimizer"], *("-" if r[key] is None else f"{r[key]:.2f}" for key in keys)]
            for r in results
        ]
        first = results[0]
        title = (
            f"bytes per parameter: {model}, {first['parameters']:,} parameters in {first['tensors']:,} tensors, "
            f"{first['dtype']}{', amsgrad' if first['amsgrad'] else ''}; parameters and gradients not counted"
        )
        tables.append(Table(title, columns, [*rows]))
    return tables


def accuracy_tables(record: Record) -> list[Table]:
    """Mean relative errors: a table per dtype, a row per optimizer, a column per option."""
    tables = []
    for dtype in unique(record["results"], "dtype"):
        results = [result for result in record["results"] if result["dtype"] == dtype]
        options = unique(results, "option")
        errors = {
            (result["optimizer"], result["option"]): result["mean_error"] for result in results
        }
        cells = {
            key: "overflow" if error is None else f"{error:.2e}" for key, error in errors.items()
        }
        rows = [
            [name, *(cells.get((name, option), "-") for option in options)]
            for name in unique(results, "optimizer")
        ]
        title = (
            f"mean |parameter - float64 run| / |float64 run|, {dtype}, after {results[0]['steps']} steps of "
            f"{results[0]['elements']:,} elements"
        )
        tables.append(Table(title, ["optimizer", *options], [*rows]))
    return tables


def env_tables(record: Record) -> list[Table]:
    """What runs here."""
    rows = [[result["optimizer"], result["family"], "yes"] for result in record["results"]]
    found = record["machine"]
    memory = f"memory {found['memory_bytes'] / 1e9:.0f} GB, last cache {found['cache_bytes'] / 2**20:.0f} MiB"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [
        Table(
            "optimizers that run here", ["optimizer", "family", "runs"], [*rows], [memory, versions]
        )
    ]


def verify_lines(record: Record) -> list[str]:
    """The block that people paste."""
    lines = [f"fused-adam verify: {machine.line(record['machine'])}"]
    for result in record["results"]:
        if result["check"] == "hash":
            how = f"{result['backend']}{', flatten' if result['flatten'] else ''}, {result['steps']} steps"
            same = (
                "as promised" if result["same"] else f"NOT the promised {result['expected'][:16]}"
            )
            lines.append(f"hash {result['digest'][:16]} ({how}): {same}")
        elif result["check"] == "copy":
            lines.append(f"copy bandwidth: {spread(result['gb_per_s'], three_digits)} GB/s")
        else:
            lines.append(
                f"{result['model']} {result['dtype']}, {result['optimizer']}: "
                f"{spread(result['step_ms'], three_digits)} ms, {three_digits(result['gb_per_s']['median'])} GB/s, "
                f"{times(result['speedup'])} torch fused"
            )
    return lines + left_out_lines(record)


def verify_tables(record: Record) -> list[Table]:
    """The same lines, as a table of one column."""
    return [Table("verify", ["check"], [[line] for line in verify_lines(record)[1:]])]


def tests_tables(record: Record) -> list[Table]:
    """How the native tests ended."""
    return [
        Table("native tests", ["result"], [[result["summary"]] for result in record["results"]])
    ]


def ceiling_tables(record: Record) -> list[Table]:
    """The bandwidth of the update's accesses, and of a copy."""
    rows = [
        [
            r["dtype"],
            *(
                spread(r[key], three_digits) if key in r else "-"
                for key in ("gb_per_s", "copy_gb_per_s")
            ),
        ]
        for r in record["results"]
    ]
    title = "four reads and three writes per element, no arithmetic"
    return [Table(title, ["dtype", "GB/s", "copy GB/s"], [*rows])]


def sweep_tables(record: Record) -> list[Table]:
    """Launch sizes, fastest first."""
    results = sorted(record["results"], key=lambda r: (r["model"], r["step_ms"]["median"]))
    rows = [
        [
            r["model"],
            f"{r['block']}",
            f"{r['num_warps']}",
            spread(r["step_ms"], three_digits),
            three_digits(r["gb_per_s"]["median"]),
        ]
        for r in results
    ]
    return [Table("launch sizes", ["model", "elements", "warps", "ms per step", "GB/s"], [*rows])]


def suite_tables(record: Record) -> list[Table]:
    """Those of all parts; what was left out, once."""
    found = []
    for part in record["results"]:
        found += MAKERS[part["command"]](part) if part["results"] else []
        lines = [
            line
            for line in [*part["notes"], *left_out_lines(part)]
            if not any(line in t.notes for t in found)
        ]
        if found:
            found[-1].notes += lines
    return found


MAKERS: dict[str, Callable[[Record], list[Table]]] = {
    "step": step_tables,
    "host": host_tables,
    "memory": memory_tables,
    "accuracy": accuracy_tables,
    "env": env_tables,
    "verify": verify_tables,
    "tests": tests_tables,
    "ceiling": ceiling_tables,
    "sweep": sweep_tables,
    "suite": suite_tables,
    "recipes": recipe_tables,
}


def left_out_lines(record: Record) -> list[str]:
    """One line per optimizer that was not measured, with the reason."""
    lines = []
    for entry in record["left_out"]:
        case = "".join(f", {value}" for value in entry.get("case", {}).values())
        lines.append(f"not measured: {entry['name']}{case}: {entry['reason']}")
    return list(dict.fromkeys(lines))


def tables_of(record: Record) -> list[Table]:
    """All tables of a record, the last one with its notes below. Raises ValueError for a command
    without tables.
    """
    if record["command"] not in MAKERS:
        raise ValueError(
            f"records of {record['command']!r} have no tables; allowed: {', '.join(MAKERS)}"
        )
    tables = (
        MAKERS[record["command"]](record)
        if record["results"]
        else [Table("nothing was measured", ["result"])]
    )
    tables[-1].notes += [
        *record["notes"],
        *left_out_lines(record),
        f"machine: {machine.line(record['machine'])}",
    ]
    return tables


def markdown(record: Record) -> str:
    """All tables of a record as Markdown."""
    return "\n\n".join("\n".join(markdown_lines(table)) for table in tables_of(record))


MARKED = re.compile(r"(<!-- bench: (\S+\.json) -->\n).*?(<!-- /bench -->)", re.S)


def update_document(text: str, folder: Path) -> str:
    """Write every marked table of a document anew.

    Between `<!-- bench: FILE.json -->` and `<!-- /bench -->` stand the tables of that record; FILE
    is relative to the document's folder. Raises ValueError or OSError if a record cannot be read,
    or there is no mark.
    """
    if not MARKED.search(text):
        raise ValueError(
            "the document has no line '<!-- bench: FILE.json -->' with '<!-- /bench -->' below it"
        )
    return MARKED.sub(
        lambda found: f"{found[1]}\n{markdown(read(folder / found[2]))}\n\n{found[3]}", text
    )
