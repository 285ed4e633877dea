"""Counts what is in a compiled kernel, from the texts that the compilers leave."""

import collections
import dataclasses
import re
import subprocess
import tempfile
from typing import Any

import triton


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
