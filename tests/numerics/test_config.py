"""Launch configurations: which mix has which, what reaches the compiler, and that no bit rests on
them.
"""

import os
import subprocess
import sys

import pytest
import torch
from process import ROOT
from training import parameters, results, same_bits, train

from fused_adam import FusedAdamW
from fused_adam_kernels import adam, config
from fused_adam_kernels.config import Config
from fused_adam_kernels.variants import MIXES, RECIPES

KINDS = {
    "fp32": "32-bit",
    "bf16": "16-bit",
    "fp16": "16-bit",
    "fp64": "64-bit",
    "bf16-fp32-state": "16-bit",
    "fp32-bf16-grad": "32-bit",
    "bf16-fp32-grad": "32-bit",
    "native-bf16": "random",
    "native-int8": "random",
    "master32-fp32": "16-bit",
    "split32-fp32": "16-bit",
    "split32-bf16": "random",
    "split24-bf16": "random",
    "sr-bf16": "random",
    "split24-int8": "random",
}


def test_every_mix_has_an_entry():
    mixes = {**MIXES, **RECIPES}
    assert {name: config.kind_of(*mix, False) for name, mix in mixes.items()} == KINDS
    assert {config.kind_of(*mix, amsgrad) for mix in mixes.values() for amsgrad in (0, 1)} == set(
        config.CONFIGS
    )


@pytest.mark.parametrize(
    "other",
    [
        Config(block=512, tail=128),
        Config(block=2048),
        Config(block=1024, num_warps=8, max_registers=80),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype, precision",
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "split24-int8")],
    ids=str,
)
def test_no_bit_rests_on_the_launch(dtype, precision, other, monkeypatch):
    def trained():
        params = parameters(
            dtype, [(2500,), (1,), (33,), (1024,)]
        )  # around a block, a vector and a group
        optimizer = FusedAdamW(
            params, lr=0.1, weight_decay=0.1, precision=precision, backend="triton"
        )
        train(optimizer, 2)
        return results(optimizer)

    usual = trained()
    monkeypatch.setattr(adam, "launch_config", lambda *mix: other)
    assert same_bits(usual, trained())


LAUNCH = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from fused_adam_kernels import adam, config, table

class Driver:  # all that compiling and launching ask of a GPU's driver
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 7
    get_device_properties = lambda self, device: {"max_shared_mem": 1 << 17}
    load_binary = lambda self, name, kernel, shared, device: (self, name, 0, 0, 1024)
    launcher_cls = lambda self, source, metadata: lambda *args: None
    utils = property(lambda self: self)

driver.set_active(Driver())
config.CONFIGS["random"] = config.Config(block=2048, tail=128, num_warps=8, max_registers=80)
bf16 = torch.bfloat16
for recipe in (("native", "native"), ("sr", "bf16")):
    update = adam.adam_step(bf16, bf16, *recipe, False)
    rows = torch.zeros(1, table.ROW, dtype=torch.int64)
    blocks = torch.zeros(1, 2, dtype=torch.int32)
    update(1, rows, blocks, torch.zeros(1, table.SCALARS))
    found = update.compiled.metadata
    names = dict(zip(adam.adam_kernel.arg_names[3:], update.constants))
    print(names["BLOCK"], names["TAIL"], found.num_warps, found.maxnreg)
    assert f".maxnreg {found.maxnreg}" in update.compiled.asm["ptx"] or found.maxnreg is None

Driver.get_current_target = lambda self: GPUTarget("hip", "gfx942", 64)
seen = {}
class Kernel:
    __getitem__ = lambda self, grid: lambda *args, **options: seen.update(options)
update.kernel, update.compiled = Kernel(), None
update(1)
print(*seen)
"""


def test_an_entry_reaches_the_compiler():
    """Elements per program and per turn, warps and registers; other vendors' compilers know no
    limit of registers.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    usual, changed, elsewhere = done.stdout.splitlines()
    assert usual == "1024 256 4 None" and changed == "2048 128 8 80"
    assert elsewhere == "num_warps enable_fp_fusion"
