"""The shapes of the update kernel that `variants.py` tries: entries of `config.py`, or edits.

An edit names what stands in a kernel's source and what shall stand there. One whose place is no
longer in the source raises `NotPatched`: it has to be written anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


class NotPatched(Exception):
    """The sources have changed: the variant has to be written anew."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One shape of the kernel.

    Attributes:
        changes: fields of Config that differ from today's.
        edits: (file, text, text in its place) for a copy of the kernels' package.
        chunks: blocks of one row that a program takes, one after the other.
        programs_per_sm: size of a grid whose programs stay and take block after block; 0: a program
            per block.
    """

    changes: dict[str, int | None] = dataclasses.field(default_factory=dict)
    edits: Sequence[tuple[str, str, str]] = ()
    chunks: int = 1
    programs_per_sm: int = 0


ENTRY = """    row = tl.load(blocks_ptr + 2 * program).to(tl.int64)
    start = tl.load(blocks_ptr + 2 * program + 1).to(tl.int64) * BLOCK
"""
BODY = "    update_block(\n        body, s, one, key, start, body_end,"


def several_chunks(number: int, stages: int = 0, **changes: int | None) -> Variant:
    """Each program reads its row and scalars once for several blocks.

    stages: how many blocks' loads are under way at once, through shared memory; 0: as the compiler
        schedules one block after the other.
    """
    loop = f"tl.range({{}}, num_stages={stages})" if stages else "range({})"
    loop = loop.format("start, tl.minimum(start + SPAN, body_end), BLOCK")
    span = f"{number} * BLOCK"
    return Variant(
        changes,
        edits=(
            (
                "adam.py",
                "2 * program + 1).to(tl.int64) * BLOCK",
                f"2 * program + 1).to(tl.int64) * ({span})",
            ),
            (
                "adam.py",
                BODY,
                f"    for first in {loop.replace('SPAN', span)}:\n"
                f"    {BODY.replace('start', 'first')}",
            ),
            ("adam.py", "tl.minimum(start + BLOCK, n)", f"tl.minimum(start + {span}, n)"),
        ),
        chunks=number,
    )


STAYING = """

@triton.jit(do_not_specialize=["num_blocks"])
def adam_kernel(rows_ptr, blocks_ptr, scalars_ptr, num_blocks, {declared}):
    # The next entry is on its way while this block is updated.
    row = tl.load(blocks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    chunk = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        following = tl.minimum(block + tl.num_programs(0), num_blocks - 1)
        next_row = tl.load(blocks_ptr + 2 * following).to(tl.int64)
        next_chunk = tl.load(blocks_ptr + 2 * following + 1).to(tl.int64)
        update_chunk(rows_ptr, row, chunk * BLOCK, scalars_ptr, {names})
        row = next_row
        chunk = next_chunk


class StorageTypes("""


def staying_programs() -> Variant:
    """As many programs as the GPU holds at once; each takes a block, and another, until none is
    left.
    """
    from fused_adam_kernels.adam import adam_kernel

    names = adam_kernel.arg_names[3:]
    declared = ", ".join(f"{name}: tl.constexpr" for name in names)
    return Variant(
        edits=(
            ("adam.py", "def adam_kernel(", "def update_chunk("),
            (
                "adam.py",
                "    blocks_ptr,  # *i32 [B, 2]  per program: which row, which BLOCK of it\n",
                "    row,\n    start,\n",
            ),
            ("adam.py", "    program = tl.program_id(0).to(tl.int64)\n" + ENTRY, ""),
            (
                "adam.py",
                "\n\nclass StorageTypes(",
                STAYING.format(declared=declared, names=", ".join(names)),
            ),
        ),
        programs_per_sm=6,
    )


STREAMING = Variant(
    edits=(
        ("adam.py", "tl.load(ptrs.g + offs, mask=mask, other=0.0)",
         'tl.load(ptrs.g + offs, mask=mask, other=0.0, eviction_policy="evict_first")'),
        ("adam.py", "tl.store(ptrs.p + offs, new_p, mask=mask)",
         'tl.store(ptrs.p + offs, new_p, mask=mask, cache_modifier=".cs")'),
        ("adam.py", "tl.store(ptrs.m + offs, m, mask=mask)",
         'tl.store(ptrs.m + offs, m, mask=mask, cache_modifier=".cs")'),
        ("adam.py", "tl.store(ptrs.v + offs, v, mask=mask)",
         'tl.store(ptrs.v + offs, v, mask=mask, cache_modifier=".cs")'),
    )
)  # fmt: skip
# Scalars of two rows fill a cache line, as the 16 columns of a row do. Both halves of an entry come
# in one load.
WIDE_SCALARS = Variant(
    edits=(
        ("table.py", "SCALARS = 12", "SCALARS = 16"),
        (
            "adam.py",
            ENTRY,
            "    entry = tl.load(blocks_ptr.to(tl.pointer_type(tl.int64)) + program)\n"
            "    row = entry & 0xFFFFFFFF\n"
            "    start = (entry >> 32) * BLOCK\n",
        ),
    )
)


def variants() -> dict[str, Variant]:
    """All, by name, in the order in which they promise most."""
    return {
        "today": Variant(),
        "any registers": Variant({"max_registers": None}),
        "block 2048": Variant({"block": 2048}),
        "72 registers": Variant({"max_registers": 72}),
        "80 registers": Variant({"max_registers": 80}),
        "80 registers, 2 warps": Variant({"max_registers": 80, "num_warps": 2}),
        "96 registers": Variant({"max_registers": 96}),
        "4 chunks per program": several_chunks(4),
        "8 chunks per program": several_chunks(8),
        "8 chunks, 2 stages": several_chunks(8, stages=2),
        "8 chunks, 2 stages, 64 registers": several_chunks(8, stages=2, max_registers=64),
        "8 chunks, 3 stages": several_chunks(8, stages=3),
        "staying programs": staying_programs(),
        "scalars of 64 bytes": WIDE_SCALARS,
        "streaming": STREAMING,
        "block 2048, 8 warps": Variant({"block": 2048, "num_warps": 8}),
        "block 2048, 80 registers": Variant({"block": 2048, "max_registers": 80}),
        "8 warps": Variant({"num_warps": 8}),
        "2 warps": Variant({"num_warps": 2}),
        "block 512": Variant({"block": 512}),
        "tail 512": Variant({"tail": 512}),
        "64 registers": Variant({"max_registers": 64}),
    }
