"""Cross-compile the kernels and count what is in the code. Needs no GPU and launches nothing.

python -m fused_adam_kernels.inspect [--arch sm_90 ...] [--variant fp32 ...] [--run] [--json]

With --run the kernels are executed too, on the CPU, as far as PTX: a second table says what full
rows ask of memory and of a GPU's issue slots. tests/machine executes them, in a checkout alone.
"""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .assembly import Report, read_amd, read_nvidia
from .executed import CARDS, COUNTS_SCRIPT, RUN_HEADER, run, run_cells
from .variants import VARIANTS, Variant

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

DEFAULT_VARIANTS = ["fp32", "fp32-amsgrad", "bf16-fp32-state", "bf16", "prologue"]


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
