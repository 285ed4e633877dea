"""The inspector sees what it promises to see: on a kernel that has every fault, and on its command
line.
"""

import os
import shutil
import subprocess
import sys

import pytest
from process import ROOT, outside_the_interpreter

FAULTS = """
import dataclasses, json
import triton, triton.language as tl
from fused_adam_kernels.inspect import inspect
from fused_adam_kernels.variants import Variant

compile_unfused = triton.compile

def compile_fused(*arguments, options, **others):
    return compile_unfused(*arguments, options=options | {"enable_fp_fusion": True}, **others)

@triton.jit
def kernel(x_ptr, y_ptr, d_ptr, FAULTY: tl.constexpr):
    offs = tl.arange(0, 1024)
    x = tl.load(x_ptr + offs, mask=offs < 1000)
    y = tl.load(y_ptr + offs, mask=offs < 1000)
    if FAULTY:
        z = x * y + tl.sqrt(x) / y
        tl.store(d_ptr + offs, z.to(tl.float64) * 3, mask=offs < 1000)
        # Neighbours come together: a conversion of layouts through shared memory.
        z = tl.reshape(tl.permute(tl.reshape(z, [32, 32]), [1, 0]), [1024])
    else:
        z = x * y + tl.fma(x, y, tl.div_rn(tl.sqrt_rn(x), y))  # asked for is not fused
    tl.store(x_ptr + offs, z, mask=offs < 1000)

types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "d_ptr": "*fp64"}
found = []
for target in ("sm_90", "sm_100", "gfx942"):
    for faulty in (False, True):
        triton.compile = compile_fused if faulty else compile_unfused
        variant = Variant(kernel, types, {"FAULTY": faulty}, 1024)
        found.append(dataclasses.asdict(inspect("faults", target, variant)))
print(json.dumps(found))
"""


def test_faults_show(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    found = outside_the_interpreter(str(tmp_path / "faults.py"))
    for clean, faulty in zip(found[::2], found[1::2], strict=True):
        assert (
            clean["sqrt"],
            clean["div"],
            clean["fused"],
            clean["fp64"],
            clean["shared_bytes"],
        ) == (
            "rn",
            "rn",
            0,
            0,
            0,
        )
        assert faulty["sqrt"].startswith("approx")
        assert (
            faulty["div"] != "rn" or faulty["target"] == "gfx942"
        )  # where every division is correctly rounded
        assert faulty["fp64"] > 0
        assert faulty["shared_bytes"] > 0
    nvidia = found[:4]
    assert [report["fused"] for report in nvidia] == [0, 8, 0, 8]  # 1024 elements over 128 threads


def command(*arguments, **environment):
    path = {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, "-m", "fused_adam_kernels.inspect", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **path, **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--arch", "sm_70"], {}, ["--arch 'sm_70'", "sm_90", "gfx942"]),
        (["--variant", "fp31"], {}, ["--variant 'fp31'", "bf16-fp32-state", "prologue"]),
        (["--card", "h200"], {}, ["--card 'h200'", "h100"]),
        (["--arch", "sm_80", "--run"], {}, ["--run", "needs sm_90"]),
        ([], {"TRITON_INTERPRET": "1"}, ["TRITON_INTERPRET", "allowed: unset"]),
        (["--arch", "sm_90", "--variant", "fp32"], {"TRITON_CACHE_DIR": "/proc/x"}, ["/proc/x"]),
    ],
)
def test_errors_are_one_line_that_names_what_is_allowed(arguments, environment, words):
    code, output, errors = command(*arguments, **environment)
    assert code == 1 and not output
    assert len(errors.splitlines()) == 1
    assert all(word in errors for word in words)


def test_the_table_has_one_line_per_variant_and_target():
    code, output, errors = command("--arch", "sm_90", "gfx942", "--variant", "norm-fp32")
    assert code == 0, errors
    version, header, *lines = output.splitlines()
    assert version.startswith("triton ")
    assert header.split()[:3] == ["kernel", "target", "regs"]
    assert [line.split()[:2] for line in lines] == [["norm-fp32", "sm_90"], ["norm-fp32", "gfx942"]]


def test_execution_without_a_checkout_says_so(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "lib" / "site-packages")
    code, output, errors = command("--run", PYTHONPATH=str(tmp_path / "lib" / "site-packages"))
    assert code == 1 and not output
    assert errors.startswith("--run needs a checkout") and str(tmp_path) in errors
