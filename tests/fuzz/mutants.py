"""Small faults, one at a time, in a copy of the tree: the tests named beside each must notice it
(`make mutants`).

A fault that no test notices is a hole in the suite: give it a test. What only a GPU could notice is
not here.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[2]
WORKERS = 2
LIMIT_S = 600  # a mutant that makes a test hang


@dataclass(frozen=True)
class Mutant:
    """`old` in `file` becomes `new`; one of `tests` (under tests/) must fail, where pytest is given
    the options that `tests` begin with.
    """

    file: str
    old: str
    new: str
    tests: str

    @property
    def name(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old} -> {new or 'nothing'}"


def listed() -> list[Mutant]:
    """The mutants of tests/fuzz/mutants.txt, in its order."""
    mutants: list[Mutant] = []
    file = ""
    lines: dict[str, list[str]] = {"-": [], "+": [], "?": []}
    for line in [*(ROOT / "tests" / "fuzz" / "mutants.txt").read_text().splitlines(), "@ end"]:
        kind, rest = line[:1], line[2:]
        if kind in ("@", "-") and lines["?"]:
            mutants.append(
                Mutant(file, "\n".join(lines["-"]), "\n".join(lines["+"]), " ".join(lines["?"]))
            )
            lines = {"-": [], "+": [], "?": []}
        if kind == "@":
            file = rest
        elif kind in lines:
            lines[kind].append(rest)
    return mutants


def is_option(word: str) -> bool:
    """Whether this is an option of pytest among names of tests, as in `--ptx=sm_90`."""
    return word.startswith("--")


def pytest(folder: pathlib.Path, tests: str) -> tuple[int, str]:
    """Exit status and output of pytest in a copy of the tree."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "kernels")]),
        "PYTHONDONTWRITEBYTECODE": "1",  # or equal sizes and times share bytecode
    }
    arguments = [word if is_option(word) else f"tests/{word}" for word in tests.split()]
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "--no-header",
                "-p",
                "no:cacheprovider",
                *arguments,
            ],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return 1, f"not done after {LIMIT_S} s"
    return done.returncode, done.stdout + done.stderr


def verdict(
    mutant: Mutant | None, tests: str, folders: queue.Queue[pathlib.Path]
) -> tuple[str, float]:
    """`caught`, `survived`, or what else pytest said; None: nothing is changed, and the tests must
    pass.
    """
    folder, started = folders.get(), time.perf_counter()
    try:
        path = folder / mutant.file if mutant else None
        source = path.read_text() if path else ""
        if path and mutant:
            path.write_text(source.replace(mutant.old, mutant.new))
        try:
            status, output = pytest(folder, tests)
        finally:
            if path:
                path.write_text(source)
    finally:
        folders.put(folder)
    # A negative status is a signal: the mutant crashed the interpreter.
    word = (
        "survived"
        if status == 0
        else "caught"
        if status == 1 or status < 0
        else f"pytest ended with {status}"
    )
    if (mutant is None) != (status == 0) or status > 1:
        print(output[-3000:], flush=True)
    return word, time.perf_counter() - started


def runs(mutants: list[Mutant]) -> list[str]:
    """All tests of some mutants, for `pytest`: a part per worker and set of options."""
    every: dict[str, set[str]] = {}
    for mutant in mutants:
        words = mutant.tests.split()
        options = " ".join(filter(is_option, words))
        every.setdefault(options, set()).update(w for w in words if not is_option(w))
    return [
        " ".join([options, *part])
        for options, tests in sorted(every.items())
        for part in (sorted(tests)[worker::WORKERS] for worker in range(WORKERS))
        if part
    ]


def main(only: list[str]) -> int:
    """Run the mutants whose names contain one of the words given, or all."""
    chosen = [m for m in listed() if not only or any(word in m.name for word in only)]
    with (
        tempfile.TemporaryDirectory() as name,
        concurrent.futures.ThreadPoolExecutor(WORKERS) as pool,
    ):
        folders: queue.Queue[pathlib.Path] = queue.Queue()
        for worker in range(WORKERS):
            folder = pathlib.Path(name) / str(worker)
            ignored = shutil.ignore_patterns(
                ".*", "__pycache__", "*.egg-info", "build", "dist", "results"
            )
            shutil.copytree(ROOT, folder, ignore=ignored)
            folders.put(folder)
        # First that the tests pass where nothing is changed: else a failure would prove nothing.
        parts = runs(chosen)
        clean = list(pool.map(lambda part: verdict(None, part, folders), parts))
        if any(word != "survived" for word, _ in clean):
            print("the tests fail without any mutant")
            return 1
        print(f"all tests pass unchanged, {sum(s for _, s in clean):.0f} s", flush=True)
        caught = 0
        results = pool.map(lambda mutant: (mutant, *verdict(mutant, mutant.tests, folders)), chosen)
        for mutant, word, seconds in results:
            print(f"{word:8} {seconds:4.0f} s  {mutant.name}", flush=True)
            caught += word == "caught"
    print(f"{caught} of {len(chosen)} mutants caught")
    return int(caught != len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
