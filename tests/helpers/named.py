"""Tests that a text names as `tests/file.py::test`: whether they exist. Runs none of them."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def named(text):
    """Every `file::test` in the text, in order, the file with its folder under tests/."""
    return re.findall(r"\b((?:tests/)?(?:\w+/)?\w+\.py)::(\w+)", text)


def missing(text):
    """Those of them that do not exist."""
    known = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.relative_to(ROOT / "tests").as_posix()
        known[name] = {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
        }
    return [
        f"{path}::{test}"
        for path, test in named(text)
        if test not in known.get(path.removeprefix("tests/"), ())
    ]
