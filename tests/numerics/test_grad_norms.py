"""grad_norms(): one norm per parameter, from the partial sums that the norm pass leaves."""

import copy
import math

import pytest
import torch
from graphs import CudaGraph, Recorder, set_gradients
from torch import nn
from torch._subclasses import FakeTensorMode
from training import SHAPES, gradient, parameters, values

from fused_adam import FusedAdam, FusedAdamW
from fused_adam.backends import choose
from fused_adam.numerics.norm import CHUNK, LANES, add_runs, pairing, square_sums

every_backend = pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
# Around a lane, a chunk, and an odd number of chunks; with empty ones and scalars among them.
NORM_SHAPES = [*SHAPES, (LANES + 1,), (CHUNK,), (2 * CHUNK + LANES + 3,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Of half a float32 ulp: the result is rounded once (1). Squares are rounded to float32, which the
# root halves (1/2). Sums in lanes are off by 63 * 2^-48 (see test_clip.py): nothing next to that.
TOLERANCE = 1.51 * 2.0**-24


def mixed(device="cpu"):
    """Parameters of all dtypes by turns, with gradients, and one without."""
    params = [parameters(DTYPES[i % 4], [shape], device)[0] for i, shape in enumerate(NORM_SHAPES)]
    params.append(nn.Parameter(torch.ones(3, 4, dtype=torch.complex64, device=device)))
    for i, param in enumerate(params):
        param.grad = gradient(param, i, 0) if param.is_floating_point() else param * (1 - 2j)
    return [*params, nn.Parameter(torch.ones(5, device=device))]


def stepped(backend="reference", device="cpu", **options):
    params = mixed(device)
    groups = [{"params": params[:5]}, {"params": params[5:], "lr": 1e-4}]
    optimizer = FusedAdam(groups, backend=backend, **{"max_grad_norm": 1.0, **options})
    optimizer.step()
    return optimizer


def expected_norms(params, scale=1.0):
    """By position, in float64."""
    return {
        i: torch.linalg.vector_norm(p.grad.to(torch.complex128)).item() / scale
        for i, p in enumerate(params)
        if p.grad is not None
    }


def test_equal_to_vector_norm(kernel_device):
    backend = "reference" if kernel_device == "cpu" else "triton"
    optimizer = stepped(backend, kernel_device)
    norms, expected = optimizer.grad_norms(), expected_norms(optimizer._params())
    assert list(norms) == list(expected) == list(range(len(NORM_SHAPES) + 1))
    for position, norm in norms.items():
        assert (norm.dtype, norm.shape) == (torch.float32, ())
        assert norm.device.type == kernel_device
        assert norm.item() == pytest.approx(expected[position], rel=TOLERANCE, abs=0)
    assert len({norm.untyped_storage().data_ptr() for norm in norms.values()}) == 2


@pytest.mark.parametrize("flatten", [False, True])
def test_same_bits_on_every_backend(flatten, kernel_device):
    baseline = torch.stack(list(stepped().grad_norms().values()))
    for backend in ("reference", "triton"):
        norms = stepped(backend, kernel_device, flatten=flatten).grad_norms()
        assert torch.equal(torch.stack(list(norms.values())).cpu(), baseline)


@pytest.mark.parametrize("precision", ["split32", "sr-bf16", "split24-int8"])
@pytest.mark.parametrize("backend", ["reference", "triton"])  # "compiled" has no recipes
def test_recipes_do_not_change_them(backend, precision):
    norms = []
    for options in ({}, {"precision": precision, "backend": backend}):
        optimizer = FusedAdam(parameters(torch.bfloat16), max_grad_norm=1.0, **options)
        set_gradients(optimizer, 0)
        optimizer.step()
        norms.append(torch.stack(list(optimizer.grad_norms().values())))
    assert torch.equal(*norms)


@every_backend
def test_their_squares_add_up_to_that_of_the_norm(backend):
    optimizer = FusedAdam(
        parameters(torch.float32, NORM_SHAPES), max_grad_norm=0.1, backend=backend
    )
    for step in range(2):
        set_gradients(optimizer, step)
        optimizer.step()
        square = math.fsum(norm.item() ** 2 for norm in optimizer.grad_norms().values())
        # Both sides: one rounding to float32, squared.
        assert square == pytest.approx(optimizer.grad_norm.item() ** 2, rel=2 * 2.0**-23)


def test_the_order_of_the_sum_is_by_pairs():
    """Of neighbours, again and again. Written as plain loops."""
    runs = [0, 1, 2, 3, 7, 0, 16, 21]
    partials = values((sum(runs),), 0, torch.float64)

    def by_pairs(x):
        while len(x) > 1:
            x = [sum(x[i : i + 2]) for i in range(0, len(x), 2)]
        return sum(x)

    expected = [by_pairs(run.tolist()) for run in partials.split(runs)]
    assert add_runs(partials, pairing(runs)).tolist() == expected
    assert [table.shape[1] for table in pairing(runs)] == [29, 17, 11, 9, 8]
    assert add_runs(torch.zeros(0, dtype=torch.float64), pairing([0, 0])).tolist() == [0, 0]


def test_names():
    """Of named parameters; where several have one, as two models in one optimizer do, positions."""
    first, second = nn.Linear(2, 3), nn.Linear(3, 4, bias=False)
    groups = [
        {"params": list(first.named_parameters())},
        {"params": list(second.named_parameters())},
    ]
    optimizer = FusedAdamW(groups, max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    optimizer.step()
    norms = optimizer.grad_norms()
    assert list(norms) == [0, "bias", 2]
    assert norms[2].item() == pytest.approx(second.weight.grad.norm().item())
    # What left the optimizer since has no name any more.
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
    del optimizer.param_groups[0]
    assert list(optimizer.grad_norms()) == ["weight"]
    set_gradients(optimizer, 1)
    optimizer.step()
    assert list(optimizer.grad_norms()) == ["weight", "late"]


@every_backend
def test_of_the_last_step_with_the_gradients_it_had(backend):
    params = parameters(torch.float32, [(5,), (70_000,)])
    optimizer = FusedAdamW(params, max_grad_norm=1.0, backend=backend)
    assert optimizer.grad_norms() == {}
    first, second = params
    for params in ([first, second], [second], [first], [second], []):
        optimizer.zero_grad()
        for param in params:
            param.grad = gradient(param, 0, len(params))
        optimizer.step()
        norms, expected = optimizer.grad_norms(), expected_norms([first, second])
        assert norms.keys() == expected.keys()
        for position, norm in norms.items():
            assert norm.item() == pytest.approx(expected[position], rel=TOLERANCE)
    before = {position: norm.clone() for position, norm in norms.items()}
    first.grad = gradient(first, 0, 9)
    optimizer.step()
    assert norms == before  # not overwritten


def test_flat_gradients_that_nothing_has_written_to_are_absent():
    optimizer = FusedAdamW(parameters(torch.float32, [(5,), (6,)]), max_grad_norm=1.0, flatten=True)
    set_gradients(optimizer, 0)
    optimizer.step()
    optimizer.zero_grad()
    optimizer._params()[1].grad.add_(2.0)
    optimizer.step()
    assert optimizer.grad_norms() == {1: torch.tensor(24.0).sqrt()}


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@every_backend
def test_under_a_scaler(backend):
    """Unscaled, with the scale of that step: `update` changes it afterwards. Overflows show."""
    params = parameters(torch.float32, [(5,), (3, 4)])
    optimizer = FusedAdamW(params, max_grad_norm=0.5, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for step, factor in enumerate([1.0, math.inf, 1.0]):
        optimizer.zero_grad()
        grads = [gradient(p, i, step) for i, p in enumerate(params)]
        loss = (params[0] * grads[0]).sum() * factor + (params[1] * grads[1]).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        first, second = (norm.item() for norm in optimizer.grad_norms().values())
        assert second == pytest.approx(grads[1].double().norm().item(), rel=TOLERANCE)
        assert first == pytest.approx((grads[0].double().norm() * factor).item(), rel=TOLERANCE)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@every_backend
def test_the_parameter_whose_gradient_is_not_finite_shows(backend, bad):
    optimizer = FusedAdamW(
        parameters(torch.bfloat16, [(5,), (70_000,), (3,)]), skip_nonfinite=True, backend=backend
    )
    set_gradients(optimizer, 0)
    optimizer._params()[1].grad[69_999] = bad
    optimizer.step()
    good, found, other = (norm.item() for norm in optimizer.grad_norms().values())
    assert math.isfinite(good) and math.isfinite(other)
    assert found == bad or (math.isnan(found) and math.isnan(bad))


def test_a_step_without_gradients_has_none():
    """Nothing is stepped then, and the next one has its own scale."""
    optimizer = FusedAdamW(parameters(torch.float32, [(5,)]), max_grad_norm=1.0)
    optimizer.grad_scale = torch.tensor(4.0)
    optimizer.step()
    assert optimizer.grad_norms() == {}
    set_gradients(optimizer, 0, scale=4.0)
    optimizer.step()
    [norm] = optimizer.grad_norms().values()
    expected = gradient(*optimizer._params(), 0, 0).double().norm().item()
    assert norm.item() == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("flatten", [False, True])
def test_after_a_replay(kernel_device, monkeypatch, flatten):
    graph = Recorder(monkeypatch) if kernel_device == "cpu" else CudaGraph()
    optimizer = FusedAdamW(
        parameters(torch.float32, [(5,), (70_000,)], kernel_device),
        backend="triton",
        capturable=True,
        max_grad_norm=1.0,
        flatten=flatten,
    )
    set_gradients(optimizer, 0)
    if flatten:
        optimizer.zero_grad()
        set_gradients(optimizer, 0, in_place=True)
    optimizer.step()
    optimizer.grad_norms()
    graph.capture(optimizer.step)
    for step in (1, 2):
        set_gradients(optimizer, step, in_place=True)
        graph.replay()
        expected = expected_norms(optimizer._params())
        for position, norm in optimizer.grad_norms().items():
            assert norm.item() == pytest.approx(expected[position], rel=TOLERANCE)


def test_nothing_is_computed_before_the_call(launches):
    optimizer = FusedAdamW(parameters(torch.float32, [(5,)]), max_grad_norm=1.0, backend="triton")
    set_gradients(optimizer, 0)
    optimizer.step()
    assert launches.count("square_sum_kernel") == launches.count("total_kernel") == 1
    assert optimizer._engine.last_norms.pairings == []


@pytest.mark.gpu
def test_the_call_does_not_wait_for_the_gpu():
    optimizer = stepped("triton", "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.grad_norms()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_refused(monkeypatch):
    plain = FusedAdam([torch.zeros(1)])
    with pytest.raises(RuntimeError, match=r"skip_nonfinite or skip_grad_norm, and none is set"):
        plain.grad_norms()
    optimizer = FusedAdam([torch.zeros(1)], skip_nonfinite=True)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="under FakeTensorMode"):
        optimizer.grad_norms()
    monkeypatch.setattr(choose, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it after a replay"):
        optimizer.grad_norms()


def test_copies_begin_without():
    """As `grad_norm` does."""
    optimizer = stepped()
    assert copy.deepcopy(optimizer).grad_norms() == {}


def test_no_sum_is_needed_for_chunks_of_one_gradient():
    """The partial sums are those of the reference's norm, so their square roots are norms."""
    grad = values((3 * CHUNK + 5,), 2, torch.float32)
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    optimizer = FusedAdam([param], max_grad_norm=1.0)
    optimizer.step()
    a, b, c, d = square_sums([grad])[0].tolist()
    assert optimizer.grad_norms()[0] == torch.tensor(math.sqrt((a + b) + (c + d)))


def test_a_limit_of_the_norm_alone_is_enough():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([param], skip_grad_norm=50.0)
    param.grad = torch.tensor([2.0, 3.0, 6.0])
    optimizer.step()
    assert optimizer.grad_norms()[0].item() == 7
