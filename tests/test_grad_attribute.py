"""Where gradients come from: `grad_dtype`, which lets `.grad` have another dtype."""

import pytest
import torch
from training import gradient, parameters, results, same_bits

from fused_adam import FusedAdamW, step_in_backward

SHAPES = [(5,), (33, 3), (), (0, 3), (129,)]
FP32, BF16 = torch.float32, torch.bfloat16


def backward(params, step):
    """Two backward passes, whose gradients autograd adds up."""
    for part in (2 * step, 2 * step + 1):
        sum((p * gradient(p, i, part)).sum() for i, p in enumerate(params)).backward()


def added(param, index, step):
    """The float32 sum of the same two gradients."""
    return sum(gradient(param, index, part).float() for part in (2 * step, 2 * step + 1))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"max_grad_norm": 0.1}, {"precision": "split32"}], ids=str)
def test_grad_dtype_accumulates_in_float32(options, early):
    """Set before the optimizer is made or after; each as if somebody had set the float32 sums by hand."""
    params, others = parameters(BF16, SHAPES), parameters(BF16, SHAPES)

    def widen():
        for p in params:
            p.grad, p.grad_dtype = None, FP32

    if early:
        widen()
    optimizer, plain = (
        FusedAdamW(params, lr=1e-2, **options),
        FusedAdamW(others, lr=1e-2, **{**options, "flatten": False}),
    )
    if not early:
        widen()
    for step in range(3):
        backward(params, step)
        assert all(p.grad.dtype == FP32 for p in params)
        for i, p in enumerate(others):
            p.grad_dtype = None
            p.grad = added(p, i, step)
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
    assert all(p.grad is None for p in params)
    assert same_bits(results(optimizer), results(plain))


def test_grad_dtype_with_steps_inside_backward():
    params, others = parameters(BF16, SHAPES), parameters(BF16, SHAPES)
    optimizer, plain = FusedAdamW(params, lr=1e-2), FusedAdamW(others, lr=1e-2)
    handle = step_in_backward(params, optimizer)
    for p in params:
        p.grad_dtype = FP32
    for step in range(3):
        with handle.accumulate():
            sum((p * gradient(p, i, 2 * step)).sum() for i, p in enumerate(params)).backward()
        sum((p * gradient(p, i, 2 * step + 1)).sum() for i, p in enumerate(params)).backward()
        optimizer.step()
        for i, p in enumerate(others):
            p.grad_dtype = None
            p.grad = added(p, i, step)
        plain.step()
    assert same_bits(results(optimizer), results(plain))
