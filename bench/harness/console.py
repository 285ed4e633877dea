"""Text on the terminal: tables, progress and how numbers look. Knows no command's numbers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

Progress = Callable[[str, float], None]  # words, and the share done (0 to 1)
GAP = "  "  # between two columns


@dataclass
class Table:
    """Cells as text. The first column names the row; the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# Numbers as text.


def three_digits(number: float) -> str:
    """Three significant digits, never an exponent. Measured numbers have no more."""
    if number == 0:
        return "0"
    size = abs(number)
    places = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{number:,.{places}f}"


def exact_bytes(number: float) -> str:
    """Bytes per parameter. They are exact, often in eighths of a byte: 3.125 is not 3.12."""
    return f"{number:.3f}"


def spread(stat: dict[str, Any] | None, digits: Callable[[float], str] = three_digits) -> str:
    """A median and, behind it, half the distance of the quartiles: `1.23 ±4%`."""
    if stat is None:
        return "-"
    half = (stat["high"] - stat["low"]) / 2
    share = f" ±{half / stat['median']:.0%}" if stat["median"] else ""
    return digits(stat["median"]) + share


def times(stat: dict[str, Any] | None) -> str:
    """A ratio: `1.23x`."""
    return "-" if stat is None else f"{three_digits(stat['median'])}x"


# Tables as lines.


def plain_lines(table: Table, width: int | None = None) -> list[str]:
    """The table as lines of plain text, columns aligned, no line longer than `width`.

    Cells are never cut or wrapped. A table that is too wide breaks its column names into words;
    if that is not enough, it comes in several blocks of columns, each with the row names.
    """
    cells = [list(column) for column in zip(*table.rows, strict=True)]
    cells = cells or [[] for _ in table.columns]
    heads = [[name] for name in table.columns]
    if width is not None and _width(_sizes(heads, cells)) > width:
        longest = [max([0, *map(len, column)]) for column in cells]
        heads = [_words(name, size) for name, size in zip(table.columns, longest, strict=True)]
    sizes = _sizes(heads, cells)
    lines = textwrap.wrap(table.title, width) if width else [table.title]
    for block in _blocks(sizes, width):
        height = max(len(heads[i]) for i in block)
        rows = [[""] * (height - len(heads[i])) + heads[i] + cells[i] for i in block]
        for line in zip(*rows, strict=True):
            aligned = [
                text.rjust(sizes[i]) if i else text.ljust(sizes[i])
                for i, text in zip(block, line, strict=True)
            ]
            lines.append(GAP.join(aligned).rstrip())
    return lines


def _words(name: str, size: int) -> list[str]:
    """A column's name in lines as long as its cells, or as its longest word."""
    longest = max(map(len, name.split()), default=0)
    return textwrap.wrap(name, max(1, size, longest), break_on_hyphens=False) or [""]


def _sizes(heads: Sequence[Sequence[str]], cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, [*h, *c])) for h, c in zip(heads, cells, strict=True)]


def _width(sizes: Sequence[int]) -> int:
    return sum(sizes) + len(GAP) * (len(sizes) - 1)


def _blocks(sizes: Sequence[int], width: int | None) -> Iterator[list[int]]:
    """Column numbers, in blocks that fit into `width`; column 0 leads each block."""
    block = [0]
    for i in range(1, len(sizes)):
        if width and len(block) > 1 and _width([sizes[j] for j in (*block, i)]) > width:
            yield block
            block = [0]
        block.append(i)
    yield block


def markdown_lines(table: Table) -> list[str]:
    """The table as Markdown, its title as a paragraph above, its notes below."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    rows = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in (table.columns, rule, *table.rows)
    ]
    return [table.title, "", *rows, *(["", *table.notes] if table.notes else [])]


# The terminal.


class Screen:
    """Where a command's text goes: standard output, or another file."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    @property
    def file(self) -> TextIO:
        """Looked up late: tests and users redirect standard output."""
        return self._file or sys.stdout

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None for a file or a pipe, whose lines may be of any length."""
        if not self.file.isatty():
            return None
        try:
            return os.get_terminal_size(self.file.fileno()).columns
        except OSError:  # a terminal without a size, as in an editor
            return shutil.get_terminal_size().columns

    def print(self, text: str) -> None:
        """One or more lines of plain text."""
        print(text, file=self.file, flush=True)

    def table(self, table: Table) -> None:
        """Print a table and its notes."""
        width = self.width
        lines = plain_lines(table, width)
        for note in table.notes:
            lines += textwrap.wrap(note, width) if width else [note]
        self.print("\n".join(lines))

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """A bar while it lasts, with rich on a terminal; a line when the words change otherwise."""
        if not (self.file.isatty() and importlib.util.find_spec("rich")):
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

        columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
        console = Console(file=self.file, width=self.width)
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(label, total=1.0)

            def advance(text: str, share: float) -> None:
                bars.update(task, description=f"{label}: {text}", completed=share)

            yield advance
