"""max_grad_norm and skip_nonfinite: one norm, in one order, on every backend; the step equal to
torch's two calls.
"""

import copy
import math

import numpy
import pytest
import torch
from torch import nn
from training import SHAPES, gradient, parameters, results, same_bits, values

from fused_adam import FusedAdam, FusedAdamW
from fused_adam.numerics.norm import CHUNK, LANES, square_sum

every_backend = pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
flat_or_not = pytest.mark.parametrize("flatten", [False, True])
# Around a lane, a chunk, and two; with empty ones and scalars among them.
NORM_SHAPES = [*SHAPES, (LANES,), (LANES + 1,), (CHUNK - 1,), (CHUNK + LANES + 3,)]


def run(
    steps=3,
    scale=1.0,
    shapes=SHAPES,
    dtype=torch.float32,
    before_step=None,
    grads=gradient,
    **options,
):
    optimizer = FusedAdamW(parameters(dtype, shapes), lr=1e-2, **options)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for index, p in enumerate(optimizer.param_groups[0]["params"]):
            grad = grads(p, index, step) * scale
            p.grad = grad if p.grad is None else p.grad.copy_(grad)
        if before_step:
            before_step(optimizer)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return optimizer, norms


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@flat_or_not
@every_backend
def test_equal_to_clip_grad_norm_before_the_step(backend, flatten, max_norm):
    """The norm to float32 rounding, and results to what that rounding of the coefficient brings."""
    ours, norms = run(backend=backend, flatten=flatten, max_grad_norm=max_norm)
    expected = []

    def clip(optimizer):
        expected.append(nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm))

    theirs, _ = run(before_step=clip)
    torch.testing.assert_close(torch.stack(norms), torch.stack(expected), rtol=1e-6, atol=0)
    for got, want in zip(results(ours), results(theirs), strict=True):
        for key in got:
            torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-7)


@every_backend
def test_gradients_as_small_as_what_is_added_to_the_norm(backend):
    """torch divides by the norm plus 1e-6, here a fifth more than the norm."""
    options = {"scale": 1e-6, "shapes": [(5,), (3, 4)]}
    ours, _ = run(1, **options, backend=backend, max_grad_norm=1e-7)
    theirs, _ = run(
        1,
        **options,
        before_step=lambda o: nn.utils.clip_grad_norm_(o.param_groups[0]["params"], 1e-7),
    )
    for got, want in zip(results(ours), results(theirs), strict=True):
        for key in got:
            torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_everywhere(dtype):
    """Norm, coefficient and results do not depend on backend, flatten, or what a gradient's layout
    makes of a row.
    """
    baseline, norms = run(2, dtype=dtype, max_grad_norm=1.0)
    for backend in ("reference", "compiled", "triton"):
        for flatten in (False, True):
            other, other_norms = run(
                2, dtype=dtype, max_grad_norm=1.0, backend=backend, flatten=flatten
            )
            assert same_bits(results(other), results(baseline))
            assert torch.equal(torch.stack(other_norms), torch.stack(norms))


def test_the_kernels_sum_has_the_bits_of_the_reference(kernel_device):
    """Over sizes around a piece and a chunk, and over mixed dtypes: squares rounded to float32, and
    a sum as of float64.
    """
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    sums = []
    for backend, device in (("triton", kernel_device), ("reference", "cpu")):
        params = [
            parameters(dtypes[i % 3], [shape], device)[0] for i, shape in enumerate(NORM_SHAPES)
        ]
        for index, p in enumerate(params):
            p.grad = gradient(p, index, 0)
        optimizer = FusedAdam(params, backend=backend, max_grad_norm=1.0)
        optimizer.step()
        for runner in optimizer._engine.usual.runners:
            runner.begin(
                [p.grad for p in params], [p.grad.data_ptr() for p in params], capturing=False
            )
        sums.append([runner.square_sum().item() for runner in optimizer._engine.usual.runners])
    assert sums[0] == sums[1] and len(sums[0]) == 1
    squares = [x for p in params for x in p.grad.float().square().flatten().tolist()]
    # The errors that are kept are float32 sums of up to 63: off by 63 * 2^-24 of 2^-24.
    assert sums[0][0] == pytest.approx(math.fsum(squares), rel=63 * 2.0**-48)


def two_sum(total, error, x):
    """Knuth's, in the arithmetic of the numbers; returns the sum and `error` plus what it lost."""
    bigger = total + x
    part = bigger - total
    return bigger, error + ((total - (bigger - part)) + (x - part))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_order_of_the_sum_is_the_documented_one(dtype):
    """Lanes one after the other within a chunk, then by halving; chunks likewise. Written as plain
    loops.
    """
    assert (LANES, CHUNK) == (1024, 65536)
    grad = values((CHUNK + 5 * LANES + 7,), 6, dtype)
    number = numpy.float64 if dtype == torch.float64 else numpy.float32

    def halve(x):
        while len(x) > 1:
            x = [a + b for a, b in zip(x[: len(x) // 2], x[len(x) // 2 :], strict=True)]
        return x[0]

    partials = []
    for chunk in grad.split(CHUNK):
        lanes = [(number(0), number(0))] * LANES
        for i, x in enumerate(map(number, chunk.double().tolist())):
            total, error = lanes[i % LANES]
            exact = dtype == torch.float64
            lanes[i % LANES] = (total + x * x, error) if exact else two_sum(total, error, x * x)
        partials.append(halve([float(total) + float(error) for total, error in lanes]))
    assert square_sum([grad]).item() == halve(partials + [0.0] * (LANES - len(partials)))


@pytest.mark.parametrize(
    "grad",
    [torch.full((3 * CHUNK,), 0.1), values((3 * CHUNK + 11,), 3, torch.float32) * 1e-4],
    ids=["equal", "random"],
)
def test_float32_sums_are_as_good_as_in_float64(grad):
    """Plain ones are off by 1e-6 where all gradients are equal; and shards sum up to the whole."""
    exact = math.fsum(grad.square().tolist())
    assert square_sum([grad]).item() == pytest.approx(exact, rel=63 * 2.0**-48)
    parts = [square_sum([part]).item() for part in grad.tensor_split([7, 70_000, 70_001])]
    assert math.fsum(parts) == pytest.approx(exact, rel=63 * 2.0**-48)


def kernel_sum(grad, start, device):
    """The kernel's sum for a gradient that begins `start` elements into its memory."""
    memory = torch.empty(start + grad.numel(), dtype=grad.dtype, device=device)
    param = nn.Parameter(torch.zeros_like(memory)[start:])
    param.grad = memory[start:].copy_(grad)
    optimizer = FusedAdam([param], backend="triton", max_grad_norm=1.0)
    optimizer.step()
    return optimizer.grad_norm.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_sum_does_not_depend_on_alignment(dtype, kernel_device):
    """Vector accesses where the gradient is aligned, single ones elsewhere and at the end."""
    grad = values((CHUNK + 2 * LANES + 5,), 4, dtype)
    assert len({kernel_sum(grad, start, kernel_device) for start in (0, 1, 4)}) == 1


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@every_backend
def test_squares_overflow_as_in_torch(backend):
    """Finite gradients beyond 1.8e19: the norm is infinite, here as in torch."""
    ours, norms = run(1, scale=1e20, backend=backend, max_grad_norm=1.0)
    theirs, _ = run(
        1,
        scale=1e20,
        before_step=lambda o: nn.utils.clip_grad_norm_(o.param_groups[0]["params"], 1.0),
    )
    assert norms[0].isposinf()
    for got, want in zip(results(ours), results(theirs), strict=True):
        for key in got:
            torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-7)


@every_backend
def test_gradients_are_not_written(backend):
    optimizer, _ = run(1, backend=backend, max_grad_norm=0.1)
    for index, p in enumerate(optimizer.param_groups[0]["params"]):
        assert torch.equal(p.grad, gradient(p, index, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings(
    "ignore:.* encountered in:RuntimeWarning"
)  # numpy's, under the interpreter
@flat_or_not
@every_backend
def test_a_non_finite_norm_acts_as_in_torch(backend, flatten, bad):
    """error_if_nonfinite=False: an infinite norm gives zero gradients, a NaN gives NaN ones."""

    def poisoned(p, index, step):
        grad = gradient(p, index, step)
        if index == 4 and step == 1:
            grad.view(-1)[0] = bad
        return grad

    shapes = [(5,), (3, 4), (), (7,), (20,)]
    ours, norms = run(
        shapes=shapes, grads=poisoned, backend=backend, flatten=flatten, max_grad_norm=1.0
    )
    theirs, _ = run(
        shapes=shapes,
        grads=poisoned,
        before_step=lambda o: nn.utils.clip_grad_norm_(o.param_groups[0]["params"], 1.0),
    )
    assert not norms[1].isfinite()
    for got, want in zip(results(ours), results(theirs), strict=True):
        for key in got:
            torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@flat_or_not
@every_backend
def test_steps_with_non_finite_gradients_leave_no_trace(backend, flatten, max_norm, bad):
    """As if they had not been taken: parameters, moments and counters."""
    shapes = [(5,), (3, 4), (2000,)]

    def poisoned(p, index, step):
        grad = gradient(p, index, step)
        if (step, index) in ((0, 2), (2, 0)):
            grad.view(-1)[-1] = bad
        return grad

    options = {"shapes": shapes, "backend": backend, "flatten": flatten, "max_grad_norm": max_norm}
    ours, _ = run(5, grads=poisoned, skip_nonfinite=True, **options)
    expected = FusedAdamW(parameters(torch.float32, shapes), lr=1e-2, max_grad_norm=max_norm)
    for step in (1, 3, 4):
        for index, p in enumerate(expected.param_groups[0]["params"]):
            p.grad = gradient(p, index, step)
        expected.step()
    assert same_bits(results(ours), results(expected))
    assert ours.skipped_steps == 2 and ours.skipped_steps.dtype == torch.int64


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@every_backend
def test_under_a_scaler_the_norm_is_of_unscaled_gradients(backend):
    """And the scaler's overflow and ours are one skip, counted once."""
    plain, norms = run(2, max_grad_norm=0.5)
    optimizer = FusedAdamW(
        parameters(torch.float32), lr=1e-2, max_grad_norm=0.5, skip_nonfinite=True, backend=backend
    )
    assert optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    seen = []
    for step in (0, None, 1):
        optimizer.zero_grad()
        params = optimizer.param_groups[0]["params"]
        factor = float("inf") if step is None else 1.0
        loss = sum((p * gradient(p, i, step or 0)).sum() * factor for i, p in enumerate(params))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step is not None:
            seen.append(optimizer.grad_norm)
    torch.testing.assert_close(torch.stack(seen), torch.stack(norms), rtol=1e-6, atol=0)
    for got, want in zip(results(optimizer), results(plain), strict=True):
        for key in got:
            torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-7)
    assert optimizer.skipped_steps == 1


def test_norm_spans_groups_dtypes_and_missing_gradients():
    params = [
        parameters(dtype, [(30,)])[0] for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    unused = parameters(torch.float32, [(8,)])
    optimizer = FusedAdam(
        [{"params": params[:1]}, {"params": params[1:] + unused}], max_grad_norm=1.0
    )
    for index, p in enumerate(params):
        p.grad = gradient(p, index, 0)
    optimizer.step()
    expected = torch.cat([p.grad.double() for p in params]).norm()
    torch.testing.assert_close(optimizer.grad_norm, expected.float(), rtol=1e-6, atol=0)
    assert unused[0] not in optimizer.state


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@every_backend
def test_a_skipped_step_of_mixed_dtypes_counts_once(backend):
    """float64 parameters are stepped by launches of their own."""
    params = [
        parameters(dtype, [(30,)])[0] for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    optimizer = FusedAdam(params, skip_nonfinite=True, backend=backend)
    for bad in (1.0, float("nan"), float("inf"), 1.0):
        for p in params:
            p.grad = torch.full_like(p, bad)
        optimizer.step()
    assert optimizer.skipped_steps == 2 and {r["step"].item() for r in results(optimizer)} == {2}


def test_layouts_of_gradients_do_not_change_the_norms_bits():
    """A transposed or expanded gradient is added in the order of the parameter's memory, like its
    contiguous copy.
    """
    grad = values((40, 60), 1, torch.float32)
    norms = []
    for made in (grad, grad.t().contiguous().t()):
        param = nn.Parameter(torch.ones(40, 60))
        param.grad = made
        optimizer = FusedAdam([param], max_grad_norm=1.0)
        optimizer.step()
        norms.append(optimizer._engine.stats[0].item())
    assert norms[0] == norms[1]


def test_copies_keep_the_arguments_and_nothing_public_is_added():
    optimizer, _ = run(1, max_grad_norm=0.5, skip_nonfinite=True)
    twin = copy.deepcopy(optimizer)
    assert (twin._max_grad_norm, twin._skip_nonfinite) == (0.5, True)
    assert {name for name in vars(optimizer) if name[0] != "_"} == {
        "defaults",
        "state",
        "param_groups",
    }
    assert (
        FusedAdam([torch.zeros(1)]).grad_norm is None
        and FusedAdam([torch.zeros(1)]).skipped_steps is None
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm=0 must be a number above 0, or None"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm=-1.0"),
        ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm=nan"),
        ({"max_grad_norm": "1"}, ValueError, "max_grad_norm='1'"),
        ({"max_grad_norm": True}, ValueError, "max_grad_norm=True"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite=1 must be True or False"),
        ({"max_grad_norm": 1.0, "differentiable": True}, ValueError, "differentiable=True"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FusedAdam([torch.zeros(1)], **arguments)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_reduce_norm_decides_what_is_clipped(backend):
    """As if three other processes held as much: the norm is twice what is here. Copies keep the
    function.
    """
    plain, reduced = (
        FusedAdamW(parameters(torch.float32), max_grad_norm=0.5, backend=backend) for _ in range(2)
    )
    reduced.reduce_norm = lambda total: 4 * total
    copied = copy.deepcopy(reduced)
    for optimizer in (plain, reduced, copied):
        for group in optimizer.param_groups:
            for index, param in enumerate(group["params"]):
                param.grad = gradient(param, index, 0)
        optimizer.step()
    assert reduced.grad_norm == 2 * plain.grad_norm
    assert same_bits(results(reduced), results(copied)) and not same_bits(
        results(reduced), results(plain)
    )


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda total: None, TypeError, "reduce_norm returned None, but must return a tensor"),
        (
            lambda total: total.float(),
            ValueError,
            r"returned a tensor of torch.float32 and shape \(1,\) on cpu",
        ),
        (
            lambda total: total.sum(),
            ValueError,
            r"of torch.float64 and shape \(\) on cpu, but must return one of",
        ),
    ],
)
def test_what_reduce_norm_returns_is_checked_before_anything_is_changed(function, error, message):
    optimizer, expected = (
        FusedAdamW(parameters(torch.float32), max_grad_norm=0.5) for _ in range(2)
    )
    for each in (optimizer, expected):
        for index, param in enumerate(each.param_groups[0]["params"]):
            param.grad = gradient(param, index, 0)
    optimizer.step()
    before = results(optimizer)
    optimizer.reduce_norm = function
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same_bits(results(optimizer), before)
    optimizer.reduce_norm = None
    optimizer.step()
    expected.step()
    expected.step()
    assert same_bits(results(optimizer), results(expected))
