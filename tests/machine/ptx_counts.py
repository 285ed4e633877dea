"""Executes kernels on the CPU and counts bytes, sectors, instructions, branches. No pytest file.

python tests/machine/ptx_counts.py --arch sm_90 --variant fp32

`python -m fused_adam_kernels.inspect --run` calls it and makes a table of the JSON it prints. What
runs is PTX, so instructions are those before ptxas: a root or a quotient is one, where machine code
takes 8 to 20, and ptxas merges and drops others. Accesses to memory are the same in both.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import ptx_machine
import torch
from ptx_driver import GROUP
from ptx_instructions import access_bytes
from ptx_machine import Count, Machine, Region

from fused_adam_kernels import adam, inspect, norm, table, variants

ROOT = pathlib.Path(__file__).parents[2]
ELEMENTS = 16 * 1024  # several programs of every launch shape, and no tail if they are aligned
SECTOR_BYTES = 32
# What a full row of Adam's step holds; any finite values give the same counts.
SCALARS = {
    table.STEP_SIZE: 1e-3,
    table.RSQRT_BC2: 1.0,
    table.ONE_MINUS_BETA1: 0.1,
    table.ONE_MINUS_BETA2: 1e-3,
    table.BETA2: 0.999,
    table.EPS: 1e-8,
    table.LR_WD: 1e-4,
    table.GRAD_MULTIPLIER: 1.0,
    table.STEP_NUMBER: 10.0,
}


class Launch(NamedTuple):
    """One launch over one row, ready for a machine."""

    programs: int
    tables: list[torch.Tensor]  # the kernel's arguments
    operands: list[torch.Tensor]  # what the row points to


def operand(dtype: torch.dtype, shift: int) -> torch.Tensor:
    """ELEMENTS values, aligned to 256 bytes and then moved on by `shift` elements."""
    memory = torch.zeros((ELEMENTS + shift) * dtype.itemsize + 256, dtype=torch.uint8)
    first = -memory.data_ptr() % 256 + shift * dtype.itemsize
    values = memory[first : first + ELEMENTS * dtype.itemsize].view(dtype)
    return values.copy_(torch.linspace(1, 100, ELEMENTS))


def launch_update(variant: variants.Variant, shift: int) -> Launch:
    """The update of one row, all of whose operands are `shift` elements from where they align."""
    dtypes = {triton_type: dtype for dtype, triton_type in adam.TYPES.items()}
    constants = variant.constants
    row = torch.zeros(table.ROW, dtype=torch.int64)
    operands = []
    columns = {
        table.PARAM: "PARAM",
        table.GRAD: "GRAD",
        table.EXP_AVG: "M",
        table.EXP_AVG_SQ: "V",
        table.MAX_EXP_AVG_SQ: "V_MAX",
        table.EXTRA: "EXTRA",
    }
    for column, constant in columns.items():
        if column == table.MAX_EXP_AVG_SQ and not constants["AMSGRAD"]:
            continue
        if column == table.EXTRA and constants["WEIGHTS"] not in ("master32", "split32", "split24"):
            continue
        operands.append(operand(dtypes[constants[constant]], shift))
        row[column] = operands[-1].data_ptr()
    compute = torch.float64 if variant.arguments["scalars_ptr"] == "*fp64" else torch.float32
    if constants["EMA"]:
        operands.append(operand(compute, shift))
        row[table.EMA] = operands[-1].data_ptr()
    if constants["STATES"] == "int8":
        for column in (table.EXP_AVG_SCALE, table.EXP_AVG_SQ_SCALE):
            operands.append(torch.full((ELEMENTS // GROUP,), 1.0, dtype=torch.bfloat16))
            row[column] = operands[-1].data_ptr()
    row[table.NUMEL] = ELEMENTS
    programs = ELEMENTS // constants["BLOCK"]
    blocks = torch.tensor([[0, block] for block in range(programs)], dtype=torch.int32)
    scalars = torch.zeros(table.SCALARS, dtype=compute)
    for column, value in SCALARS.items():
        scalars[column] = value
    return Launch(programs, [row, blocks, scalars], operands)


def launch_norm(variant: variants.Variant, shift: int) -> Launch:
    """The sum of squares of one gradient, `shift` elements from where it aligns."""
    dtypes = {triton_type: dtype for dtype, triton_type in adam.TYPES.items()}
    grad = operand(dtypes[variant.constants["GRAD"]], shift)
    row = torch.zeros(table.ROW, dtype=torch.int64)
    row[table.GRAD], row[table.GRAD_NUMEL] = grad.data_ptr(), ELEMENTS
    blocks = torch.zeros(1, 3, dtype=torch.int32)
    return Launch(1, [row, blocks, torch.zeros(1, dtype=torch.float64)], [grad])


def touches_elements(count: Count) -> bool:
    """Elements are accessed under a mask or 16 bytes at a time; entries of the tables are not."""
    size = access_bytes(count.instruction)
    return size >= 16 or (size > 0 and bool(count.instruction.guard))


def summary(counts: list[Count], threads: int, programs: int) -> dict[str, float]:
    """Totals of one launch, per element or per program."""
    accesses = [count for count in counts if touches_elements(count)]
    branches = [
        count for count in counts if count.instruction.name == "bra" and count.instruction.guard
    ]
    return {
        "requested_bytes": sum(count.requested_bytes for count in accesses) / ELEMENTS,
        "sector_bytes": SECTOR_BYTES * sum(count.sectors for count in accesses) / ELEMENTS,
        "ptx_instructions": sum(count.blocks for count in counts) * threads / ELEMENTS,
        # None divides a warp: threads of a block that branch apart end a launch with a Fault.
        "branches": sum(count.blocks for count in branches) / programs,
    }


def measure(name: str, target: str, cache: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Execute one variant on an aligned row and on a misaligned one, and count.

    Args:
        name: a key of `variants.VARIANTS`, of an update or a norm.
        target: a key of `inspect.TARGETS`, of NVIDIA.
        cache: folder for what gcc compiled.
    """
    variant = variants.VARIANTS[name]
    kernel = inspect.compiled(variant, inspect.TARGETS[target])
    machine = Machine(kernel.asm["ptx"], kernel.metadata.shared, cache, counting=True)
    launch_of = launch_norm if variant.kernel is norm.square_sum_kernel else launch_update
    for rows, shift in (("aligned", 0), ("misaligned", 1)):
        launch = launch_of(variant, shift)
        memory = [*launch.tables, *launch.operands]
        machine(
            launch.programs,
            [tensor.data_ptr() for tensor in launch.tables],
            [Region(tensor.data_ptr(), tensor.nbytes, True) for tensor in memory],
        )
        yield {
            "variant": name,
            "target": target,
            "rows": rows,
            **summary(machine.counts(), machine.kernel.threads, launch.programs),
        }


def main() -> None:
    """Print a JSON list of counts, or one line that says why nothing can be executed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", required=True)
    parser.add_argument("--variant", nargs="+", required=True)
    options = parser.parse_args()
    if reason := ptx_machine.why_not():
        sys.exit(f"nothing can be executed: it {reason}")
    cache = ROOT / ".ptx_cache"
    print(
        json.dumps(
            [
                counts
                for name in options.variant
                for target in options.arch
                for counts in measure(name, target, cache)
            ]
        )
    )


if __name__ == "__main__":
    main()
