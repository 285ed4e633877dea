"""The machine itself, on PTX written by hand: what instructions do, what is a fault, and the cache.

Planted faults in our own kernels are in test_planted.py.
"""

import math
import os
import subprocess
import sys

import ptx_machine
import pytest
import torch
from process import ROOT
from ptx_machine import Fault, Machine, Region, disjoint
from training import values

pytestmark = pytest.mark.skipif(bool(ptx_machine.why_not()), reason=ptx_machine.why_not())

NAN, INF = float("nan"), float("inf")
# Rounding, overflow, subnormal numbers, both zeros.
AWKWARD = [0.0, -0.0, 1.0, -1.5, 1 + 2**-23, 3e38, -3e38, 1e-40, 1e-45, INF, -INF, NAN, 65519.0]
WIDTHS = {torch.bool: 8, torch.uint8: 8, torch.int8: 8, torch.int16: 16, torch.float16: 16}
WIDTHS |= {torch.bfloat16: 16, torch.int32: 32, torch.float32: 32, torch.int64: 64}
WIDTHS |= {torch.float64: 64}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def module(params, code, threads=32, registers=""):
    """PTX with one entry. %r0: the thread's number; %d0, %d1, ...: the parameters."""
    declared = ",\n".join(f"\t.param .u64 probe_param_{i}" for i in range(params))
    loads = "\n".join(f"\tld.param.b64 %d{i}, [probe_param_{i}];" for i in range(params))
    return f""".version 8.7
.target sm_90
.visible .entry probe(
{declared}
)
.reqntid {threads}
{{
	.reg .pred %p<4>;
	.reg .b16 %h<4>;
	.reg .b32 %r<8>;
	.reg .b64 %d<8>;
	{registers}
	mov.u32 %r0, %tid.x;
{loads}
	{code}
}}
"""


def launch(cache, code, *tensors, threads=32, grid=1, shared_bytes=0, read_only=(), registers=""):
    """Run `code` with the addresses of the tensors as parameters, all of which it may touch."""
    ptx = module(len(tensors), code, threads, registers)
    regions = [
        Region(tensor.data_ptr(), tensor.nbytes, i not in read_only)
        for i, tensor in enumerate(tensors)
    ]
    machine = Machine(ptx, shared_bytes, cache)
    machine(grid, [tensor.data_ptr() for tensor in tensors], regions)


def each(cache, code, out, *inputs):
    """Run `code` for each element: it finds the inputs in %a0, %b0, %c0, and leaves %y0.

    Args:
        out: dtype of the result.
    """
    numel = len(inputs[0])
    padded = [torch.nn.functional.pad(x, (0, -numel % 32)) for x in inputs]
    result = torch.zeros(len(padded[0]), dtype=out)
    lines, registers = ["mov.u32 %r1, %ctaid.x;", "mad.lo.s32 %r0, %r1, 32, %r0;"], []
    names = ["a", "b", "c"][: len(inputs)]
    for i, (name, dtype) in enumerate(
        zip([*names, "y"], [*(x.dtype for x in inputs), out], strict=True)
    ):
        width = WIDTHS[dtype]
        registers.append(f".reg .b{max(width, 16)} %{name}<1>;")
        lines.append(f"mad.wide.s32 %d{i}, %r0, {width // 8}, %d{i};")
        if name != "y":
            lines.append(f"ld.global.b{width} {{ %{name}0 }}, [ %d{i} + 0 ];")
    lines += [code, f"st.global.b{WIDTHS[out]} [ %d{len(inputs)} + 0 ], {{ %y0 }};", "ret;"]
    launch(
        cache, "\n".join(lines), *padded, result,
        grid=len(result) // 32, registers="\n".join(registers),
    )  # fmt: skip
    return result[:numel]


def pairs(dtype):
    """Awkward numbers in all pairs, and ordinary ones."""
    awkward = torch.tensor(AWKWARD, dtype=torch.float64).to(dtype)
    a, b = torch.meshgrid(awkward, awkward, indexing="ij")
    return [
        torch.cat([x.reshape(-1), values((100,), seed, dtype)]) for seed, x in enumerate((a, b))
    ]


def same(x, y):
    assert x.dtype == y.dtype
    if not x.dtype.is_floating_point:
        return torch.equal(x, y)
    return bool(((x == y) & (x.signbit() == y.signbit()) | (x.isnan() & y.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_arithmetic_rounds_as_torchs(name, dtype, cache):
    a, b = pairs(dtype)
    kind = f"f{WIDTHS[dtype]}"
    expected = getattr(torch, name)(a, b)
    assert same(each(cache, f"{name}.rn.{kind} %y0, %a0, %b0;", dtype, a, b), expected)


@pytest.mark.parametrize("name", ["add", "mul"])
def test_two_floats_at_once(name, cache):
    a, b = pairs(torch.float32)
    both = [torch.stack([x, x.flip(0)], dim=1).view(torch.int64).view(-1) for x in (a, b)]
    found = each(cache, f"{name}.rn.f32x2 %y0, %a0, %b0;", torch.int64, *both)
    expected = getattr(torch, name)(a, b)
    assert same(found.view(torch.float32).view(-1, 2)[:, 0].contiguous(), expected)
    assert same(found.view(torch.float32).view(-1, 2)[:, 1].flip(0), expected)


def test_square_roots_are_correctly_rounded(cache):
    a, _ = pairs(torch.float32)
    found = each(cache, "sqrt.rn.f32 %y0, %a0;", torch.float32, a)
    # Rounded to double first, a square root of a float has bits enough to round right again.
    assert same(found, torch.tensor([math.sqrt(x) if x >= 0 else x and NAN for x in a.tolist()]))


def test_fused_and_not(cache):
    """(1 + x)^2 - (1 + 2 x) is x^2, or 0 if the product is rounded too."""
    a, b, c = (torch.tensor([x]) for x in (1 + 2**-12, 1 + 2**-12, -1 - 2**-11))
    assert each(cache, "fma.rn.f32 %y0, %a0, %b0, %c0;", torch.float32, a, b, c) == 2**-24
    two = "mul.rn.f32 %y0, %a0, %b0;\nadd.rn.f32 %y0, %y0, %c0;"
    assert each(cache, two, torch.float32, a, b, c) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_to_nearest_even(dtype, cache):
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    a, b = pairs(torch.float32)
    assert same(each(cache, f"cvt.rn.{kind}.f32 %y0, %a0;", dtype, a), a.to(dtype))
    ties = (torch.arange(4096, dtype=torch.int32) << 12 | 0x3F800000).view(torch.float32)
    assert same(each(cache, f"cvt.rn.{kind}.f32 %y0, %a0;", dtype, ties), ties.to(dtype))
    back = a.to(dtype)
    assert same(each(cache, f"cvt.f32.{kind} %y0, %a0;", torch.float32, back), back.float())
    two = each(cache, f"cvt.rn.{kind}x2.f32 %y0, %a0, %b0;", torch.int32, a, b).view(dtype)
    assert same(two[0::2].contiguous(), b.to(dtype)) and same(two[1::2].contiguous(), a.to(dtype))


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_extrema_and_nans(name, nan, cache):
    a, b = pairs(torch.float32)
    function = {"min": torch.minimum, "max": torch.maximum}[name]
    if not nan:
        function = {"min": torch.fmin, "max": torch.fmax}[name]
    found = each(cache, f"{name}{nan}.f32 %y0, %a0, %b0;", torch.float32, a, b)
    zeros = (a == 0) & (b == 0)  # -0 is less than 0
    assert same(found[~zeros], function(a, b)[~zeros])
    signs = (a.signbit() | b.signbit()) if name == "min" else (a.signbit() & b.signbit())
    assert torch.equal(found[zeros].signbit(), signs[zeros])


@pytest.mark.parametrize("how", ["eq", "ne", "lt", "le", "gt", "ge", "neu", "equ", "num", "nan"])
def test_comparisons_and_nans(how, cache):
    a, b = pairs(torch.float32)
    code = f"setp.{how}.f32 %p0, %a0, %b0;\nselp.b32 %y0, 1, 0, %p0;"
    unordered = a.isnan() | b.isnan()
    if how in ("num", "nan"):
        expected = unordered == (how == "nan")
    else:
        expected = getattr(torch, how[:2])(a, b) & ~unordered
        if how[-1] == "u":
            expected |= unordered
    assert same(each(cache, code, torch.int32, a, b), expected.int())


def integers(*numbers):
    return torch.tensor(numbers, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize(
    ("code", "inputs", "expected"),
    [
        ("shl.b32 %y0, %a0, %b0;", [[1, 1, 1, 3], [0, 31, 32, 33]], [1, -(2**31), 0, 0]),
        ("shr.u32 %y0, %a0, %b0;", [[-1, -1, -1], [1, 31, 32]], [2**31 - 1, 1, 0]),
        ("shr.s32 %y0, %a0, %b0;", [[-8, -8, 8], [1, 40, 40]], [-4, -1, 0]),
        ("mul.hi.u32 %y0, %a0, %b0;", [[-1, 2**31 - 1], [-1, 4]], [-2, 1]),
        ("mul.lo.s32 %y0, %a0, %b0;", [[2**30, -3], [4, 5]], [0, -15]),
        ("bfe.u32 %y0, %a0, 4, 8;", [[0xFF0, -1]], [255, 255]),
        ("bfe.s32 %y0, %a0, 4, 8;", [[0xFF0, 0x7F0]], [-1, 127]),
        ("max.relu.s32 %y0, %a0, %b0;", [[-5, 3, -1], [-4, -4, 9]], [0, 3, 9]),
        ("min.u32 %y0, %a0, %b0;", [[-1, 1], [1, 2]], [1, 1]),
        ("prmt.b32 %y0, %a0, %b0, 0x7610;", [[0x33221100], [0x77665544]], [0x77661100]),
        ("prmt.b32 %y0, %a0, %b0, 0x9;", [[0x80000000 >> 16], [0]], [0xFF]),
        ("cvt.rzi.s32.f32 %y0, 0f4F800000;", [[0]], [2**31 - 1]),  # 2^32 saturates
        ("cvt.rzi.s32.f32 %y0, 0fC0333333;", [[0]], [-2]),  # -2.8
        ("cvt.rn.f32.u32 %y0, %a0;", [[-1]], [0x4F800000]),
        ("sub.s32 %y0, %a0, %b0;", [[-(2**31)], [1]], [2**31 - 1]),
        ("neg.s32 %y0, %a0;", [[5, -(2**31)]], [-5, -(2**31)]),
        ("cvt.s8.s32 %h0, %a0;\ncvt.s32.s8 %y0, %h0;", [[200, 127]], [-56, 127]),
        ("mov.b32 {%h0, %h1}, %a0;\nmov.b32 %y0, {%h1, %h0};", [[0x12345678]], [0x56781234]),
    ],
)
def test_integers(code, inputs, expected, cache):
    assert same(
        each(cache, code, torch.int32, *(integers(*x) for x in inputs)), integers(*expected)
    )


def test_threads_of_a_warp_exchange(cache):
    """A shuffle and an extremum stay within the 32 threads of a warp."""
    out = torch.zeros(2, 64, dtype=torch.int32)
    code = """
        shfl.sync.bfly.b32 %r1, %r0, 3, 31, -1;
        redux.sync.max.u32 %r2, %r0, -1;
        mad.wide.s32 %d0, %r0, 4, %d0;
        st.global.b32 [ %d0 + 0 ], %r1;
        st.global.b32 [%d0+256], %r2;
        ret;"""
    launch(cache, code, out, threads=64)
    assert out[0].tolist() == [i ^ 3 for i in range(64)]
    assert out[1].tolist() == [31] * 32 + [63] * 32


def test_the_largest_float_of_a_warp(cache):
    """A NaN gives way, or wins, as `max` says."""
    out = torch.zeros(32)
    code = """
        cvt.rn.f32.u32 %r1, %r0;
        setp.eq.b32 %p0, %r0, 3;
        selp.b32 %r1, 0x7FC00000, %r1, %p0;
        redux.sync.{how}.f32 %r2, %r1, -1;
        mad.wide.s32 %d0, %r0, 4, %d0;
        st.global.b32 [ %d0 + 0 ], %r2;
        ret;"""
    launch(cache, code.format(how="max"), out)
    assert out.tolist() == [31] * 32
    launch(cache, code.format(how="max.NaN"), out)
    assert out.isnan().all()


def test_the_largest_magnitude_of_a_warp(cache):
    """Triton 3.9 takes magnitudes in the same instruction."""
    out = torch.zeros(32)
    code = """
        cvt.rn.f32.u32 %r1, %r0;
        neg.f32 %r1, %r1;
        redux.sync.max.abs.NaN.f32 %r2, %r1, -1;
        mad.wide.s32 %d0, %r0, 4, %d0;
        st.global.b32 [ %d0 + 0 ], %r2;
        ret;"""
    launch(cache, code, out)
    assert out.tolist() == [31] * 32


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("ld.global.b32 %r1, [%d0+2];", "a misaligned address"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+8];", "a misaligned address"),
        ("ld.global.b32 %r1, [%d0+64];", "may not touch"),
        ("ld.global.b32 %r1, [%d0+-4];", "may not touch"),
        ("st.global.b32 [%d0+64], %r1;", "may not touch"),
        ("st.global.b32 [%d1+0], %r1;", "may only read"),
        ("st.shared.b32 [%r1+64], %r0;", "beyond the shared memory"),
        ("st.shared.b32 [%r1+2], %r0;", "a misaligned address"),
        ("setp.lt.s32 %p0, %r0, 3;\n@%p0 bra $L__end;\n$L__end:", "branch apart"),
        ("redux.sync.max.u32 %r1, %r0, 7;", "take part"),
    ],
)
def test_what_a_gpu_would_not_forgive(code, message, cache):
    writable, _, read_only = torch.zeros(3, 16, dtype=torch.int32)
    with pytest.raises(Fault, match=message) as raised:
        launch(
            cache, f"mov.b32 %r1, 0;\n{code}\nret;", writable, read_only,
            shared_bytes=64, read_only=[1],
        )  # fmt: skip
    assert any(line.strip().split(";")[0] in str(raised.value) for line in code.split("\n"))


def test_the_same_accesses_within_bounds(cache):
    writable, _, read_only = torch.arange(48, dtype=torch.int32).view(3, 16)
    code = """
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1+48];
        st.global.b32 [%d0+60], %r4;
        ret;"""
    launch(cache, code, writable, read_only, read_only=[1])
    assert writable[15] == 47


EXCHANGE = """
    shl.b32 %r1, %r0, 2;
    xor.b32 %r2, %r1, 128;
    st.shared.b32 [%r1+0], %r0;
    {barrier}
    ld.shared.b32 %r3, [%r2+0];
    {second}
    st.shared.b32 [%r1+0], %r3;
    ret;"""


@pytest.mark.parametrize(
    ("barrier", "second", "races"),
    [
        ("bar.sync 0;", "bar.sync 0;", False),
        ("", "bar.sync 0;", True),  # read before it is written
        ("bar.sync 0;", "", True),  # written before it is read
    ],
)
def test_shared_memory_needs_a_barrier(barrier, second, races, cache):
    """Threads of two warps exchange numbers."""
    code = EXCHANGE.format(barrier=barrier, second=second)
    if races:
        with pytest.raises(Fault, match="without a barrier"):
            launch(cache, code, threads=64, shared_bytes=256)
    else:
        launch(cache, code, threads=64, shared_bytes=256, grid=2)


@pytest.mark.parametrize(
    "code",
    [
        "sqrt.approx.f32 %r1, %r1;",
        "rsqrt.approx.ftz.f32 %r1, %r1;",
        "div.full.f32 %r1, %r1, %r1;",
        "add.rz.f32 %r1, %r1, %r1;",
        "mul.rn.ftz.f32 %r1, %r1, %r1;",
        "cvt.rn.bf16.f64 %h1, %d0;",
        "add.rn.f16 %h1, %h1, %h1;",
        "atom.global.add.u32 %r1, [%d0], 1;",
        "bar.sync 1;",
        "@%p0 bar.sync 0;",
        "ld.volatile.global.b32 %r1, [%d0];",
    ],
)
def test_what_is_not_known_names_itself(code, cache):
    with pytest.raises(NotImplementedError) as raised:
        launch(cache, f"{code}\nret;", torch.zeros(1))
    assert code in str(raised.value)


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        (".version 8.7", "without an entry"),
        (module(0, "ret;").replace(".reqntid 32", ""), "probe without .reqntid"),
        (module(0, "{ ret; }"), "no instruction: { ret; }"),
    ],
)
def test_what_is_no_kernel_raises(ptx, message, cache):
    with pytest.raises(NotImplementedError, match=message):
        Machine(ptx, 0, cache)


def test_a_fault_names_the_line_of_the_kernel(cache):
    code = ".loc 1 334 25 // adam.py:334:25\nld.global.b32 %r1, [%d0+4];\nret;"
    with pytest.raises(Fault, match=r"probe, adam\.py:334: .*ld\.global\.b32"):
        launch(cache, code, torch.zeros(1))


def test_regions_that_overlap_are_one():
    regions = [Region(8, 4, True), Region(0, 4, False), Region(10, 6, False), Region(30, 0, True)]
    assert disjoint(regions) == [Region(0, 4, False), Region(8, 8, True)]


def test_gcc_runs_once_per_kernel_and_version(tmp_path, monkeypatch):
    runs = []
    run = subprocess.run

    def counted(command, **options):
        runs.append(command)
        return run(command, **options)

    ptx_machine.compiler()
    monkeypatch.setattr(ptx_machine.subprocess, "run", counted)
    ptx = module(0, "ret;")
    Machine(ptx, 0, tmp_path)
    Machine(ptx, 0, tmp_path)
    assert len(runs) == 1
    Machine(module(0, "bar.sync 0;\nret;"), 0, tmp_path)
    Machine(ptx, 4, tmp_path)
    monkeypatch.setattr(ptx_machine, "compiler", lambda: "gcc 99.0")
    Machine(ptx, 0, tmp_path)
    assert len(runs) == 4
    assert {path.suffix for path in tmp_path.iterdir()} == {".so"}


def test_without_gcc_tests_are_skipped_and_say_so(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    case = "tests/numerics/test_kernel.py::test_neighbours_in_flat_buffers_are_one_row"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--ptx", "sm_90", case],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout
    assert "--ptx needs gcc 12 or newer on the PATH" in done.stdout
