"""Tables and progress on the terminal: through rich, or as plain text without it. Knows no
command's numbers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO


@dataclass
class Table:
    """Cells as text. The first column names the row; the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def has_rich() -> bool:
    """Whether rich is there to draw bars and tables."""
    return importlib.util.find_spec("rich") is not None


class Screen:
    """Where a command's text goes: standard output, or standard error while a record takes standard
    output.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    @property
    def file(self) -> TextIO:
        """Looked up late: tests and users redirect standard output."""
        return self._file or sys.stdout

    def print(self, text: str) -> None:
        """One or more lines of plain text."""
        print(text, file=self.file, flush=True)

    def table(self, table: Table) -> None:
        """Print a table and its notes."""
        terminal = has_rich() and self.file.isatty()
        if terminal:
            self._rich_table(table)
        else:
            self.print("\n".join(plain_lines(table)))
        for note in table.notes:
            self.print(note)

    def _rich_table(self, table: Table) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable

        drawn = RichTable(
            title=table.title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
        )
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="right" if number else "left", no_wrap=not number)
        for row in table.rows:
            drawn.add_row(*row)
        Console(file=self.file, markup=False, highlight=False).print(drawn)

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[[str, float], None]]:
        """A bar while measuring; yields what to call with words and the share done (0 to 1)."""
        if not (has_rich() and self.file.isatty()):
            # A log wants no bar: a line when the words change.
            last = ""

            def tell(text: str, share: float) -> None:
                nonlocal last
                if text != last:
                    self.print(f"{label}: {text}")
                    last = text

            yield tell
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(file=self.file), transient=True) as bars:
            task = bars.add_task(label, total=1.0)
            yield lambda text, share: bars.update(
                task, description=f"{label}: {text}", completed=share
            )


def plain_lines(table: Table) -> list[str]:
    """The table as lines of plain text, columns aligned."""
    lines = [tuple(table.columns), *map(tuple, table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    out = [table.title]
    for line in lines:
        first, *rest = zip(line, widths, strict=True)
        out.append(
            "  ".join(
                [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)]
            ).rstrip()
        )
    return out


def markdown_lines(table: Table) -> list[str]:
    """The table as Markdown, its title as a paragraph above, its notes below."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    rows = [table.columns, rule, *table.rows]
    lines = [
        table.title,
        "",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]
    return lines + (["", *table.notes] if table.notes else [])
