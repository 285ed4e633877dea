"""Runs a kernel's PTX on the CPU: addresses are those of ordinary memory.

The C that `ptx_to_c` makes of it is compiled by gcc. What a GPU would answer with an error, or now
and then with wrong results, is a Fault: a misaligned or foreign address, shared memory touched by
two threads without a barrier between them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ptx_text
from ptx_to_c import translate

# Every operation rounds once, signed integers wrap, and memory has no types.
FLAGS = (
    *("-O1", "-fPIC", "-shared", "-w"),
    *("-ffp-contract=off", "-fno-math-errno", "-fwrapv", "-fno-strict-aliasing"),
)
FIRST_GCC = 12  # has _Float16 on x86
KINDS = [  # in the order of the prelude's
    "",
    "a misaligned address",
    "an address that the launch may not touch",
    "a store to what it may only read",
    "shared memory touched by two threads without a barrier between them",
    "threads of one block branch apart",
    "an address beyond the shared memory of a block",
    "a thread that is not among those that it says take part",
]


class Fault(Exception):
    """A GPU would not forgive this."""


class Region(NamedTuple):
    """Bytes that a launch may touch."""

    first: int  # address
    size: int
    writable: bool


@functools.cache
def compiler() -> str:
    """The first line of what gcc says of its version, or "" if it is not there."""
    gcc = shutil.which("gcc")
    if gcc is None:
        return ""
    done = subprocess.run([gcc, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[0]


def why_not() -> str:
    """Why PTX cannot be run here, or "" if it can."""
    version = re.fullmatch(r"gcc.* (\d+)\.[\d.]+.*", compiler())
    if version is None or int(version[1]) < FIRST_GCC:
        found = compiler() or "nothing"
        return f"needs gcc {FIRST_GCC} or newer on the PATH, and `gcc --version` finds {found}"
    return ""


def build(source: str, cache: pathlib.Path) -> Any:
    """Compile C into a library, or take it from the cache folder, and load it.

    The key of the cache is all that decides what the library does: the C, which holds the PTX and
    this translation of it, the flags, and the version of the compiler.
    """
    key = hashlib.sha256("\0".join([source, *FLAGS, compiler()]).encode()).hexdigest()
    path = cache / f"{key}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            text, library = pathlib.Path(folder, "kernel.c"), pathlib.Path(folder, "kernel.so")
            text.write_text(source)
            subprocess.run(["gcc", *FLAGS, "-o", library, text, "-lm"], check=True)
            os.replace(library, path)  # at once: another process may look for it
    return ctypes.CDLL(str(path))


class Count(NamedTuple):
    """How often the last launch of a kernel executed one instruction.

    The last three are of accesses to global memory; 0 for all else.
    """

    instruction: ptx_text.Instruction
    blocks: int  # all threads of a block execute it together, if only to find their guard false
    warps: int  # in which a thread took part
    requested_bytes: int  # by all threads
    sectors: int  # of 32 bytes, that each warp touched


class Machine:
    """One kernel.

    Args:
        ptx: a module with one entry.
        shared_bytes: of shared memory that a launch asks for.
        cache: folder for what gcc compiled.
        counting: count what is executed, for `counts`.
    """

    def __init__(
        self, ptx: str, shared_bytes: int, cache: pathlib.Path, counting: bool = False
    ) -> None:
        self.kernel = ptx_text.read(ptx)
        self.library = build(translate(self.kernel, shared_bytes, counting), cache)
        self.launches = 0

    def __call__(self, grid: int, args: Sequence[int], allowed: Iterable[Region]) -> None:
        """Launch a kernel.

        Args:
            grid: number of blocks.
            args: addresses and integers, in the order of the parameters. Parameters that Triton
                adds for memory of its own, which our kernels do not use, are 0.
            allowed: all that may be touched.

        Raises:
            Fault: the launch ended there.
        """
        self.launches += 1
        unused = len(self.kernel.params) - len(args)
        regions = disjoint(allowed)
        bounds = [x for r in regions for x in (r.first, r.first + r.size, r.writable)]
        where = _registers([0] * 5)
        failed = self.library.launch(
            _registers([*args, *[0] * unused]),
            ctypes.c_int64(grid),
            _registers(bounds),
            ctypes.c_int64(len(regions)),
            where,
        )
        if failed:
            kind, index, block, thread, address = where
            item = self.kernel.code[index]
            assert isinstance(item, ptx_text.Instruction)
            raise Fault(
                f"{self.kernel.name}, {item.source or 'no line known'}: {KINDS[kind]}: "
                f"{address:#x}, block {block}, thread {thread}, PTX: {item.text}"
            )

    def counts(self) -> list[Count]:
        """What the last launch executed, instruction by instruction; needs `counting`."""
        self.library.counted.restype = ctypes.POINTER(ctypes.c_uint64)
        numbers = self.library.counted()
        return [
            Count(item, *numbers[4 * index : 4 * index + 4])
            for index, item in enumerate(self.kernel.code)
            if isinstance(item, ptx_text.Instruction)
        ]


def disjoint(regions: Iterable[Region]) -> list[Region]:
    """Ascending, those that overlap as one."""
    found: list[Region] = []
    for region in sorted(regions):
        if found and region.first < found[-1].first + found[-1].size:
            last = found[-1]
            end = max(last.first + last.size, region.first + region.size)
            writable = last.writable or region.writable
            found[-1] = Region(last.first, end - last.first, writable)
        elif region.size:
            found.append(region)
    return found


def _registers(values: Sequence[int]) -> Any:
    """64 bits each; negative numbers as a register holds them."""
    return (ctypes.c_uint64 * max(len(values), 1))(
        *(int(value) & (1 << 64) - 1 for value in values)
    )
