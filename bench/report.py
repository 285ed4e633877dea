"""`report`: tables, pictures and a document's tables from records that other commands wrote."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from . import convergence, demo, env, schemes, stream, suite, train, verify
from .harness.console import Screen, Table, markdown_lines
from .harness.results import Record, read
from .harness.session import TableMaker, all_tables, draw
from .harness.workload import one_line

TABLES: dict[str, TableMaker] = {
    **suite.PART_TABLES,
    "env": env.tables,
    "suite": suite.tables,
    "schemes": schemes.tables,
    "stream": stream.tables,
    "demo": demo.tables,
    "train": train.tables,
    "convergence": convergence.tables,
    "recipes": convergence.tables,  # its name in older records
}
MARKED = re.compile(r"(<!-- bench: (\S+\.json) -->\n).*?(<!-- /bench -->)", re.S)
# What a record with values of wrong types raises, wherever that is noticed.
WRONG_TYPES = (KeyError, TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError)


def run(arguments: argparse.Namespace) -> int:
    """Show, draw, or write into a document what records hold.

    Raises ValueError or OSError, naming the file, if a record cannot be read.
    """
    if not (arguments.files or arguments.update):
        raise ValueError("report needs RECORD files, or a document with --update")
    if not arguments.files and (arguments.plot or arguments.markdown):
        option = "--plot" if arguments.plot else "--markdown"
        raise ValueError(f"{option} needs RECORD files")
    screen = Screen()
    if arguments.update:
        before = arguments.update.read_text()
        after = update_document(before, arguments.update.parent)
        arguments.update.write_text(after)
        screen.print(f"{arguments.update}: {'unchanged' if after == before else 'updated'}")
    records = []
    for path in arguments.files:
        record = read(path)
        records.append(record)
        tables = tables_of(record, path)
        if arguments.markdown:
            screen.print(markdown(tables))
        elif record["command"] == "verify":
            screen.print("\n".join(verify.lines(record)))
        else:
            for table in tables:
                screen.table(table)
                screen.print("")
    if arguments.plot:
        try:
            draw(records, arguments.plot, screen)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            names = ", ".join(map(str, arguments.files))
            raise ValueError(f"{names} cannot be drawn: {one_line(error)}") from None
    return 0


def tables_of(record: Record, path: Path) -> list[Table]:
    """All tables of a record. Raises ValueError, naming the file, if it has none."""
    command = record["command"]
    if command not in TABLES:
        allowed = ", ".join(TABLES)
        raise ValueError(f"records of {command!r} have no tables; allowed: {allowed}")
    try:
        return all_tables(record, TABLES[command])
    except WRONG_TYPES as error:
        what = f"{str(path)!r} does not hold what a record of {command!r} holds"
        raise ValueError(f"{what}: {one_line(error)}") from None


def markdown(tables: list[Table]) -> str:
    """Tables as Markdown."""
    return "\n\n".join("\n".join(markdown_lines(table)) for table in tables)


def update_document(text: str, folder: Path) -> str:
    """Write every marked table of a document anew.

    The tables of a record stand between `<!-- bench: FILE.json -->` and `<!-- /bench -->`; FILE is
    relative to the document's folder. Raises ValueError or OSError if a record cannot be read, or
    there is no mark.
    """
    if not MARKED.search(text):
        raise ValueError(
            "the document has no line '<!-- bench: FILE.json -->' with '<!-- /bench -->' below it"
        )

    def filled(mark: re.Match[str]) -> str:
        path = folder / mark[2]
        return f"{mark[1]}\n{markdown(tables_of(read(path), path))}\n\n{mark[3]}"

    return MARKED.sub(filled, text)
