"""Faults planted in what was compiled: each must be noticed where the kernels step next to the
reference. Without a fault they agree.
"""

import re

import pytest
import torch
import triton
import triton.language as tl
from ptx_machine import Fault
from training import parameters, results, same_bits, train

from fused_adam import FusedAdamW
from fused_adam_kernels import adam, norm, scalars

pytestmark = pytest.mark.ptx

KERNELS = [adam.adam_kernel, norm.square_sum_kernel, norm.total_kernel, scalars.prologue_kernel]


@pytest.fixture
def fresh(ptx_driver):
    """Kernels are loaded again, before and after."""
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield ptx_driver
    for kernel in KERNELS:
        kernel.device_caches.clear()


def plant(driver, monkeypatch, kernel, old, new):
    """Change the PTX of one kernel, wherever the pattern `old` is."""
    load = driver.machine

    def machine(ptx, shared_bytes):
        if f".entry {kernel}(" in ptx:
            ptx, count = re.subn(old, new, ptx)
            assert count, f"nothing to change: {old}"
        return load(ptx, shared_bytes)

    monkeypatch.setattr(driver, "machine", machine)


def agree(dtype=torch.float32, **options):
    """Whether kernels and reference have the same bits after two steps."""
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    shapes = [(1000,), (33,), (1024,)]
    rows = []
    for backend in ("triton", "reference"):
        optimizer = FusedAdamW(parameters(dtype, shapes), backend=backend, **options)
        train(optimizer, 2)
        rows.append(results(optimizer))
    return same_bits(*rows)


INT8 = {"precision": "native-int8"}
CLIP = {"max_grad_norm": 0.5}
CAUTIOUS = {"cautious": True, "skip_grad_norm": 1e6}
AVERAGED = {"ema_decay": 0.9}


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, INT8, CLIP, CAUTIOUS, AVERAGED], ids=str
)
def test_nothing_planted(options, fresh):
    assert agree(**options)


def test_fused_multiply_adds(fresh, monkeypatch):
    """Round once where the formula rounds twice."""
    run = triton.runtime.jit.JITFunction.run

    def fused(self, *args, **options):
        return run(self, *args, **{**options, "enable_fp_fusion": True})

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", fused)
    assert not agree()


@pytest.mark.parametrize(
    ("kernel", "old", "new", "options"),
    [
        ("adam_kernel", r"add\.rn\.f32", "sub.rn.f32", {}),
        ("adam_kernel", r"max\.NaN\.f32", "min.NaN.f32", {"amsgrad": True}),
        ("adam_kernel", r"mul\.hi\.u32", "mul.lo.u32", INT8),
        ("prologue_kernel", r"sqrt\.rn\.f64 (.*), (.*);", r"mov.b64 \1, \2;", {}),
        ("square_sum_kernel", r"add\.rn\.f64", "sub.rn.f64", CLIP),
    ],
)  # fmt: skip
def test_other_arithmetic(kernel, old, new, options, fresh, monkeypatch):
    plant(fresh, monkeypatch, kernel, old, new)
    try:
        same = agree(**options)
    except Fault:  # Triton 3.9: threads that store one sum together no longer have the same one
        same = False
    assert not same


@pytest.mark.parametrize("old", [r"sqrt\.rn\.f32", r"div\.rn\.f32"])
def test_an_approximate_root_or_division(old, fresh, monkeypatch):
    approximate = old.replace("rn", "approx.ftz").replace("\\", "")
    plant(fresh, monkeypatch, "adam_kernel", old, approximate)
    with pytest.raises(NotImplementedError, match=rf"{approximate} .*\(formula\.py"):
        agree()


def test_a_mask_that_lets_one_element_too_many_pass(fresh, monkeypatch):
    """It writes behind the last element of a parameter."""
    plant(fresh, monkeypatch, "adam_kernel", r"setp\.lt\.s64", "setp.le.s64")
    with pytest.raises(Fault, match=r"adam_kernel, adam\.py:\d+: an address that the launch may"):
        agree()


@pytest.mark.parametrize(
    ("kernel", "options"),
    [("square_sum_kernel", CLIP), ("total_kernel", CLIP), ("adam_kernel", INT8)],
)
def test_a_missing_barrier(kernel, options, fresh, monkeypatch):
    plant(fresh, monkeypatch, kernel, r"bar\.sync\s+0;", "")
    with pytest.raises(Fault, match="without a barrier"):
        agree(**options)


@triton.jit(do_not_specialize=["address"])
def ramp_kernel(memory_ptr, address: tl.int64, N: tl.constexpr, HINT: tl.constexpr):
    """Write 0, 1, ..., N - 1 from an address on, which promises to be a multiple of HINT bytes."""
    start = tl.multiple_of(address.to(memory_ptr.dtype), HINT)
    offs = tl.arange(0, N)
    tl.store(start + offs, offs)


NO_FUSION = {"enable_fp_fusion": False}  # said outright: Triton 3.9 warns of its default


def test_an_alignment_hint_that_lies(ptx_driver):
    """The promise of 16 bytes makes vector stores, which the address does not allow."""
    memory = torch.zeros(1028, dtype=torch.int32)
    aligned, misaligned = memory.data_ptr(), memory[1:].data_ptr()
    assert aligned % 16 == 0
    ramp_kernel[(1,)](memory, aligned, N=1024, HINT=16, **NO_FUSION)
    assert torch.equal(memory[:1024], torch.arange(1024, dtype=torch.int32))
    ramp_kernel[(1,)](memory, misaligned, N=1024, HINT=4, **NO_FUSION)
    assert torch.equal(memory[1:1025], torch.arange(1024, dtype=torch.int32))
    with pytest.raises(Fault, match="a misaligned address"):
        ramp_kernel[(1,)](memory, misaligned, N=1024, HINT=16, **NO_FUSION)
