"""skip_grad_norm: a step whose global gradient norm is above a limit changes nothing."""

import copy
import io
import math
import pickle

import pytest
import torch
from recipes import BF16, members, trained
from torch import nn
from training import gradient, parameters, results, same_bits

from fused_adam import FusedAdam, FusedAdamW

SHAPES = [(5,), (3, 4), (2000,)]
every_backend = pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
kernel_or_not = pytest.mark.parametrize("backend", ["reference", "triton"])
numpys_warnings = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def step(optimizer, number, scale=1.0):
    for index, p in enumerate(members(optimizer)):
        grad = gradient(p, index, number) * scale
        p.grad = grad if p.grad is None else p.grad.copy_(grad)
    optimizer.step()


def norm_of(number, scale=1.0):
    grads = [
        gradient(p, i, number) * scale for i, p in enumerate(parameters(torch.float32, SHAPES))
    ]
    return torch.cat([grad.double().flatten() for grad in grads]).norm().item()


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("flatten", [False, True])
@every_backend
def test_a_spike_leaves_no_trace(backend, flatten, options, kind):
    """Neither in parameters, nor in moments, nor in counters; and its norm is told."""
    limit = 3 * norm_of(0)
    if kind == "tensor":
        limit = torch.tensor(limit)
    make = {"lr": 1e-2, "weight_decay": 0.1, **options}
    optimizer = FusedAdamW(
        parameters(torch.float32, SHAPES),
        skip_grad_norm=limit,
        backend=backend,
        flatten=flatten,
        **make,
    )
    for number, scale in ((0, 1.0), (9, 10.0), (1, 1.0), (8, 4.0), (2, 1.0)):
        step(optimizer, number, scale)
        assert optimizer.grad_norm.item() == pytest.approx(norm_of(number, scale), rel=1e-6)
    expected = FusedAdamW(parameters(torch.float32, SHAPES), **make)
    for number in range(3):
        step(expected, number)
    assert same_bits(results(optimizer), results(expected))
    assert optimizer.skipped_steps == 2 and optimizer.skipped_steps.dtype == torch.int64


def one(limit, backend, grad=(3.0, 4.0), **options):
    """An optimizer over two elements, whose gradient has a norm of exactly 5, after a step."""
    param = nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([param], skip_grad_norm=limit, backend=backend, **options)
    param.grad = torch.tensor(grad)
    optimizer.step()
    return optimizer


@kernel_or_not
@pytest.mark.parametrize("as_tensor", [False, True])
def test_only_larger_norms_are_skipped(backend, as_tensor):
    """Not the limit itself, in float64: the next smaller number is too small."""
    for limit, skipped in ((5.0, 0), (math.nextafter(5.0, 0), 1), (math.inf, 0), (1e-300, 1)):
        if as_tensor:
            limit = torch.tensor(limit, dtype=torch.float64)
        optimizer = one(limit, backend)
        assert optimizer.skipped_steps == skipped and optimizer.grad_norm == 5
        assert (members(optimizer)[0] == 1).all() == bool(skipped)


@numpys_warnings
@kernel_or_not
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])  # whose square is no float32
@pytest.mark.parametrize("limit", [10.0, math.inf, torch.tensor(10.0), torch.tensor(math.inf)])
def test_norms_that_are_not_finite_are_skipped_too(backend, limit, bad):
    optimizer = one(limit, backend, (1.0, bad))
    assert optimizer.skipped_steps == 1 and (members(optimizer)[0] == 1).all()


@numpys_warnings
@kernel_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16, torch.float16], ids=str)
def test_a_tensor_may_have_any_value(backend, dtype):
    """A negative one skips every step. NaN skips no finite norm: no comparison with it is true."""
    limit = torch.tensor(math.inf, dtype=dtype)
    optimizer = one(limit, backend)
    before = 0
    for value, grad, skips in (
        (-1.0, 3.0, True),
        (-1.0, 0.0, True),
        (0.0, 3.0, True),
        (0.0, 0.0, False),
        (-math.inf, 3.0, True),
        (math.nan, 3.0, False),
        (math.nan, math.nan, True),
        (0.0, math.nan, True),
        (8.0, 3.0, False),
    ):
        limit.fill_(value)
        members(optimizer)[0].grad.fill_(grad)
        optimizer.step()
        assert optimizer.skipped_steps - before == skips, (value, grad)
        before = int(optimizer.skipped_steps)


@kernel_or_not
def test_the_norm_spans_groups_and_dtypes_and_a_skip_counts_once(backend):
    limit = torch.tensor(1.0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    groups = [{"params": parameters(dtype, [(30,)])} for dtype in dtypes]
    optimizer = FusedAdam(groups, skip_grad_norm=limit, backend=backend)
    step(optimizer, 0)
    assert optimizer.skipped_steps == 1 and {r["step"].item() for r in results(optimizer)} == {0}
    limit.fill_(1e3)
    step(optimizer, 1)
    assert optimizer.skipped_steps == 1 and {r["step"].item() for r in results(optimizer)} == {1}


@kernel_or_not
def test_the_norm_is_of_unscaled_gradients(backend):
    """Under a GradScaler, which leaves its scale and flag to the step."""
    optimizer = one(6.0, backend)
    assert optimizer._step_supports_amp_scaling
    optimizer.grad_scale = torch.tensor(1024.0)
    members(optimizer)[0].grad.mul_(1024)
    optimizer.step()
    assert optimizer.skipped_steps == 0 and optimizer.grad_norm == 5
    optimizer.found_inf = torch.ones(())
    members(optimizer)[0].grad.mul_(2)
    optimizer.step()
    assert optimizer.skipped_steps == 1


@kernel_or_not
def test_reduce_norm_decides(backend):
    """As if three other processes held as much: the norm is twice what is here."""
    optimizer = one(6.0, backend)
    optimizer.reduce_norm = lambda total: 4 * total
    optimizer.step()
    assert optimizer.grad_norm == 10 and optimizer.skipped_steps == 1


def test_a_step_without_gradients():
    """Nothing runs a prologue then."""
    limit = torch.tensor(-1.0)
    for options in ({}, {"backend": "triton"}, {"flatten": True}):
        optimizer = FusedAdam([nn.Parameter(torch.ones(3))], skip_grad_norm=limit, **options)
        optimizer.step()
        assert optimizer.grad_norm == 0 and optimizer.skipped_steps == 1
        optimizer = FusedAdam([nn.Parameter(torch.ones(3))], skip_grad_norm=1.0, **options)
        optimizer.step()
        assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("precision", ["split24-int8", "sr-bf16", "master32-fp32"])
@kernel_or_not
def test_recipes_keep_every_stored_bit(precision, backend):
    optimizer = trained(precision, 1, backend=backend, skip_grad_norm=1e3)
    before = results(optimizer)
    step(optimizer, 7, 1e4)
    assert same_bits(results(optimizer), before) and optimizer.skipped_steps == 1
    step(optimizer, 1)
    assert same_bits(results(optimizer), results(trained(precision, 2)))


def test_nothing_waits_and_one_value_is_copied(monkeypatch):
    """The kernel reads the limit on the device: a copy of one number, for any number of groups."""
    from fused_adam.backends import triton as device

    copies = []
    copy_all = device.staging.copy_all
    monkeypatch.setattr(
        device.staging,
        "copy_all",
        lambda targets, sources: (copies.append(len(targets)), copy_all(targets, sources)),
    )
    groups = [{"params": [p]} for p in parameters(torch.float32, SHAPES)]
    optimizer = FusedAdam(groups, skip_grad_norm=torch.tensor(1e3), backend="triton")
    step(optimizer, 0)
    assert copies == [1]


def test_copies_have_a_limit_of_their_own():
    limit = torch.tensor(1e3)
    optimizer = one(limit, "reference")
    assert optimizer.skip_grad_norm is limit
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
        torch.load(file, weights_only=False),
    ):
        assert copied.skip_grad_norm is not limit
        copied.skip_grad_norm.fill_(-1.0)
        members(copied)[0].grad = torch.ones(2)
        copied.step()
        assert copied.skipped_steps == 1
    assert limit == 1e3 and copy.copy(optimizer).skip_grad_norm is limit
    assert FusedAdam([torch.zeros(1)]).skip_grad_norm is None
    assert "skip_grad_norm: 2.0\n" in repr(FusedAdam([torch.zeros(1)], skip_grad_norm=2))


WRONG = r"must be a number above 0, a float tensor of shape \(\) on the parameters' device, or None"


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1.0, math.nan, -math.inf, "1", True, [1.0], 1j, 10**400),
        *(torch.ones(1), torch.tensor(1), torch.tensor(True), torch.tensor(1j)),
        torch.ones((), device="meta"),
    ],
    ids=str,
)
def test_what_is_no_limit_is_refused(value):
    with pytest.raises(ValueError, match=f"skip_grad_norm=.* {WRONG}"):
        FusedAdam([torch.zeros(1)], skip_grad_norm=value)


@pytest.mark.parametrize("value", [2.0, torch.tensor(0.0)])
def test_a_differentiable_step_cannot_skip(value):
    with pytest.raises(ValueError, match=r"skip_grad_norm=.* cannot be combined with differ"):
        FusedAdam([torch.zeros(1)], skip_grad_norm=value, differentiable=True)
