"""PTX as text -> a kernel's instructions. Knows the grammar, and not what an instruction does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction, as in `@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];`."""

    text: str
    source: str  # where in the kernel's Python, as in "adam.py:334" or "adam.py", or ""
    guard: str  # register that decides whether a thread runs it, as in "!%p1", or ""
    name: str  # "ld"
    modifiers: list[str]  # ["global", "b32"]
    operands: list[str]  # ["{ %r1 }", "[ %rd1 + 0 ]"]


class Label(NamedTuple):
    """A place to branch to."""

    name: str


class Registers(NamedTuple):
    """Registers of one type. Their names are the prefix and a number below `total`."""

    type: str  # "b32", "pred"
    prefix: str  # "r": %r0, %r1, ...
    total: int


class Kernel(NamedTuple):
    """One kernel as PTX has it."""

    name: str
    params: list[str]
    threads: int  # per block
    registers: list[Registers]
    code: list[Instruction | Label]


def read(ptx: str) -> Kernel:
    """Return the kernel of a module with one entry.

    Raises:
        NotImplementedError: a line is neither an instruction, a label nor a directive.
    """
    entry = re.search(r"\.entry (\w+)\((.*?)\)(.*?)\n\{(.*?)\n\}", ptx, re.S)
    if entry is None:
        raise NotImplementedError("PTX without an entry")
    name, params, directives, body = entry.groups()
    threads = re.search(r"\.reqntid (\d+)", directives)
    if threads is None:
        raise NotImplementedError(f"PTX of {name} without .reqntid, the number of its threads")
    return Kernel(
        name,
        re.findall(r"\.param \.\w+[^,\n]* (\w+)", params),
        int(threads[1]),
        [
            Registers(kind, prefix, int(total))
            for kind, prefix, total in re.findall(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>", body)
        ],
        list(_code(body)),
    )


def _code(body: str) -> Iterator[Instruction | Label]:
    """What the lines between the braces of a kernel hold."""
    source = ""
    for line in body.split("\n"):
        code, _, comment = (part.strip() for part in line.partition("//"))
        if label := re.fullmatch(r"(\$\w+):", code):
            yield Label(label[1])
        elif code.startswith(".loc"):
            # "adam.py:334:25", and for what was inlined "formula.py:70:37 @[ adam.py:334:25 ]".
            # Line 0: of no one line.
            place = re.match(r"\S+\.py(:[1-9]\d*)?", comment)
            source = place[0] if place else ""
        elif code and code[0] != ".":
            yield _instruction(code, source)


def _instruction(code: str, source: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.]*)\s*(.*);", code)
    if match is None:
        raise NotImplementedError(f"PTX that is no instruction: {code}")
    guard, words, operands = match.groups()
    name, *modifiers = words.split(".")
    return Instruction(
        " ".join(code.split()), source, guard or "", name, modifiers, split(operands)
    )


def split(operands: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    parts = re.split(r",(?![^{\[]*[}\]])", operands)
    return [part.strip() for part in parts if part.strip()]
