"""The kernels as they are compiled: names for what `inspect.py` can show. Launches nothing."""

from typing import Any, NamedTuple

import torch

from . import adam, norm, scalars, table
from .config import CONFIGS, Config, kind_of

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# name -> element types of parameter and gradient, the two halves of the recipe
MIXES = {
    "fp32": (FP32, FP32, "native", "native"),
    "bf16": (BF16, BF16, "native", "native"),
    "fp16": (FP16, FP16, "native", "native"),
    "fp64": (FP64, FP64, "native", "native"),
    "bf16-fp32-state": (BF16, BF16, "native", "fp32"),
    "fp32-bf16-grad": (FP32, BF16, "native", "native"),
    "bf16-fp32-grad": (BF16, FP32, "native", "native"),
}
RECIPES = {
    "native-bf16": (FP32, FP32, "native", "bf16"),
    "native-int8": (FP32, FP32, "native", "int8"),
    "master32-fp32": (FP16, FP16, "master32", "fp32"),
    "split32-fp32": (BF16, BF16, "split32", "fp32"),
    "split32-bf16": (BF16, BF16, "split32", "bf16"),
    "split24-bf16": (BF16, BF16, "split24", "bf16"),
    "sr-bf16": (BF16, BF16, "sr", "bf16"),
    "split24-int8": (BF16, BF16, "split24", "int8"),
}


class Variant(NamedTuple):
    """A kernel with everything that decides how it is compiled.

    Attributes:
        kernel: a Triton JIT function.
        arguments: run-time argument -> Triton's name of its type.
        constants: compile-time argument -> value.
        elements: per program, or per turn of its loop.
        bytes_moved: per element, each input read once and each output written once.
        num_warps: warps per program.
        max_registers: registers per thread at most; NVIDIA only.
    """

    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    elements: int
    bytes_moved: float | None = None
    num_warps: int = 4
    max_registers: int | None = None


def update(
    param: torch.dtype,
    grad: torch.dtype,
    weights: str,
    states: str,
    amsgrad: bool = False,
    config: Config | None = None,
    cautious: bool = False,
    ema: bool = False,
) -> Variant:
    """The update kernel as `adam_step` launches it, or under another launch configuration."""
    config = config or CONFIGS[kind_of(param, grad, weights, states, amsgrad)]
    arguments = {
        "rows_ptr": "*i64",
        "blocks_ptr": "*i32",
        "scalars_ptr": "*fp64" if param == FP64 else "*fp32",
    }
    constants = adam.constants(param, grad, weights, states, amsgrad, cautious, ema)
    # In the interpreter the constants have its own launch shape.
    constants |= {"BLOCK": config.block, "TAIL": config.tail}
    stored = adam.storage_types(param, weights, states)
    state_bytes: float = stored.m.itemsize + stored.v.itemsize
    if amsgrad:
        state_bytes += stored.v_max.itemsize
    if states == "int8":
        state_bytes += 2 * 2 / 32  # two bfloat16 scales per group of 32
    if weights in ("master32", "split32", "split24"):
        state_bytes += stored.extra.itemsize
    if ema:
        state_bytes += 8 if param == FP64 else 4
    return Variant(
        adam.adam_kernel,
        arguments,
        constants,
        elements=config.block,
        # The gradient is read. Parameter and state are read and written.
        bytes_moved=2 * param.itemsize + grad.itemsize + 2 * state_bytes,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )


def square_sum(grad: torch.dtype) -> Variant:
    """The kernel that adds the squares of gradients; counted per turn of its loop."""
    arguments = {"rows_ptr": "*i64", "blocks_ptr": "*i32", "partials_ptr": "*fp64"}
    constants = {
        "GRAD": adam.TYPES[grad],
        "LANES": norm.LANES,
        "LEVELS": norm.LEVELS,
        "CHUNK": norm.CHUNK,
        "TAIL": 1,
        "LAYOUT": table.LAYOUT,
    }
    return Variant(norm.square_sum_kernel, arguments, constants, norm.LANES, grad.itemsize)


def prologue(skip_spikes: bool = False, ema: bool = False) -> Variant:
    """The kernel that advances step counters and computes the scalars; counted per row."""
    arguments = {
        "rows_ptr": "*i64",
        "hyper_ptr": "*fp64",
        "scalars_ptr": "*fp32",
        "found_inf_ptr": "*fp32",
        "grad_scale_ptr": "*fp32",
        "square_sum_ptr": "*fp64",
        "stats_ptr": "*fp64",
        "num_rows": "i32",
    }
    constants = {
        "BLOCK": scalars.BLOCK,
        "SKIP_SPIKES": skip_spikes,
        "EMA": ema,
        "LAYOUT": table.LAYOUT,
    }
    return Variant(scalars.prologue_kernel, arguments, constants, scalars.BLOCK)


VARIANTS = {
    **{name: update(*mix) for name, mix in MIXES.items()},
    **{f"{name}-amsgrad": update(*mix, amsgrad=True) for name, mix in MIXES.items()},
    **{name: update(*recipe) for name, recipe in RECIPES.items()},
    **{f"{name}-cautious": update(*mix, cautious=True) for name, mix in (MIXES | RECIPES).items()},
    **{f"{name}-ema": update(*mix, ema=True) for name, mix in (MIXES | RECIPES).items()},
    "prologue": prologue(),
    "prologue-skip-spikes": prologue(skip_spikes=True),
    "prologue-ema": prologue(ema=True),
    "norm-fp32": square_sum(FP32),
    "norm-bf16": square_sum(BF16),
}
