"""The launch path up to the driver, without a GPU: what is compiled, what the driver gets."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
DRIVER = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from fused_adam_kernels import adam, norm, scalars, table

class Driver:  # all that compiling and launching ask of a GPU's driver
    launched = []
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 7
    get_device_properties = lambda self, device: {"max_shared_mem": 1 << 17}
    load_binary = lambda self, name, kernel, shared, device: (self, name, 0, 0, 1024)
    launcher_cls = lambda self, source, metadata: lambda *args: self.launched.append(args)
    utils = property(lambda self: self)

driver.set_active(Driver())
"""
LAUNCH = (
    DRIVER
    + """
kernels = [scalars.prologue_kernel, norm.square_sum_kernel, norm.total_kernel, adam.adam_kernel]
jit_launches = []
for kernel in kernels:
    kernel.pre_run_hooks.append(lambda *args, **options: jit_launches.append(args))

f32, bf16 = torch.float32, torch.bfloat16
mixes = [
    (f32, f32, "native", "native"),
    (bf16, bf16, "native", "native"),
    (bf16, f32, "split24", "int8"),
]
prologue, total = scalars.prologue(), norm.total()
updates = [adam.adam_step(*mix, False) for mix in mixes]
norms = [norm.square_sum(grad) for grad in (torch.float32, torch.bfloat16)]
zeros, zeros64 = torch.zeros, lambda *shape: torch.zeros(shape, dtype=torch.float64)
sent = []
for rows in (1, 2, 16, 1000):
    table_of_rows = torch.zeros(rows, table.ROW, dtype=torch.int64)
    values = zeros(rows, table.SCALARS)
    hyper, flags, stats = zeros64(2, table.HYPER), zeros(9), zeros64(table.STATS)
    # The flag and the scale are the user's own: anywhere in memory.
    found_inf, scale = flags[rows % 4:], flags[4:]
    programs = scalars.programs(rows)
    prologue(programs, table_of_rows, hyper, values, found_inf, scale, zeros64(1), stats, rows)
    for blocks in (1, 2, 16, 1000):
        for update in updates:
            update(blocks, table_of_rows, torch.zeros(blocks, 2, dtype=torch.int32), values)
        for launch in norms:
            launch(blocks, table_of_rows, torch.zeros(blocks, 3, dtype=torch.int32), zeros64(rows))
    total(1, zeros64(rows), zeros64(1), rows)

everything = [prologue, total, *updates, *norms]
print(json.dumps({
    "jit launches": len(jit_launches),
    "launches": len(Driver.launched),
    "grids": sorted({args[:3] for args in Driver.launched}),
    "streams": sorted({args[3] for args in Driver.launched}),
    "variants": len({id(launcher.compiled) for launcher in everything}),
    "launchers": len(everything),
    # Behind grid, stream, function, metadata and hooks: every argument of the kernel, constants
    # included.
    "arguments": [
        {len(args) - 9 for args in Driver.launched if args[4] == kernel.__name__}
        == {len(kernel.arg_names)}
        for kernel in kernels
    ],
    # Triton 3.6 hints at strings that are constants, too.
    "prologue's aligned": [
        kernels[0].arg_names[i]
        for (i,), hints in prologue.compiled.src.attrs.items()
        if hints and (i,) not in prologue.compiled.src.constants
    ],
    # Those of the updates are sums; test_codegen counts them.
    "fma": sum("fma" in x.compiled.asm["ptx"] for x in (prologue, total, *norms)),
}))
"""
)


def test_kernels_are_compiled_once_and_then_launched_directly():
    """One variant per dtype mix, whatever the sizes, steps and places of the user's tensors; no
    argument is lost.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {
        "jit launches": 7,
        "launches": 4 * (1 + 4 * 5 + 1),
        "grids": [[1, 1, 1], [2, 1, 1], [8, 1, 1], [16, 1, 1], [1000, 1, 1]],
        "streams": [7],
        "variants": 7,
        "launchers": 7,
        "arguments": [True] * 4,
        "prologue's aligned": ["rows_ptr", "hyper_ptr", "scalars_ptr", "stats_ptr"],
        "fma": 0,
    }


HASHES = (
    DRIVER
    + """
rows, scalar_table = torch.zeros(1, table.ROW, dtype=torch.int64), torch.zeros(1, table.SCALARS)
hyper = torch.zeros(1, table.HYPER, dtype=torch.float64)
stats = torch.zeros(table.STATS, dtype=torch.float64)
sums, flags = torch.zeros(1, dtype=torch.float64), torch.zeros(1)
prologue, square_sum = scalars.prologue(), norm.square_sum(torch.float32)
update = adam.adam_step(torch.float32, torch.float32, "native", "native", False)
prologue(1, rows, hyper, scalar_table, flags, flags, sums, stats, 1)
square_sum(1, rows, torch.zeros(1, 3, dtype=torch.int32), sums)
update(1, rows, torch.zeros(1, 2, dtype=torch.int32), scalar_table)
print(json.dumps([launcher.compiled.hash for launcher in (prologue, square_sum, update)]))
"""
)


def test_a_kernel_compiled_for_other_tables_is_not_taken_from_the_cache(tmp_path):
    """An upgrade may add a column: the kernel compiled before it reads the wrong ones.

    Triton's cache key holds a kernel's text, but not the numbers that the text reads in table.py.
    """

    def hashes(folder):
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-c", HASHES], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    for name in ("same", "wider"):
        shutil.copytree(ROOT / "kernels", tmp_path / name)
    path = tmp_path / "wider" / "fused_adam_kernels" / "table.py"
    path.write_text(path.read_text().replace("ROW = 16", "ROW = 17"))
    today = hashes(ROOT / "kernels")
    assert hashes(tmp_path / "same") == today
    assert not set(hashes(tmp_path / "wider")) & set(today)
