"""One PTX instruction -> a C statement: the part of PTX that Triton makes of our kernels.

What is not listed here raises, be it a name, a modifier or an operand. So do approximations, such
as `sqrt.approx`: PTX leaves their last bits open, and no result of ours may rest on them.

The meanings are those of NVIDIA's "PTX ISA", chapter "Instruction Set".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ptx_text import Instruction, split

EACH_THREAD = "for (int t = THREADS - 1; t >= 0; t--)"
WIDTH = {"pred": 8, "b16": 16, "b32": 32, "b64": 64}
INTEGERS = {
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "pred": "uint8_t",
}
# Functions of the prelude that make a number of a register's bits, and bits of a number.
FLOATS = {"f32": ("F", "f"), "f64": ("D", "d"), "f16": ("H", "h"), "bf16": ("B", "b")}
SPECIAL = {"%tid.x": "(uint32_t)t", "%ctaid.x": "(uint32_t)cta", "global_smem": "0u"}
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

# Name of an instruction -> what makes C of it, from its index, itself, and each of its operands.
# Those of the second table are done by all threads at once, those of the first by thread `t`.
ALONE: dict[str, Callable[..., str]] = {}
IN_STEP: dict[str, Callable[..., str]] = {}


def statement(index: int, item: Instruction) -> str:
    """The instruction in C.

    Args:
        index: of the instruction in its kernel's code, for faults.

    Raises:
        NotImplementedError: it is not translated; the error names it.
    """
    try:
        make = {**ALONE, **IN_STEP}[item.name]
        if in_step(item) and item.guard and item.name != "bra":
            raise ValueError(item.guard)
        return make(index, item, *item.operands)
    except (KeyError, TypeError, ValueError) as error:
        where = f" ({item.source})" if item.source else ""
        raise NotImplementedError(f"the PTX machine does not know: {item.text}{where}") from error


def in_step(item: Instruction) -> bool:
    """Whether all threads of a block do this at once."""
    return item.name in IN_STEP


def access_bytes(item: Instruction) -> int:
    """Bytes that each thread accesses in global memory; 0 for instructions that do not."""
    if item.name not in ("ld", "st") or item.modifiers[0] != "global":
        return 0
    data = item.operands[0 if item.name == "ld" else 1]
    return int(item.modifiers[-1][1:]) // 8 * len(split(data.strip("{}")))


def does(*names: str, table: dict[str, Callable[..., str]] = ALONE) -> Callable[..., Any]:
    """Enter a function into a table under these names."""

    def enter(function: Callable[..., str]) -> Callable[..., str]:
        table.update(dict.fromkeys(names, function))
        return function

    return enter


def only(modifiers: list[str], *allowed: str) -> None:
    """Raise ValueError unless every modifier is one of these."""
    if not set(modifiers) <= set(allowed):
        raise ValueError(modifiers)


# Operands


def register(name: str) -> str:
    """The array in C that holds a register of every thread."""
    return f"reg_{name[1:]}"


def condition(guard: str) -> str:
    """Whether thread `t` runs a guarded instruction, in C."""
    return guard.replace(guard.lstrip("!"), bits(guard.lstrip("!")))


def bits(name: str) -> str:
    """An operand's bits in C: a register of thread `t`, or a constant."""
    if name in SPECIAL:
        return SPECIAL[name]
    if re.fullmatch(r"%[a-z]+\d+", name):
        return f"{register(name)}[t]"
    if re.fullmatch(r"0[fd][0-9A-Fa-f]+", name):  # a float by its bits
        return f"0x{name[2:]}ull"
    return f"({int(name.rstrip('U'), 0)}ll)"


def number(kind: str, name: str) -> str:
    """An operand as a number of this type."""
    if kind in FLOATS:
        return f"{FLOATS[kind][0]}({bits(name)})"
    return f"(({INTEGERS[kind]}){bits(name)})"


def half(kind: str, name: str, shift: int) -> str:
    """A float in one half of an operand."""
    return f"{FLOATS[kind][0]}({bits(name)} >> {shift})"


def assign(kind: str, name: str, value: str) -> str:
    """Put a number of this type into a register. Signed ones fill it with their sign."""
    if name == "_":
        return ""
    to_bits = FLOATS[kind][1] if kind in FLOATS else f"({INTEGERS[kind]})"
    return f"{bits(name)} = {to_bits}({value});"


def wider(kind: str) -> str:
    """The integer type of twice the bits."""
    return f"{kind[0]}{2 * int(kind[1:])}"


# All threads at once


@does("ret", table=IN_STEP)
def _ret(index: int, item: Instruction) -> str:
    only(item.modifiers)
    return "return 0;"


@does("bar", table=IN_STEP)
def _bar(index: int, item: Instruction, barrier: str) -> str:
    only(item.modifiers, "sync")
    only([barrier], "0")
    return "epoch++;"


@does("bra", table=IN_STEP)
def _bra(index: int, item: Instruction, label: str) -> str:
    only(item.modifiers, "uni")
    if not item.guard:
        return f"goto {label[1:]};"
    return (
        f"{{ int taken = 0; {EACH_THREAD} taken += !!({condition(item.guard)});"
        f" if (taken == THREADS) goto {label[1:]};"
        f" if (taken) return fail(DIVERGED, {index}, 0, 0); }}"
    )


@does("shfl", table=IN_STEP)
def _shfl(
    index: int, item: Instruction, d: str, a: str, lanes: str, clamp: str, members: str
) -> str:
    """Each thread gets what another one of its warp holds: the one whose number differs in bits."""
    if (item.modifiers, clamp, members) != (["sync", "bfly", "b32"], "31", "-1"):
        raise ValueError(item.text)
    return (
        f"{{ uint32_t x[THREADS]; {EACH_THREAD} x[t] = {bits(a)};"
        f" {EACH_THREAD} {bits(d)} = x[t ^ {bits(lanes)}]; }}"
    )


@does("redux", table=IN_STEP)
def _redux(index: int, item: Instruction, d: str, a: str, members: str) -> str:
    """Each thread gets the extremum over those of its warp that take part."""
    sync, choose, *how, kind = item.modifiers
    only([sync, kind], "sync", "u32", "f32")
    only(how, *(("abs", "NaN") if kind == "f32" else ()))
    function = {"min": "least", "max": "most"}[choose] + ("_nan" if "NaN" in how else "")
    given = f"{bits(a)} & 0x7fffffff" if "abs" in how else bits(a)
    x, y = number(kind, d), ("F(warp[k])" if kind == "f32" else "warp[k]")
    return (
        f"{{ uint32_t x[THREADS]; {EACH_THREAD} x[t] = {given};"
        f" {EACH_THREAD} {{ uint32_t who = {bits(members)}, *warp = x + t / 32 * 32;"
        f" if (!(who >> t % 32 & 1)) return fail(NO_MEMBER, {index}, t, who);"
        f" {bits(d)} = x[t]; for (int k = 0; k < 32; k++) if (who >> k & 1)"
        f" {assign(kind, d, f'{function}({x}, {y})')} }} }}"
    )


# Arithmetic


@does(*BINARY)
def _binary(index: int, item: Instruction, d: str, a: str, b: str) -> str:
    sign, (*how, kind) = BINARY[item.name], item.modifiers
    if kind == "f32x2":  # two floats in 64 bits
        only(how, "rn")
        low, high = (f"f({half('f32', a, s)} {sign} {half('f32', b, s)})" for s in (0, 32))
        return f"{bits(d)} = (uint64_t){high} << 32 | {low};"
    if kind in FLOATS:
        # In add.rn.f32.bf16 the first operand is the narrow one.
        result = next((mod for mod in how if mod in FLOATS), kind)
        only(how, "rn", result)
        only([result], "f32", "f64")  # narrower ones would round twice
        return assign(result, d, f"{number(kind, a)} {sign} {number(result, b)}")
    if item.name == "mul" and how == ["wide"]:
        product = f"({INTEGERS[wider(kind)]}){number(kind, a)} * {number(kind, b)}"
        return assign(wider(kind), d, product)
    if item.name == "mul" and how == ["hi"]:
        only([kind], "u32")
        return assign(kind, d, f"(uint64_t){number(kind, a)} * {number(kind, b)} >> 32")
    only([item.name], "add", "sub", "mul", "and", "or", "xor")
    only(how, "lo" if item.name == "mul" else "")
    return assign(kind, d, f"{number(kind, a)} {sign} {number(kind, b)}")


@does("mad")
def _mad(index: int, item: Instruction, d: str, a: str, b: str, c: str) -> str:
    how, kind = item.modifiers
    only([how], "lo", "wide")
    result = kind if how == "lo" else wider(kind)
    product = f"({INTEGERS[result]}){number(kind, a)} * {number(kind, b)}"
    return assign(result, d, f"{product} + {number(result, c)}")


@does("fma")
def _fma(index: int, item: Instruction, d: str, a: str, b: str, c: str) -> str:
    """Fused multiply-adds round once. Our kernels have none; a fault would bring them."""
    *how, kind = item.modifiers
    only(how, "rn")
    if kind == "f32x2":
        low, high = (
            f"f(fmaf({half('f32', a, s)}, {half('f32', b, s)}, {half('f32', c, s)}))"
            for s in (0, 32)
        )
        return f"{bits(d)} = (uint64_t){high} << 32 | {low};"
    function = {"f32": "fmaf", "f64": "fma"}[kind]
    arguments = ", ".join(number(kind, x) for x in (a, b, c))
    return assign(kind, d, f"{function}({arguments})")


@does("sqrt")
def _sqrt(index: int, item: Instruction, d: str, a: str) -> str:
    how, kind = item.modifiers
    only([how], "rn")
    return assign(kind, d, f"{ {'f32': 'sqrtf', 'f64': 'sqrt'}[kind] }({number(kind, a)})")


@does("abs")
def _abs(index: int, item: Instruction, d: str, a: str) -> str:
    only(item.modifiers, "f32")
    return f"{bits(d)} = {bits(a)} & 0x7fffffff;"


@does("neg")
def _neg(index: int, item: Instruction, d: str, a: str) -> str:
    (kind,) = item.modifiers
    if kind == "s32":
        return assign(kind, d, f"0u - {bits(a)}")
    return f"{bits(d)} = {bits(a)} ^ { {'f32': 1 << 31, 'f64': 1 << 63}[kind] }ull;"


@does("not")
def _not(index: int, item: Instruction, d: str, a: str) -> str:
    only(item.modifiers, "pred")
    return f"{bits(d)} = !{bits(a)};"


@does("min", "max")
def _extremum(index: int, item: Instruction, d: str, a: str, b: str, *third: str) -> str:
    *how, kind = item.modifiers
    x, y = number(kind, a), number(kind, b)
    if kind in FLOATS:
        only(how, "NaN")
        function = {"min": "least", "max": "most"}[item.name] + ("_nan" if how else "")
        value = f"{function}({x}, {y})"
        for c in third:
            value = f"{function}({value}, {number(kind, c)})"
        return assign(kind, d, value)
    only(list(third))
    value = f"{x} {'<' if item.name == 'min' else '>'} {y} ? {x} : {y}"
    if how == ["relu"]:  # max.relu: of 0 too
        only([item.name, kind], "max", "s32")
        return assign(kind, d, f"({value}) > 0 ? ({value}) : 0")
    only(how)
    return assign(kind, d, value)


@does("shl", "shr")
def _shift(index: int, item: Instruction, d: str, a: str, b: str) -> str:
    """By as many bits as the register has, or more: all are gone, but for the sign."""
    (kind,) = item.modifiers
    width, x, by = int(kind[1:]), number(kind, a), number("u32", b)
    sign = "<<" if item.name == "shl" else ">>"
    gone = f"{x} >> {width - 1}" if kind[0] == "s" else "0"
    return assign(kind, d, f"{by} < {width} ? {x} {sign} {by} : {gone}")


@does("bfe")
def _bfe(index: int, item: Instruction, d: str, a: str, start: str, length: str) -> str:
    """A field of bits."""
    (kind,) = item.modifiers
    only([kind], "u32", "s32")
    left = 32 - int(start) - int(length)
    # To the top, and back with zeros or the sign.
    return assign(
        kind, d, f"({INTEGERS[kind]})({number('u32', a)} << {left}) >> {32 - int(length)}"
    )


@does("prmt")
def _prmt(index: int, item: Instruction, d: str, a: str, b: str, c: str) -> str:
    only(item.modifiers, "b32")
    return f"{bits(d)} = prmt({bits(a)}, {bits(b)}, {bits(c)});"


# Choosing


def compare(how: str, kind: str, x: str, y: str) -> str:
    """A comparison in C. Of floats `eq` is false and `equ` true where either is a NaN."""
    if kind not in FLOATS:
        return f"{x} {COMPARE[how]} {y}"
    unordered = f"({x} != {x} || {y} != {y})"
    if how in ("nan", "num"):
        return unordered if how == "nan" else f"!{unordered}"
    if how[-1] == "u":
        return f"{unordered} || {x} {COMPARE[how[:-1]]} {y}"
    return f"!{unordered} && {x} {COMPARE[how]} {y}"


@does("setp")
def _setp(index: int, item: Instruction, d: str, a: str, b: str) -> str:
    how, kind = item.modifiers
    if kind in ("f16x2", "bf16x2"):  # of the low halves, and of the high ones
        low, high = (
            compare(how, kind[:-2], half(kind[:-2], a, s), half(kind[:-2], b, s)) for s in (0, 16)
        )
        first, second = d.split("|")
        return f"{bits(first)} = {low}; {bits(second)} = {high};"
    return f"{bits(d)} = {compare(how, kind, number(kind, a), number(kind, b))};"


@does("selp")
def _selp(index: int, item: Instruction, d: str, a: str, b: str, predicate: str) -> str:
    return f"{bits(d)} = {bits(predicate)} ? {bits(a)} : {bits(b)};"


# Moving and converting


@does("mov")
def _mov(index: int, item: Instruction, d: str, a: str) -> str:
    (kind,) = item.modifiers
    if kind == "pred":
        return f"{bits(d)} = !!{bits(a)};"
    whole = int(kind[1:])
    if d[0] == "{":  # take apart
        parts = split(d.strip("{}"))
        width = whole // len(parts)
        return " ".join(
            assign(f"b{width}", part, f"{bits(a)} >> {i * width}") for i, part in enumerate(parts)
        )
    parts = split(a.strip("{}"))
    width = whole // len(parts)
    joined = " | ".join(
        f"(uint64_t){number(f'b{width}', part)} << {i * width}" for i, part in enumerate(parts)
    )
    return assign(f"b{whole}", d, joined)


@does("cvt")
def _cvt(index: int, item: Instruction, d: str, a: str, b: str = "") -> str:
    *how, to, source = item.modifiers
    if to in ("bf16x2", "f16x2"):
        only(how, "rn")
        only([source], "f32")
        high, low = (f"{FLOATS[to[:-2]][1]}({number(source, x)})" for x in (a, b))
        return f"{bits(d)} = (uint32_t){high} << 16 | {low};"
    x = number(source, a)
    if to in FLOATS:
        only(how, "rn")
        if to in ("f16", "bf16"):
            only([source], "f32")  # doubles would round twice, by way of float
        if source not in FLOATS:
            x = f"({'double' if to == 'f64' else 'float'}){x}"
    elif source in FLOATS:
        only(how, "rzi")
        only([to], "s32")
        x = f"whole({x}, {-(2**31)}.0, {2**31 - 1}.0)"
    else:
        only(how)
    return assign(to, d, x)


# Memory


@does("ld")
def _ld(index: int, item: Instruction, d: str, address: str) -> str:
    space, *how, kind = item.modifiers
    if space == "param":
        only(how)
        return assign(kind, d, f"params[{address.strip('[]')}]")
    values = split(d.strip("{}"))
    start, check, place = _access(index, space, how, kind, address, len(values), "0")
    taken = " ".join(assign(kind, value, f"x[{i}]") for i, value in enumerate(values))
    return f"{start} {check} memcpy(x, {place}, sizeof x); {taken}"


@does("st")
def _st(index: int, item: Instruction, address: str, data: str) -> str:
    space, *how, kind = item.modifiers
    values = split(data.strip("{}"))
    start, check, place = _access(index, space, how, kind, address, len(values), "x")
    filled = " ".join(f"x[{i}] = {bits(value)};" for i, value in enumerate(values))
    return f"{start} {filled} {check} memcpy({place}, x, sizeof x);"


def _access(
    index: int, space: str, how: list[str], kind: str, address: str, count: int, stored: str
) -> tuple[str, str, str]:
    """C that finds the address of a load or store, C that checks it, and the place itself."""
    only([space], "global", "shared")
    only(how, f"v{count}")
    match = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+))?\s*\]", address)
    if match is None:
        raise ValueError(address)
    width = int(kind[1:])
    start = f"uint64_t a = {bits(match[1])} + ({match[2] or 0}); uint{width}_t x[{count}];"
    check = f"if ({space}({stored}, {index}, t, a, {width // 8 * count})) return 1;"
    return start, check, "(void *)a" if space == "global" else "memory + a"
