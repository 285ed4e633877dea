"""Cross-compile the kernels and count what is in the code. Needs no GPU and launches nothing.

python -m fused_adam_kernels.inspect [--arch sm_90 ...] [--variant fp32 ...] [--run] [--json]

With --run the kernels are executed too, on the CPU, as far as PTX: a second table says what full
rows ask of memory and of a GPU's issue slots. tests/machine executes them, in a checkout alone.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
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

from . import adam, norm, scalars, table
from .config import CONFIGS, Config, kind_of

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

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
DEFAULT_VARIANTS = ["fp32", "fp32-amsgrad", "bf16-fp32-state", "bf16", "prologue"]


@dataclasses.dataclass
class Report:
    """What is in the code of one variant for one target.

    Counts are static and include slow paths and tails. Only `per_element` counts what full blocks
    run: for it the kernel is compiled once more without its tail loop, which draws random bits
    element by element. It includes the slow paths of sqrt and div, and the loads from the tables.
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
    sqrt: str  # "rn": correctly rounded; else the compiler's name for it; "" if there is none
    div: str
    fused: int  # additions that vanished in a fused multiply-add
    instructions: int
    per_element: float  # instructions per thread without the tail / elements per thread
    bytes_moved: float | None  # per element
    compile_s: float  # seconds, without any cache


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """Compile as a launch on `target` would, but never take the result from the cache."""
    names = variant.kernel.arg_names
    signature = {name: variant.arguments.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    # The tables come from torch's allocator, so a launch specialises on their alignment.
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
        name: a key of VARIANTS, or any name if `variant` is given.
        target: a key of TARGETS.
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
    threads = TARGETS[target].warp_size * variant.num_warps
    return Report(
        variant=name,
        target=target,
        shared_bytes=kernel.metadata.shared,
        per_element=body["instructions"] * threads / variant.elements,
        bytes_moved=variant.bytes_moved,
        compile_s=compile_s,
        **counts,
    )


def read_nvidia(asm: Any) -> dict[str, Any]:
    """Counts from SASS, and from PTX where a square root or division is a single instruction."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*)", text)
    # The last real instruction is followed by a jump to itself and padding.
    names = [name for _, name in instructions if name != "NOP"]
    ptx = asm["ptx"]
    fmas = re.findall(r"^\s*(?:@\S+ )?fma\.[\w.]*f(?:32|64)(x2)?\s", ptx, re.M)
    additions = re.findall(r"^\s*(?:@\S+ )?(?:add|sub)\.[\w.]*f32(x2)?\s", ptx, re.M)
    # Fusing means more fused multiply-adds in PTX than the kernel asks for. And ptxas fuses packed
    # arithmetic even where PTX says .rn (CUDA 12.9, sm_100 and sm_120), so count the additions of
    # PTX that are missing from SASS. SASS also negates and takes magnitudes by adding -0.0: these
    # are no additions of ours.
    signs = len(re.findall(r"\bFADD R\d+, (?:-R\d+|\|R\d+\|)(?:\.reuse)?, -RZ ", text))
    added = names.count("FADD") - signs + names.count("UFADD") + 2 * names.count("FADD2")
    asked = asked_fmas(asm["llir"], "32") + asked_fmas(asm["llir"], "64")
    widths = {"": 32, "64": 64, "128": 128, "256": 256, "ENL2.256": 256, "U16": 16, "U8": 8}
    accesses: dict[str, dict[int, int]] = {"LDG": {}, "STG": {}}
    for mask, name in instructions:
        kind, _, rest = name.partition(".")
        bits = next(width for key, width in reversed(widths.items()) if key in rest)
        # Elements are loaded under a mask or 128 bits at a time, table entries are not.
        if kind == "STG" or (kind == "LDG" and (mask or bits >= 128)):
            accesses[kind][bits] = accesses[kind].get(bits, 0) + 1
    return {
        "registers": usage["REG"],
        "spills": sum(name.split(".")[0] in ("LDL", "STL") for name in names),
        "local_bytes": usage["STACK"] + usage["LOCAL"],
        "loads": accesses["LDG"],
        "stores": accesses["STG"],
        "fp64": sum(
            bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|.*(F64|64H)", name)) for name in names
        ),
        "sqrt": kinds(ptx, "sqrt|rsqrt"),
        "div": kinds(ptx, "div|rcp"),
        "fused": sum(1 + bool(x2) for x2 in fmas + additions) - asked - added,
        "instructions": len(names),
    }


def asked_fmas(llir: str, bits: str) -> int:
    """Fused multiply-adds that the kernel asks for, with `tl.fma`.

    LLVM IR names them apart: what fuses, comes after it. Triton 3.6 also writes AMD's correctly
    rounded root there, as a reciprocal root and five of them.
    """
    widths = re.findall(rf"call .*@llvm\.fma\.(?:v(\d+))?f{bits}\(", llir)
    roots = re.findall(rf"call .*@llvm\.amdgcn\.rsq\.f{bits}\(", llir)
    return sum(int(width or 1) for width in widths) - 5 * len(roots)


def kinds(ptx: str, names: str) -> str:
    """How PTX rounds these instructions: "rn", "approx.ftz", ..."""
    roundings = re.findall(rf"^\s*(?:@\S+ )?(?:{names})\.([\w.]+)\.f(?:32|64)\s", ptx, re.M)
    return " ".join(sorted(set(roundings)))


def read_amd(asm: Any) -> dict[str, Any]:
    """Counts from the assembly text of the code object."""
    text = asm["amdgcn"]
    code = text[: text.index(".Lfunc_end0:")]
    names = [
        re.sub(r"_e(32|64)(_dpp)?$", "", name)
        for name in re.findall(r"^\t((?:v|s|ds|global|flat|scratch|buffer)_\w+)", code, re.M)
    ]
    count = collections.Counter(names)
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)$", text, re.M)}
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16}
    accesses: dict[str, dict[int, int]] = {"load": {}, "store": {}}
    for name, number in count.items():
        match = re.match(r"(?:global|buffer)_(load|store)_(?:short_d16|([a-z0-9]+))", name)
        if match:
            bits = widths.get(match[2] or "short", 8)
            accesses[match[1]][bits] = accesses[match[1]].get(bits, 0) + number

    def total(pattern: str) -> int:
        """Operations of this kind. A packed instruction does two."""
        return sum(
            number * (2 if "_pk_" in name else 1)
            for name, number in count.items()
            if re.fullmatch(pattern, name)
        )

    def unexplained_fmas(bits: str) -> int:
        """Those that nobody asks for, and that belong to no correctly rounded division or root."""
        # A correctly rounded division is one reciprocal and 5 fused multiply-adds between
        # v_div_scale and v_div_fixup. Such a root is v_sqrt and 2 of them, or v_rsq and 5 (more in
        # double precision).
        fmas = total(rf"v_(pk_)?fma(c|ak|mk)?_f{bits}") - asked_fmas(asm["llir"], bits)
        divisions = total(rf"v_div_fixup_f{bits}")
        return fmas - 5 * divisions - 2 * total(rf"v_sqrt_f{bits}") - 5 * total(rf"v_rsq_f{bits}")

    extra_fmas = unexplained_fmas("32")
    # Mixed-precision ones are conversions if they multiply by one or add zero.
    mixed_fmas = re.findall(r"^\tv_fma_mix\w* (?!.*(?: 1\.0|\b0\)?))", code, re.M)
    exact_roots = min(extra_fmas, unexplained_fmas("64")) >= 0
    reciprocals = total(r"v_rcp_f\d+")
    exact_divisions = reciprocals == total(r"v_div_fixup_f\d+")
    return {
        "registers": usage["vgpr_count"] + usage["agpr_count"],
        "spills": usage["vgpr_spill_count"] + usage["sgpr_spill_count"],
        "local_bytes": usage["private_segment_fixed_size"],
        "loads": accesses["load"],
        "stores": accesses["store"],
        "fp64": total(r"v_\w+_f64"),
        "sqrt": ("rn" if exact_roots else "approx") if total(r"v_(sqrt|rsq)_f\d+") else "",
        "div": ("rn" if exact_divisions else "approx") if reciprocals else "",
        "fused": max(extra_fmas, 0) + len(mixed_fmas),
        "instructions": len(names),
    }


class Card(NamedTuple):
    """What one GPU can do per second.

    Attributes:
        target: a key of TARGETS.
        issue_slots: warp instructions.
        memory_bytes: to and from its memory, as a copy was measured.
    """

    target: str
    issue_slots: float
    memory_bytes: float


CARDS = {
    # 132 multiprocessors of 4 schedulers at 1.98 GHz: NVIDIA's "H100 Tensor Core GPU Architecture",
    # and the largest clock that nvidia-smi names. Bytes: bench/results/h100-verify.json.
    "h100": Card("sm_90", 132 * 4 * 1.98e9, 2.9e12),
}
WARP = 32  # threads
CHECKOUT = pathlib.Path(__file__).parents[2]
COUNTS_SCRIPT = CHECKOUT / "tests" / "machine" / "ptx_counts.py"


class RunReport(NamedTuple):
    """What one launch over one long row executed, per element, and the time it takes at least.

    Counts are those of PTX, before ptxas. There a root or a quotient is one instruction, where
    machine code takes 8 to 20. Accesses to elements are the same in both.
    """

    variant: str
    target: str
    rows: str  # "aligned": all operands are. "misaligned": all are one element off.
    requested_bytes: float  # by all threads
    sector_bytes: float  # 32-byte sectors that warps touch, once for each access of a warp
    ptx_instructions: float
    branches: float  # per program; none divides a warp, else the launch ends with an error
    machine_instructions: float | None  # Report.per_element, of full blocks: aligned rows alone
    memory_ps: float  # per element: each input read once and each output written once
    issue_ps: float  # per element: `ptx_instructions`
    issue_most_ps: float | None  # per element: `machine_instructions`, with every slow path


def run(reports: list[Report], card: Card) -> list[RunReport]:
    """Execute variants on the CPU: those of `reports` for the card's target.

    Raises:
        RuntimeError: nothing can be executed here.
    """
    static = {report.variant: report for report in reports if report.bytes_moved is not None}
    # A process of its own, so that nothing here imports from the tests.
    paths = [str(CHECKOUT), str(CHECKOUT / "kernels")]
    done = subprocess.run(
        [sys.executable, str(COUNTS_SCRIPT), "--arch", card.target, "--variant", *static],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    found = []
    for counts in json.loads(done.stdout):
        report = static[counts["variant"]]
        most = report.per_element if counts["rows"] == "aligned" else None
        issue_ps = 1e12 / WARP / card.issue_slots  # per instruction of one element
        assert report.bytes_moved is not None
        found.append(
            RunReport(
                **counts,
                machine_instructions=most,
                memory_ps=report.bytes_moved / card.memory_bytes * 1e12,
                issue_ps=counts["ptx_instructions"] * issue_ps,
                issue_most_ps=None if most is None else most * issue_ps,
            )
        )
    return found


RUN_HEADER = [
    "kernel",
    "target",
    "rows",
    "B/elem",
    "asked",
    "sectors",
    "branches",
    "ptx/elem",
    "body/elem",
    "memory_ps",
    "issue_ps",
]


def run_cells(report: RunReport, bytes_moved: float | None) -> list[str]:
    """One row of the table, in the order of RUN_HEADER."""
    most = report.issue_most_ps
    return [
        report.variant,
        report.target,
        report.rows,
        str(bytes_moved),
        f"{report.requested_bytes:.2f}",
        f"{report.sector_bytes:.2f}",
        f"{report.branches:.0f}",
        f"{report.ptx_instructions:.1f}",
        "-" if report.machine_instructions is None else f"{report.machine_instructions:.1f}",
        f"{report.memory_ps:.2f}",
        f"{report.issue_ps:.2f}" + ("" if most is None else f"-{most:.2f}"),
    ]


HEADER = [
    "kernel",
    "target",
    "regs",
    "spills",
    "local",
    "shared",
    "loads",
    "stores",
    "fp64",
    "sqrt",
    "div",
    "fused",
    "instr",
    "body/elem",
    "B/elem",
    "compile_s",
]


def cells(report: Report) -> list[str]:
    """One row of the table, in the order of HEADER. Loads and stores: number x bits."""

    def accesses(counts: dict[int, int]) -> str:
        return " ".join(f"{counts[bits]}x{bits}" for bits in sorted(counts, reverse=True))

    return [
        report.variant,
        report.target,
        str(report.registers),
        str(report.spills),
        str(report.local_bytes),
        str(report.shared_bytes),
        accesses(report.loads),
        accesses(report.stores),
        str(report.fp64),
        report.sqrt or "-",
        report.div or "-",
        str(report.fused),
        str(report.instructions),
        f"{report.per_element:.1f}",
        str(report.bytes_moved or "-"),
        f"{report.compile_s:.2f}",
    ]


def table_of(rows: list[list[str]]) -> str:
    """Aligned columns: names to the left, numbers to the right. The first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padded[:2] = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        lines.append("  ".join(padded))
    return "\n".join(lines)


def checked(option: str, names: list[str], allowed: list[str]) -> list[str]:
    """The names, or all of them for "all". Exits with one line if a name is unknown."""
    for name in names:
        if name not in (*allowed, "all"):
            sys.exit(f"{option} {name!r} is not known; allowed: all, {', '.join(allowed)}")
    return allowed if "all" in names else names


def main(arguments: list[str] | None = None) -> None:
    """Print a table, or JSON, of the variants and targets on the command line."""
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
    parser.add_argument(
        "--run", action="store_true", help="execute the kernels too, on the CPU: needs a checkout"
    )
    parser.add_argument(
        "--card", default="h100", help=f"GPU whose limits --run shows: {', '.join(CARDS)}"
    )
    options = parser.parse_args(arguments)
    targets = checked("--arch", options.arch, list(TARGETS))
    variants = checked("--variant", options.variant, list(VARIANTS))
    if options.card not in CARDS:
        sys.exit(f"--card {options.card!r} is not known; allowed: {', '.join(CARDS)}")
    card = CARDS[options.card]
    if options.run and card.target not in targets:
        sys.exit(f"--run for --card {options.card} needs {card.target} among --arch")
    if options.run and not COUNTS_SCRIPT.exists():
        sys.exit(f"--run needs a checkout of the repository: there is no {COUNTS_SCRIPT}")
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, under which nothing is compiled; allowed: unset, or 0")
    try:
        reports = [inspect(variant, target) for variant in variants for target in targets]
    except OSError as error:  # Triton writes what it compiles into its cache
        sys.exit(f"nothing can be compiled: {error}; TRITON_CACHE_DIR names another cache folder")
    try:
        of_card = [report for report in reports if report.target == card.target]
        runs = run(of_card, card) if options.run else []
    except RuntimeError as error:
        sys.exit(str(error))
    if options.json:
        found = [dataclasses.asdict(report) for report in reports]
        print(json.dumps(found + [report._asdict() for report in runs], indent=1))
        return
    print(f"triton {triton.__version__}")
    print(table_of([HEADER, *map(cells, reports)]))
    if runs:
        moved = {report.variant: report.bytes_moved for report in reports}
        rows = [run_cells(report, moved[report.variant]) for report in runs]
        print(f"\nexecuted, and the least time on {options.card}:")
        print(table_of([RUN_HEADER, *rows]))


if __name__ == "__main__":
    main()
