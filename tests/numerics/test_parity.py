"""FusedAdam against torch.optim.Adam(W), a float64 oracle, and itself on all backends."""

import functools
import itertools

import pytest
import torch
from training import MOMENTS, SHAPES, gradient, parameters, results, same_bits, train

from bench.harness import oracle
from bench.harness.oracle import Options
from fused_adam import FusedAdam, FusedAdamW

STEPS = 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DECAYS = {
    "none": {},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled": True},
}
# Small parameters with gaps of every size between their slots, or none.
SMALL = {
    "vectors": [(n,) for n in range(1, 400)],
    "matrices": [(n, 2) for n in range(1, 250)],
    "mixed": [(n, 2) if n % 40 == 0 else (n,) for n in range(1, 400)],
    "whole slots": 12 * [(32 * n,) for n in range(1, 17)],
}
CASES = [
    pytest.param(
        dtype,
        Options(amsgrad=amsgrad, maximize=maximize, **DECAYS[decay]),
        id=f"{dtype}-{decay}{flags}",
    )
    for dtype, decay, amsgrad, maximize in itertools.product(
        DTYPES, DECAYS, (False, True), (False, True)
    )
    for flags in [("-amsgrad" if amsgrad else "") + ("-maximize" if maximize else "")]
]


@functools.cache
def run(dtype, options, backend="reference", flatten=False, device="cpu"):
    optimizer = FusedAdam(
        parameters(dtype, device=device), backend=backend, flatten=flatten, **options.arguments()
    )
    train(optimizer, STEPS)
    return results(optimizer)


@functools.cache
def run_torch(dtype, options, **implementation):
    optimizer = torch.optim.Adam(parameters(dtype), **options.arguments(), **implementation)
    train(optimizer, STEPS)
    return results(optimizer)


def run_oracle(dtype, options):
    params = parameters(dtype)
    grads = [[gradient(p, i, step) for step in range(STEPS)] for i, p in enumerate(params)]
    return [oracle.adam(p.detach(), g, options) for p, g in zip(params, grads, strict=True)]


def assert_within(got, want, tolerance):
    for ours, theirs in zip(got, want, strict=True):
        for key in ours.keys() & theirs.keys() - {"step"}:
            error = (ours[key].double() - theirs[key].double()).abs()
            assert not error.numel() or error.max() <= tolerance[key], (
                f"{key} of shape {tuple(ours[key].shape)}"
            )


def assert_same(dtype, got, want):
    """Equal bits; for float64, which is outside that promise, within an ulp or two per step."""
    if dtype == torch.float64:
        ulps = {key: 4 * STEPS * torch.finfo(dtype).eps for key in ("param", *MOMENTS)}
        assert_within(got, want, ulps)
    else:
        assert same_bits(got, want)


@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_close_to_the_oracle(dtype, options):
    assert_within(
        run(dtype, options), run_oracle(dtype, options), oracle.tolerance(dtype, STEPS, options)
    )


@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_close_to_torch(dtype, options):
    ours, theirs = (oracle.tolerance(dtype, STEPS, options, roundings) for roundings in (1, 4))
    both = {key: ours[key] + theirs[key] for key in ours}
    for implementation in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        if dtype != torch.float64 or "fused" not in implementation:
            assert_within(run(dtype, options), run_torch(dtype, options, **implementation), both)


@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_flatten_gives_the_same_bits(dtype, options):
    assert same_bits(run(dtype, options, flatten=True), run(dtype, options))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_compiled_gives_the_same_bits(dtype, options, flatten):
    assert_same(dtype, run(dtype, options, "compiled", flatten), run(dtype, options))


@pytest.mark.parametrize("shapes", SMALL)
@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_small_parameters_share_a_page(backend, shapes):
    """More of them than one call joins."""
    shapes = SMALL[shapes]
    moved, expected = (
        FusedAdamW(parameters(torch.float32, shapes), lr=1e-2, **options)
        for options in ({"backend": backend}, {"flatten": True})
    )
    for optimizer in (moved, expected):
        train(optimizer, 2)
    assert same_bits(results(moved), results(expected))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_kernel_gives_the_same_bits(dtype, options, flatten, kernel_device):
    assert_same(dtype, run(dtype, options, "triton", flatten, kernel_device), run(dtype, options))


@pytest.mark.gpu
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_reference_on_a_gpu_gives_the_same_bits(dtype, options, flatten):
    """Slow and waiting for the device, but the same numbers: for comparing on the spot."""
    assert_same(dtype, run(dtype, options, "reference", flatten, "cuda"), run(dtype, options))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_gradients_of_another_dtype(param, grad, backend, flatten):
    """Equal to the same gradient in the parameter's dtype where that can hold it: bf16 numbers are
    in both.
    """
    runs = []
    for dtype in (grad, param):
        optimizer = FusedAdamW(parameters(param), backend=backend, flatten=flatten)
        for step in range(STEPS):
            for index, p in enumerate(optimizer.param_groups[0]["params"]):
                p.grad = None
                p.grad_dtype = dtype
                p.grad = gradient(p, index, step, torch.bfloat16).to(dtype)
            optimizer.step()
        runs.append(results(optimizer))
    assert_same(param, *runs)


def test_adamw_is_adam_with_decoupled_decay():
    a = FusedAdamW(parameters(torch.float32), weight_decay=0.1)
    b = FusedAdam(parameters(torch.float32), weight_decay=0.1, decoupled_weight_decay=True)
    train(a, STEPS)
    train(b, STEPS)
    assert same_bits(results(a), results(b))


def test_results_depend_on_the_gradients():
    """The comparisons above would pass on optimizers that do nothing."""
    start = parameters(torch.float32)
    assert all(
        not torch.equal(r["param"], p)
        for r, p in zip(run(torch.float32, Options()), start, strict=True)
        if p.numel()
    )
    assert [tuple(r["param"].shape) for r in run(torch.float32, Options())] == [
        tuple(s) for s in SHAPES
    ]
