"""What the compiler makes of the kernels for a GPU: compiled here without one, for sm_90, in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMPILE = """
import collections, json, re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fused_adam_kernels import adam, scalars

def count(kernel, signature, constants):
    names = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(key),): value for key, value in constants.items()}, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    instructions = re.findall(r"^\\s*(?:@%p\\d+ )?([a-z][\\w.]*)", ptx, re.M)
    return dict(collections.Counter(instructions))

result = {}
for name, (p, g, s, amsgrad) in {
    "fp32": (torch.float32, torch.float32, torch.float32, False),
    "fp32-amsgrad": (torch.float32, torch.float32, torch.float32, True),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
    "bf16-fp32-state": (torch.bfloat16, torch.bfloat16, torch.float32, False),
    "fp32-bf16-grad": (torch.float32, torch.bfloat16, torch.float32, False),
    "fp16": (torch.float16, torch.float16, torch.float16, False),
    "fp64": (torch.float64, torch.float64, torch.float64, True),
}.items():
    wide = "fp64" if p == torch.float64 else "fp32"
    result[name] = count(
        adam.adam_kernel,
        {"rows_ptr": "*i64", "blocks_ptr": "*i32", "scalars_ptr": f"*{wide}"},
        {**dict(zip(("PARAM", "GRAD", "STATE"), map(adam.TYPES.get, (p, g, s)))),
         **dict(zip(("PARAM_HINT", "GRAD_HINT", "STATE_HINT"), adam.hints(p, g, s))),
         "AMSGRAD": amsgrad, "BLOCK": 1024, "TAIL": 128},
    )
result["prologue"] = count(
    scalars.prologue_kernel,
    {"rows_ptr": "*i64", "hyper_ptr": "*fp64", "scalars_ptr": "*fp32", "found_inf_ptr": "*fp32",
     "grad_scale_ptr": "*fp32", "square_sum_ptr": "*fp64", "stats_ptr": "*fp64", "num_rows": "i32"}, {"BLOCK": 128},
)
print(json.dumps(result))
"""


def outside_the_interpreter(code):
    """Run in a process where triton compiles; returns the JSON it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ptx():
    """Instruction counts of every variant."""
    return outside_the_interpreter(COMPILE)


def count(instructions, start):
    return sum(number for name, number in instructions.items() if name.startswith(start))


VARIANTS = ["fp32", "fp32-amsgrad", "bf16", "bf16-fp32-state", "fp32-bf16-grad", "fp16", "fp64"]


@pytest.mark.parametrize("variant", [*VARIANTS, "prologue"])
def test_arithmetic_is_correctly_rounded(ptx, variant):
    """No fused multiply-adds, no approximate square root or division, nothing flushed to zero."""
    names = ptx[variant]
    assert not count(names, "fma")
    assert not [name for name in names if "approx" in name or "ftz" in name or "full" in name]
    assert count(names, "sqrt.rn") and count(names, "div.rn")


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_double_precision_in_the_update(ptx, variant):
    found = [name for name in ptx[variant] if "f64" in name]
    assert bool(found) == (variant == "fp64")


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_shared_memory_and_no_spills(ptx, variant):
    assert not [name for name in ptx[variant] if ".shared" in name or ".local" in name or name.startswith("bar")]


@pytest.mark.parametrize(
    ("variant", "loads", "stores"),
    [
        # 1024 elements over 128 threads are 8 each: per operand two 128-bit accesses in fp32, one in bf16.
        ("fp32", {"v4.b32": 8}, {"v4.b32": 6}),
        ("fp32-amsgrad", {"v4.b32": 10}, {"v4.b32": 8}),
        ("bf16", {"v4.b32": 4}, {"v4.b32": 3}),
        ("fp16", {"v4.b32": 4}, {"v4.b32": 3}),
        # Mixed: every operand takes 4 elements per access, so that no layout is converted.
        ("bf16-fp32-state", {"v4.b32": 4, "v2.b32": 4}, {"v4.b32": 4, "v2.b32": 2}),
        ("fp32-bf16-grad", {"v4.b32": 6, "v2.b32": 2}, {"v4.b32": 6}),
    ],
)
def test_widest_accesses_the_dtypes_allow(ptx, variant, loads, stores):
    for kind, expected in (("ld", loads), ("st", stores)):
        vectors = {
            name.split(".global.", 1)[1]: number
            for name, number in ptx[variant].items()
            if name.startswith(f"{kind}.global.v")
        }
        assert vectors == expected
