"""What the compiler makes of the kernels: cross-compiled for GPUs that need not be here, and
counted. Launches nothing.

python -m fused_adam_kernels.inspect [--arch sm_90 ...] [--variant fp32 ...] [--json]
"""

import argparse
import collections
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import adam, norm, scalars
from .config import CONFIGS, Config, kind_of

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# name -> element types of parameter and gradient, and how weights and moments are stored
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
    """A kernel with all that its compilation rests on."""

    kernel: Any
    arguments: dict[str, str]  # run-time argument -> Triton's name of its type
    constants: dict[str, Any]
    elements: int  # per program, or per turn of its loop
    bytes_moved: float | None = (
        None  # per element, each input read once and each output written once
    )
    num_warps: int = 4
    max_registers: int | None = None  # per thread; on NVIDIA


def update(
    param: torch.dtype,
    grad: torch.dtype,
    weights: str,
    states: str,
    amsgrad: bool = False,
    config: Config | None = None,
) -> Variant:
    """The update kernel as `adam_step` launches it, or under another launch configuration."""
    config = config or CONFIGS[kind_of(param, grad, weights, states)]
    arguments = {
        "rows_ptr": "*i64",
        "blocks_ptr": "*i32",
        "scalars_ptr": "*fp64" if param == FP64 else "*fp32",
    }
    constants = adam.constants(param, grad, weights, states, amsgrad)
    constants |= {"BLOCK": config.block, "TAIL": config.tail}
    m, v, v_max, extra = adam.storage_types(param, weights, states)
    # Read and written: moments, their maximum, what is beside the parameter, a scale of 2 bytes per
    # 32 of each moment.
    held = (
        m.itemsize
        + v.itemsize
        + (v_max.itemsize if amsgrad else 0)
        + (4 / 32 if states == "int8" else 0)
    )
    held += extra.itemsize if weights in ("master32", "split32", "split24") else 0
    moved = 2 * param.itemsize + grad.itemsize + 2 * held
    return Variant(
        adam.adam_kernel,
        arguments,
        constants,
        config.block,
        moved,
        config.num_warps,
        config.max_registers,
    )


def square_sum(grad: torch.dtype) -> Variant:
    """The kernel that adds the squares of gradients, one turn of its loop."""
    arguments = {"rows_ptr": "*i64", "blocks_ptr": "*i32", "partials_ptr": "*fp64"}
    constants = {
        "GRAD": adam.TYPES[grad],
        "LANES": norm.LANES,
        "LEVELS": norm.LEVELS,
        "CHUNK": norm.CHUNK,
    }
    return Variant(norm.square_sum_kernel, arguments, constants, norm.LANES, grad.itemsize)


PROLOGUE = {
    "rows_ptr": "*i64",
    "hyper_ptr": "*fp64",
    "scalars_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
    "grad_scale_ptr": "*fp32",
    "square_sum_ptr": "*fp64",
    "stats_ptr": "*fp64",
    "num_rows": "i32",
}
VARIANTS = {
    **{name: update(*mix) for name, mix in MIXES.items()},
    **{f"{name}-amsgrad": update(*mix, amsgrad=True) for name, mix in MIXES.items()},
    **{name: update(*recipe) for name, recipe in RECIPES.items()},
    "prologue": Variant(scalars.prologue_kernel, PROLOGUE, {"BLOCK": scalars.BLOCK}, scalars.BLOCK),
    "norm-fp32": square_sum(FP32),
    "norm-bf16": square_sum(BF16),
}
DEFAULT_VARIANTS = ["fp32", "fp32-amsgrad", "bf16-fp32-state", "bf16", "prologue"]


@dataclasses.dataclass
class Report:
    """What is in the code of one variant for one target. Counts are static: slow paths and tails
    included.

    But for per_element: it counts what full blocks run, the kernel compiled once more without its
    loop over the tail, which draws random bits element by element. Slow paths of sqrt and div, and
    the tables' loads, are in it.
    """

    variant: str
    target: str
    registers: int  # per thread
    spills: int  # instructions that touch local memory (AMD: spilled registers)
    local_bytes: int
    shared_bytes: int
    loads: dict[int, int]  # bits -> accesses to elements, not to the tables
    stores: dict[int, int]
    fp64: int  # instructions on doubles
    sqrt: str  # "rn": correctly rounded; else what the compiler calls it; "" if there is none
    div: str
    fused: int  # additions that vanished in a fused multiply-add
    instructions: int
    per_element: float  # instructions per thread, without the tail's / elements per thread
    bytes_moved: float | None  # per element
    compile_s: float  # without any cache


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """Compile as a launch on `target` would, except that nothing comes from the cache."""
    names = variant.kernel.arg_names
    signature = {name: variant.arguments.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    options: dict[str, Any] = {"num_warps": variant.num_warps, "enable_fp_fusion": False}
    if variant.max_registers is not None and target.backend == "cuda":
        options["maxnreg"] = variant.max_registers
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        return triton.compile(
            ASTSource(variant.kernel, signature, constants, aligned), target=target, options=options
        )


def inspect(name: str, target: str, variant: Variant | None = None) -> Report:
    """Compile one variant for one target and count.

    Args:
        name: of VARIANTS, or any if `variant` is given.
        target: of TARGETS.
        variant: what to compile instead of VARIANTS[name].
    """
    variant = variant or VARIANTS[name]
    start = time.perf_counter()
    kernel = compiled(variant, TARGETS[target])
    compile_s = time.perf_counter() - start
    read = read_amd if TARGETS[target].backend == "hip" else read_nvidia
    counts = body = read(kernel.asm)
    if variant.constants.get("TAIL"):
        without_tail = variant._replace(constants={**variant.constants, "TAIL": 0})
        body = read(compiled(without_tail, TARGETS[target]).asm)
    lanes = TARGETS[target].warp_size * variant.num_warps
    return Report(
        variant=name,
        target=target,
        shared_bytes=kernel.metadata.shared,
        per_element=body["instructions"] * lanes / variant.elements,
        bytes_moved=variant.bytes_moved,
        compile_s=compile_s,
        **counts,
    )


def read_nvidia(asm: Any) -> dict[str, Any]:
    """Counts from SASS. Square root and division are single instructions in PTX only: their kind is
    read there.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    found = re.findall(r"/\*[0-9a-f]{4,}\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*)", text)
    # Behind the last real instruction follow a jump to itself and padding.
    names = [name for _, name in found if name != "NOP"]
    ptx = asm["ptx"]
    fused = re.findall(r"^\s*(?:@\S+ )?fma\.[\w.]*f(?:32|64)(x2)?\s", ptx, re.M)
    additions = re.findall(r"^\s*(?:@\S+ )?(?:add|sub)\.[\w.]*f32(x2)?\s", ptx, re.M)
    # ptxas contracts packed arithmetic even where PTX says .rn (CUDA 12.9): what counts are the
    # additions left over. Signs are changed and dropped by adding -0.0, where no other instruction
    # takes that over: no additions of ours.
    signs = len(re.findall(r"\bFADD R\d+, (?:-R\d+|\|R\d+\|)(?:\.reuse)?, -RZ ", text))
    added = (
        sum(name == "FADD" for name in names) - signs + 2 * sum(name == "FADD2" for name in names)
    )
    widths = {"": 32, "64": 64, "128": 128, "256": 256, "ENL2.256": 256, "U16": 16, "U8": 8}
    accesses: dict[str, dict[int, int]] = {"LDG": {}, "STG": {}}
    for mask, name in found:
        kind, _, rest = name.partition(".")
        # Elements are read under a mask, table entries are not.
        if kind == "STG" or (kind == "LDG" and mask):
            bits = next(width for key, width in reversed(widths.items()) if key in rest)
            accesses[kind][bits] = accesses[kind].get(bits, 0) + 1
    return {
        "registers": used["REG"],
        "spills": sum(name.split(".")[0] in ("LDL", "STL") for name in names),
        "local_bytes": used["STACK"] + used["LOCAL"],
        "loads": accesses["LDG"],
        "stores": accesses["STG"],
        "fp64": sum(
            bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|.*(F64|64H)", name)) for name in names
        ),
        "sqrt": kinds(ptx, "sqrt|rsqrt"),
        "div": kinds(ptx, "div|rcp"),
        "fused": sum(1 + bool(x2) for x2 in fused + additions) - added,
        "instructions": len(names),
    }


def kinds(ptx: str, names: str) -> str:
    """How PTX rounds these instructions: "rn", "approx.ftz", ..."""
    found = re.findall(rf"^\s*(?:@\S+ )?(?:{names})\.([\w.]+)\.f(?:32|64)\s", ptx, re.M)
    return " ".join(sorted(set(found)))


def read_amd(asm: Any) -> dict[str, Any]:
    """Counts from the text of the code object."""
    text = asm["amdgcn"]
    code = text[: text.index(".Lfunc_end0:")]
    names = [
        re.sub(r"_e(32|64)(_dpp)?$", "", name)
        for name in re.findall(r"^\t((?:v|s|ds|global|flat|scratch|buffer)_\w+)", code, re.M)
    ]
    count = collections.Counter(names)
    used = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)$", text, re.M)}
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16}
    accesses: dict[str, dict[int, int]] = {"load": {}, "store": {}}
    for name, number in count.items():
        match = re.match(r"(?:global|buffer)_(load|store)_(?:short_d16|([a-z0-9]+))", name)
        if match:
            bits = widths.get(match[2] or "short", 8)
            accesses[match[1]][bits] = accesses[match[1]].get(bits, 0) + number

    def total(pattern: str) -> int:
        return sum(
            number * (1 + ("_pk_" in name))
            for name, number in count.items()
            if re.fullmatch(pattern, name)
        )

    # A correctly rounded division is one reciprocal and 5 fused multiply-adds between v_div_scale
    # and v_div_fixup; such a root is v_sqrt and 2 of them, or v_rsq and 5 (more in double
    # precision). Any others are contractions, and so are mixed ones that do not multiply by one or
    # add zero.
    extra = {
        bits: total(rf"v_(pk_)?fma(c|ak|mk)?_{bits}")
        - 5 * total(rf"v_div_fixup_{bits}") - 2 * total(rf"v_sqrt_{bits}") - 5 * total(rf"v_rsq_{bits}")
        for bits in ("f32", "f64")
    }  # fmt: skip
    mixed = re.findall(r"^\tv_fma_mix\w* (?!.*(?: 1\.0|\b0\)?))", code, re.M)
    roots, divisions = total(r"v_(sqrt|rsq)_f\d+"), total(r"v_div_fixup_f\d+")
    return {
        "registers": used["vgpr_count"] + used["agpr_count"],
        "spills": used["vgpr_spill_count"] + used["sgpr_spill_count"],
        "local_bytes": used["private_segment_fixed_size"],
        "loads": accesses["load"],
        "stores": accesses["store"],
        "fp64": total(r"v_\w+_f64"),
        "sqrt": "" if not roots else "rn" if min(extra.values()) >= 0 else "approx",
        "div": ""
        if not total(r"v_rcp_f\d+")
        else "rn"
        if total(r"v_rcp_f\d+") == divisions
        else "approx",
        "fused": max(extra["f32"], 0) + len(mixed),
        "instructions": len(names),
    }


HEADER = (
    "kernel target regs spills local shared loads stores fp64 sqrt div fused instr body/elem B/elem compile_s"
).split()


def line(report: Report) -> list[str]:
    """One row of the table. Loads and stores: number x bits."""

    def accesses(counts: dict[int, int]) -> str:
        return " ".join(f"{counts[bits]}x{bits}" for bits in sorted(counts, reverse=True))

    return [
        *(
            report.variant,
            report.target,
            str(report.registers),
            str(report.spills),
            str(report.local_bytes),
        ),
        *(
            str(report.shared_bytes),
            accesses(report.loads),
            accesses(report.stores),
            str(report.fp64),
        ),
        *(report.sqrt or "-", report.div or "-", str(report.fused), str(report.instructions)),
        *(f"{report.per_element:.1f}", str(report.bytes_moved or "-"), f"{report.compile_s:.2f}"),
    ]


def table_of(reports: list[Report]) -> str:
    """Aligned columns: names to the left, numbers to the right."""
    rows = [HEADER, *map(line, reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    for row, cells in zip(rows, aligned, strict=True):
        cells[:2] = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
    return "\n".join("  ".join(cells) for cells in aligned)


def chosen(option: str, names: list[str], allowed: list[str]) -> list[str]:
    """The names, or all of them for `all`; exits with one line if one is not known."""
    for name in names:
        if name not in (*allowed, "all"):
            sys.exit(f"{option} {name!r} is not known; allowed: all, {', '.join(allowed)}")
    return allowed if "all" in names else names


def main(arguments: list[str] | None = None) -> None:
    """Print a table, or JSON, of the variants and targets asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_adam_kernels.inspect",
        description="Cross-compile the kernels without a GPU and show what is in the code.",
    )
    parser.add_argument("--arch", nargs="+", default=["all"], help=f"all, {', '.join(TARGETS)}")
    parser.add_argument(
        "--variant", nargs="+", default=DEFAULT_VARIANTS, help=f"all, {', '.join(VARIANTS)}"
    )
    parser.add_argument(
        "--json", action="store_true", help="one list of objects instead of the table"
    )
    options = parser.parse_args(arguments)
    targets = chosen("--arch", options.arch, list(TARGETS))
    variants = chosen("--variant", options.variant, list(VARIANTS))
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, under which nothing is compiled; allowed: unset, or 0")
    reports = [inspect(variant, target) for variant in variants for target in targets]
    if options.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=1))
        return
    print(f"triton {triton.__version__}")
    print(table_of(reports))


if __name__ == "__main__":
    main()
