"""Where gradients come from: `grad_dtype`, which lets `.grad` have another dtype, and
`grad_attribute`.
"""

import copy
import pickle

import pytest
import torch
from training import gradient, parameters, results, same_bits

from fused_adam import FusedAdam, FusedAdamW, step_in_backward

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
@pytest.mark.parametrize(
    "options", [{}, {"flatten": True}, {"max_grad_norm": 0.1}, {"precision": "split32"}], ids=str
)
def test_grad_dtype_accumulates_in_float32(options, early):
    """Set before the optimizer is made or after; each as if somebody had set the float32 sums by
    hand.
    """
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


every_attribute = pytest.mark.parametrize("name", ["main_grad", "decoupled_grad"])


def members(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def pair(name, dtype=FP32, **options):
    """Equal optimizers, of which the second reads `grad`."""
    both = ({"grad_attribute": name}, {})
    return [
        FusedAdamW(parameters(dtype, SHAPES), lr=1e-2, weight_decay=0.1, **options, **each)
        for each in both
    ]


def step_both(optimizer, plain, steps, dtype=None, skip=()):
    """The same gradients for both; `skip`: parameters that have none."""
    name = optimizer._grad_attribute
    for step in steps:
        for i, (p, other) in enumerate(zip(members(optimizer), members(plain), strict=True)):
            other.grad_dtype = None
            grad = None if i in skip else gradient(p, i, step, dtype)
            setattr(p, name, grad)
            other.grad = grad
        optimizer.step()
        plain.step()
    assert same_bits(results(optimizer), results(plain))


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.1}, {"precision": "split24-int8"}], ids=str
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
@every_attribute
def test_float32_gradients_of_bfloat16_parameters(name, backend, options):
    optimizer, plain = pair(name, BF16, backend=backend, **options)
    step_both(optimizer, plain, range(3), FP32)
    if options.get("max_grad_norm"):
        assert torch.equal(optimizer.grad_norm, plain.grad_norm) and optimizer.grad_norm > 0


@every_attribute
def test_grad_is_ignored(name):
    optimizer, plain = pair(name, backend="triton")
    for p in members(optimizer):
        p.grad = torch.full_like(p, 7.0)
    step_both(optimizer, plain, range(2))
    for p in members(optimizer):
        p.grad = None
    step_both(optimizer, plain, range(2, 4))


@every_attribute
def test_none_and_absent_are_no_gradient(name):
    """Also when patterns come and go, and what had none gets one."""
    optimizer, plain = pair(name)
    for p in members(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()  # no attribute anywhere
    assert not optimizer.state
    for number, skip in enumerate([(0, 3), (), (1,), (0, 3), (1,), ()]):
        step_both(optimizer, plain, [number], skip=skip)


def test_gradients_in_one_buffer():
    """As in Megatron: views of a flat float32 buffer, added to in place and zeroed in place."""
    optimizer, plain = pair("main_grad", BF16)
    sizes = [p.numel() for p in members(optimizer)]
    buffer = torch.zeros(sum(sizes) + 1)
    views = [
        part.view(p.shape)
        for part, p in zip(buffer[1:].split(sizes), members(optimizer), strict=True)
    ]

    def add(param):
        param.main_grad.add_(param.grad)
        param.grad = None

    for p, view in zip(members(optimizer), views, strict=True):
        p.main_grad = view
        p.register_post_accumulate_grad_hook(add)
    for step in range(3):
        backward(members(optimizer), step)
        for i, p in enumerate(members(plain)):
            p.grad_dtype = None
            p.grad = added(p, i, step)
        optimizer.step()
        plain.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        assert all(p.main_grad is view for p, view in zip(members(optimizer), views, strict=True))
        assert not buffer.any()
    assert same_bits(results(optimizer), results(plain))


def test_zero_grad_of_decoupled_gradients():
    (optimizer, _), names = pair("decoupled_grad"), ("decoupled_grad", "grad")
    optimizer.zero_grad()
    for set_to_none in (False, True):
        grads = [[torch.ones_like(p) for p in members(optimizer)[1:]] for _ in names]
        for name, values in zip(names, grads, strict=True):
            for p, grad in zip(members(optimizer)[1:], values, strict=True):
                setattr(p, name, grad)
        optimizer.zero_grad(set_to_none)
        for name, values in zip(names, grads, strict=True):
            for p, grad in zip(members(optimizer)[1:], values, strict=True):
                assert getattr(p, name) is (None if set_to_none else grad)
                assert grad.eq(1).all() if set_to_none else not grad.any()
    assert not hasattr(members(optimizer)[0], "decoupled_grad")


def test_skip_nonfinite_looks_there():
    optimizer, plain = pair("main_grad", skip_nonfinite=True)
    for p in members(optimizer):
        p.grad = torch.full_like(p, float("nan"))
    step_both(optimizer, plain, range(2))
    for each, name in ((optimizer, "main_grad"), (plain, "grad")):
        getattr(members(each)[1], name)[2, 1] = float("inf")
        before = results(each)
        each.step()
        assert same_bits(results(each), before) and each.skipped_steps == 1


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_survives_copies_and_checkpoints(duplicate):
    optimizer, plain = pair("main_grad")
    step_both(optimizer, plain, range(2))
    twin = duplicate(optimizer)
    step_both(twin, plain, [2])
    twin.load_state_dict(plain.state_dict())
    step_both(twin, plain, [3])


@pytest.mark.parametrize("cls", [FusedAdam, FusedAdamW])
def test_refusals(cls):
    params = parameters(FP32, SHAPES)
    for wrong in ("gradient", None, 3):
        with pytest.raises(ValueError, match="allowed: 'grad', 'main_grad', 'decoupled_grad'"):
            cls(params, grad_attribute=wrong)
    for other in ("flatten", "differentiable"):
        with pytest.raises(
            ValueError, match=f"grad_attribute='main_grad' cannot be combined with {other}=True"
        ):
            cls(params, grad_attribute="main_grad", **{other: True})
    optimizer = cls(params, grad_attribute="decoupled_grad")
    with pytest.raises(
        ValueError, match="grad_attribute='decoupled_grad' cannot be combined with step_in_backward"
    ):
        step_in_backward(params, optimizer)
    params[1].decoupled_grad = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"gradient of parameter 1 \(group 0\) is torch.float32 of shape \(3,\)"
    ):
        optimizer.step()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("elsewhere_too", [False, True])
def test_a_grad_scaler_is_refused_before_anything_changes(unscale, elsewhere_too):
    """With and without a `grad` beside the attribute, which is all that the scaler sees."""
    optimizer, scaler = pair("main_grad")[0], torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for i, p in enumerate(members(optimizer)):
        p.main_grad = gradient(p, i, 0)
        p.grad = p.main_grad.clone() if elsewhere_too else None
    before = results(optimizer)
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(
        RuntimeError, match="a GradScaler cannot be combined with grad_attribute='main_grad'"
    ):
        scaler.step(optimizer)
    assert same_bits(results(optimizer), before) and not optimizer.state
