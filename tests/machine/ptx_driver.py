"""The PTX machine as Triton's driver: kernels launched on CPU tensors are compiled for a GPU, and
the compiled code is run here.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from ptx_machine import Machine, Region
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from fused_adam_kernels import table

WARP = 32
# What kernels are given and never write to. All other tensors among their arguments they may.
READ_ONLY = {
    *("rows_ptr", "blocks_ptr", "hyper_ptr"),
    *("found_inf_ptr", "grad_scale_ptr", "square_sum_ptr"),
}
# Column of an operand's address -> the constant of `adam_kernel` that is its element type. The
# average has the type of the scalars.
OPERANDS = {
    table.PARAM: "PARAM",
    table.GRAD: "GRAD",
    table.EXP_AVG: "M",
    table.EXP_AVG_SQ: "V",
    table.MAX_EXP_AVG_SQ: "V_MAX",
    table.EXTRA: "EXTRA",
}
GROUP = 32  # elements that share one scale
SCALE_BYTES = 2


class Driver:
    """What Triton asks of the driver of a GPU, and what it launches.

    Args:
        target: the GPU.
        cache: folder for what gcc compiled.
    """

    def __init__(self, target: GPUTarget, cache: pathlib.Path) -> None:
        self.target, self.cache = target, cache
        self.machines: list[Machine] = []

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def machine(self, ptx: str, shared_bytes: int) -> Machine:
        """What runs a kernel that Triton compiled."""
        return Machine(ptx, shared_bytes, self.cache)

    def load(self, kernel: Any) -> None:
        """Get a `CompiledKernel` ready to be launched."""
        if kernel.module is not None:
            return
        machine = self.machine(kernel.asm["ptx"], kernel.metadata.shared)
        self.machines.append(machine)
        names = kernel.src.fn.arg_names
        passed = [kind != "constexpr" for kind in kernel.src.signature.values()]

        def run(x: int, y: int, z: int, *args: Any) -> None:
            # Before the kernel's own: stream, function, two of metadata, two hooks.
            own = args[6:]
            values = [value for value, given in zip(own, passed, strict=True) if given]
            registers = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]
            named = dict(zip(names, own, strict=True))
            machine(x * y * z, registers, reachable(machine.kernel.name, named))

        kernel.module, kernel.function, kernel._run = machine, 0, run


def reachable(kernel: str, args: Mapping[str, Any]) -> Iterator[Region]:
    """All memory that a launch may touch: its tensors, and what the rows of the table point to.

    Args:
        kernel: its name.
        args: all its arguments, compile-time ones included, by name.
    """
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            yield Region(value.data_ptr(), value.nbytes, name not in READ_ONLY)
    if kernel == "prologue_kernel":
        for row in args["rows_ptr"].tolist():
            yield Region(row[table.STEP], torch.float32.itemsize, True)
    elif kernel == "square_sum_kernel":
        for row in _rows(args):
            yield Region(row[table.GRAD], row[table.GRAD_NUMEL] * _itemsize(args["GRAD"]), False)
    elif kernel == "adam_kernel":
        for row in _rows(args):
            yield from _operands(row, args)


def _rows(args: Mapping[str, Any]) -> list[list[int]]:
    """The rows that blocks of the launch name."""
    found: list[list[int]] = args["rows_ptr"][args["blocks_ptr"][:, 0].unique().long()].tolist()
    return found


def _operands(row: list[int], args: Mapping[str, Any]) -> Iterator[Region]:
    """What the update of one row may touch, by its recipe."""
    numel = row[table.NUMEL]
    absent = set()
    if not args["AMSGRAD"]:
        absent.add(table.MAX_EXP_AVG_SQ)
    if args["WEIGHTS"] not in ("master32", "split32", "split24"):
        absent.add(table.EXTRA)
    for column, constant in OPERANDS.items():
        if column not in absent:
            writable = column != table.GRAD
            yield Region(row[column], numel * _itemsize(args[constant]), writable)
    if args["EMA"]:
        yield Region(row[table.EMA], numel * args["scalars_ptr"].itemsize, True)
    if args["STATES"] == "int8":
        for column in (table.EXP_AVG_SCALE, table.EXP_AVG_SQ_SCALE):
            yield Region(row[column], -(-numel // GROUP) * SCALE_BYTES, True)


def _itemsize(element_type: Any) -> int:
    """Bytes of a Triton type."""
    return int(element_type.primitive_bitwidth) // 8


def install(arch: str, cache: pathlib.Path) -> Driver:
    """Make the machine Triton's driver: from now on kernels are compiled for this GPU and run here.

    Args:
        arch: "sm_90", for example.
        cache: folder for what gcc compiled.
    """
    assert not triton.knobs.runtime.interpret, "under TRITON_INTERPRET nothing is compiled"
    driver = Driver(GPUTarget("cuda", int(arch.removeprefix("sm_")), WARP), cache)
    triton.runtime.driver.set_active(driver)
    # A driver is given the binary alone, and the machine runs the text that it was made from.
    CompiledKernel._init_handles = lambda kernel: driver.load(kernel)
    return driver
