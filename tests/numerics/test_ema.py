"""ema_decay: averages of the weights, kept in the pass that updates them."""

import copy
import itertools
import math

import pytest
import torch
from graphs import Recorder
from recipes import BF16, FP32, dtype_of, every_recipe, members, trained, weights
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import gradient, parameters, results, same_bits, train, values

from fused_adam import FusedAdam, FusedAdamW, step_in_backward
from fused_adam.precision import parse

FP16, FP64, C64 = torch.float16, torch.float64, torch.complex64
SHAPES = [(5,), (33, 3), (129,), (), (0, 3)]
OPTIONS = {"lr": 0.05, "weight_decay": 0.3}
every_backend = pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
kernel_or_not = pytest.mark.parametrize("backend", ["reference", "triton"])


def averages(optimizer):
    return [optimizer.state[p]["ema"] for p in members(optimizer)]


def without_averages(optimizer):
    return [{k: v for k, v in row.items() if k != "ema"} for row in results(optimizer)]


def averaged_in_float64(optimizer, steps, decay, first=0):
    """Train, and average the weights that the recipe holds after each step, as written on paper."""
    wanted = [w.double() for w in weights(optimizer)]

    def average(step):
        for e, w in zip(wanted, weights(optimizer), strict=True):
            e += (1 - decay) * (w.double() - e)

    train(optimizer, steps, first, after=average)
    return wanted


# The formula
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flatten", "amsgrad"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@every_backend
def test_equal_to_plain_torch(backend, dtype, flatten, amsgrad):
    options = {**OPTIONS, "amsgrad": amsgrad, "flatten": flatten, "backend": backend}
    optimizer = FusedAdamW(parameters(dtype, SHAPES), ema_decay=0.9, **options)
    wanted = [p.detach().clone() for p in members(optimizer)]

    def average(step):
        for e, p in zip(wanted, members(optimizer), strict=True):
            e += (1 - 0.9) * (p.detach() - e)

    train(optimizer, 5, after=average)
    for found, want in zip(averages(optimizer), wanted, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, want, rtol=0, atol=1e-14 if dtype == FP64 else 3e-7)
    # Weights and moments are those of a training without averages, bit for bit.
    usual = FusedAdamW(parameters(dtype, SHAPES), **options)
    train(usual, 5)
    assert same_bits(without_averages(optimizer), results(usual))
    assert "ema_decay" not in usual.param_groups[0]


def test_the_averages_of_averaged_model():
    """torch's begins as a copy at its first update; here that is before the first step."""
    model = nn.Linear(7, 3)
    optimizer = FusedAdamW(model.named_parameters(), lr=0.05, ema_decay=0.9)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    train(optimizer, 5, after=lambda step: averaged.update_parameters(model))
    wanted = dict(averaged.module.named_parameters())
    for name, found in optimizer.ema_state_dict().items():
        torch.testing.assert_close(found, wanted[name].detach(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64, C64], ids=str)
@pytest.mark.parametrize("flatten", [False, True])
def test_same_bits_everywhere(dtype, flatten):
    def run(backend, flat):
        options = {**OPTIONS, "backend": backend, "flatten": flat, "maximize": True}
        optimizer = FusedAdamW(parameters(dtype, SHAPES), ema_decay=0.9, **options)
        train(optimizer, 3)
        return results(optimizer)

    wanted = run("reference", False)
    for backend in ("reference", "compiled", "triton"):
        found = run(backend, flatten)
        if dtype == FP64:  # equal within an ulp or two per step
            for row, want in zip(found, wanted, strict=True):
                torch.testing.assert_close(row, want, rtol=1e-14, atol=1e-14)
        else:
            assert same_bits(found, wanted)


@every_recipe
def test_recipes_average_the_unrounded_weight(precision):
    optimizer = trained(precision, 0, ema_decay=0.75, lr=0.05, weight_decay=0.3)
    dtype = dtype_of(precision)
    wanted = averaged_in_float64(optimizer, 4, 0.75)
    # What a recipe stores of a weight may be rounded: split24 keeps 24 bits, sr and native bf16 16.
    rounding = {"split24": 2.0**-15, "sr": 2.0**-7}.get(parse(precision).weights, 2.0**-22)
    for found, want in zip(averages(optimizer), wanted, strict=True):
        assert found.dtype == FP32
        torch.testing.assert_close(found.double(), want, rtol=rounding, atol=4 * rounding)
    usual = trained(precision, 0, lr=0.05, weight_decay=0.3)
    train(usual, 4)
    assert same_bits(without_averages(optimizer), results(usual))
    assert {p.dtype for p in members(optimizer)} == {dtype}


def test_what_rounding_hides_is_averaged():
    """Steps too small for bfloat16, without a remainder: the average moves, the weight does not."""
    p = nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = FusedAdamW([p], lr=1e-4, weight_decay=0.0, ema_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p == 1).all()
    assert torch.equal(optimizer.state[p]["ema"], torch.full((64,), 1 - 1e-4))


@pytest.mark.parametrize("amsgrad", [False, True])
@every_recipe
def test_recipes_on_the_kernel(precision, amsgrad):
    runs = [
        trained(precision, 2, [(31,), (5, 13)], ema_decay=0.9, amsgrad=amsgrad, backend=backend)
        for backend in ("reference", "triton")
    ]
    assert same_bits(*map(results, runs))


@every_backend
def test_the_complement_of_the_decay_is_rounded_once(backend):
    """1 - 0.9999 in float64: in float32 it would be 1.7e-4 of itself off."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = FusedAdamW([p], lr=1.0, eps=0.0, ema_decay=0.9999, backend=backend)
    p.grad = torch.full((3,), -1.0)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3))
    assert torch.equal(optimizer.state[p]["ema"], torch.full((3,), 1 - 0.9999, dtype=FP32))


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@every_backend
def test_a_tensor_may_change_at_any_time(backend, dtype):
    decay = torch.tensor(0.0, dtype=dtype)
    optimizer = FusedAdamW(parameters(FP32, SHAPES), ema_decay=decay, backend=backend, **OPTIONS)
    twin = FusedAdamW(parameters(FP32, SHAPES), ema_decay=0.0, **OPTIONS)
    for step, value in enumerate((0.0, 0.5, 0.25, 2.0, -1.0)):
        decay.fill_(value)
        twin.param_groups[0]["ema_decay"] = decay.clone()
        train(optimizer, 1, first=step)
        train(twin, 1, first=step)
        assert same_bits(results(optimizer), results(twin))
    assert optimizer.param_groups[0]["ema_decay"] is decay


def test_a_number_may_change_at_every_step_without_a_new_plan():
    optimizer = FusedAdamW(parameters(FP32, SHAPES), ema_decay=0.0, **OPTIONS)
    wanted = [p.detach().double() for p in members(optimizer)]
    train(optimizer, 1)
    optimizer._engine._build = None
    wanted = [p.detach().double() for p in members(optimizer)]
    for step in range(1, 5):
        decay = min(0.99, (1 + step) / (10 + step))
        optimizer.param_groups[0]["ema_decay"] = decay
        train(optimizer, 1, first=step)
        for e, p in zip(wanted, members(optimizer), strict=True):
            e += (1 - decay) * (p.detach().double() - e)
    for found, want in zip(averages(optimizer), wanted, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-6)


# Steps that are not ordinary
# ------------------------------------------------------------------------------------------------


@kernel_or_not
def test_a_step_of_size_zero_averages_what_is_there(backend):
    """Also where moments are not finite: 0 * inf would make the average NaN."""
    p = nn.Parameter(torch.tensor([1.0, -0.0, 2.0, 3.0]))
    optimizer = FusedAdamW([p], lr=0.5, ema_decay=0.5, weight_decay=0.0, backend=backend)
    p.grad = torch.ones(4)
    optimizer.step()
    before, average = p.detach().clone(), optimizer.state[p]["ema"].clone()
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    optimizer.step()
    assert torch.equal(p, before)
    assert torch.equal(optimizer.state[p]["ema"], average + 0.5 * (before - average))


@pytest.mark.parametrize("what", ["overflow", "spike", "non-finite"])
@kernel_or_not
def test_a_skipped_step_leaves_averages(backend, what):
    skips = {"spike": {"skip_grad_norm": 1e5}, "non-finite": {"skip_nonfinite": True}}
    options = {**OPTIONS, "backend": backend, **skips.get(what, {})}
    optimizer = FusedAdamW(parameters(FP32, SHAPES), ema_decay=0.9, **options)
    train(optimizer, 2)
    before = results(optimizer)
    for i, p in enumerate(members(optimizer)):
        p.grad = gradient(p, i, 7) * (1e6 if what == "spike" else 1.0)
    members(optimizer)[0].grad[3] = math.nan if what == "non-finite" else 1e6
    optimizer.found_inf = torch.tensor(1.0 if what == "overflow" else 0.0)
    optimizer.step()
    assert same_bits(results(optimizer), before)


def test_an_average_begins_as_the_weight_before_the_first_step():
    """Also of parameters that get their first gradient later; others go on then."""
    optimizer = FusedAdamW(parameters(FP32, [(40,), (33, 3)]), ema_decay=0.5, **OPTIONS)
    first, late = members(optimizer)
    wanted, begin = first.detach().clone(), late.detach().clone()
    for step in range(3):
        first.grad = gradient(first, 0, step)
        late.grad = gradient(late, 1, step) if step == 2 else None
        assert "ema" not in optimizer.state[late]
        optimizer.step()
        wanted += 0.5 * (first.detach() - wanted)
    torch.testing.assert_close(optimizer.state[first]["ema"], wanted, rtol=0, atol=1e-6)
    begin += 0.5 * (late.detach() - begin)
    torch.testing.assert_close(optimizer.state[late]["ema"], begin, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", [None, "split32", "split24-bf16", "master32", "sr-int8"])
def test_it_is_switched_on_between_steps(precision):
    """It begins as the weight that the recipe holds, not as the rounded parameter."""
    optimizer = trained(precision, 3, dtype=FP32 if precision is None else BF16)
    before = weights(optimizer)
    optimizer.param_groups[0].update(ema_decay=0.5, lr=0.0)
    train(optimizer, 1, first=3)
    for found, want in zip(averages(optimizer), before, strict=True):
        assert torch.equal(found, want)


def test_switched_off_it_stays_and_goes_on_later():
    optimizer = FusedAdamW(parameters(FP32, SHAPES), ema_decay=0.5, **OPTIONS)
    train(optimizer, 2)
    left = [average.clone() for average in averages(optimizer)]
    optimizer.param_groups[0]["ema_decay"] = None
    train(optimizer, 2, first=2)
    assert all(map(torch.equal, averages(optimizer), left))
    optimizer.param_groups[0]["ema_decay"] = 0.5
    train(optimizer, 1, first=4)
    for found, old, p in zip(averages(optimizer), left, members(optimizer), strict=True):
        torch.testing.assert_close(found, old + 0.5 * (p.detach() - old), rtol=0, atol=1e-6)


def test_groups_with_and_without(launches):
    """Others have the bits of a plain optimizer, in a launch of their own."""
    groups = [{"params": [p]} for p in parameters(FP32, [(40,), (33, 3), (7,)])]
    groups[1]["ema_decay"] = None
    groups[2]["ema_decay"] = 0.25
    optimizer = FusedAdamW(groups, ema_decay=0.75, backend="triton", **OPTIONS)
    train(optimizer, 2)
    assert launches == ["prologue_kernel", "adam_kernel", "adam_kernel"] * 2
    for i, decay in enumerate((0.75, None, 0.25)):
        other = FusedAdamW(parameters(FP32, [(40,), (33, 3), (7,)]), ema_decay=decay, **OPTIONS)
        train(other, 2)
        assert same_bits([results(optimizer)[i]], [results(other)[i]])
    assert "ema_decay" not in groups[0]  # the user's dict is not ours


@pytest.mark.filterwarnings("ignore:.*duplicate parameters:UserWarning")
@pytest.mark.parametrize("options", [({"amsgrad": True}, {"ema_decay": 0.5}), ({}, {})], ids=str)
def test_a_parameter_that_two_groups_list(options):
    """Its one state has what either group asks for."""
    p = nn.Parameter(values((40,), 0, FP32))
    first, second = options
    optimizer = FusedAdamW([{"params": [p], **first}], **OPTIONS)
    optimizer.param_groups.append({**optimizer.param_groups[0], "amsgrad": False, **second})
    for step in range(2):
        p.grad = gradient(p, 0, step)
        optimizer.step()
    wanted = {"step", "exp_avg", "exp_avg_sq"}
    wanted |= {"max_exp_avg_sq", "ema"} if second else set()
    assert optimizer.state[p].keys() == wanted and optimizer.state[p]["step"] == 4


@pytest.mark.parametrize(("backend", "flatten"), [("reference", False), ("triton", True)])
def test_small_parameters_are_updated_as_one_with_their_averages(backend, flatten):
    optimizer = FusedAdamW(
        parameters(FP32, [(40,)] * 5), ema_decay=0.5, flatten=flatten, backend=backend, **OPTIONS
    )
    train(optimizer, 2)
    assert [len(rows) for rows in optimizer._engine.usual.coalesced] == [5]


def test_captured_steps_read_a_tensor_anew(monkeypatch):
    decay = torch.tensor(0.5)
    options = {**OPTIONS, "backend": "triton", "ema_decay": decay}
    captured = FusedAdamW(parameters(FP32, SHAPES), capturable=True, **options)
    train(captured, 1)
    usual = FusedAdamW(parameters(FP32, SHAPES), **{**OPTIONS, "ema_decay": 0.5})
    train(usual, 1)
    with monkeypatch.context() as patch:
        graph = Recorder(patch)
        graph.capture(captured.step)
        for step, value in ((1, 0.5), (2, 0.9), (3, 0.0)):
            for i, p in enumerate(members(captured)):
                p.grad.copy_(gradient(p, i, step))
            decay.fill_(value)
            graph.replay()
            usual.param_groups[0]["ema_decay"] = decay.clone()
            train(usual, 1, first=step)
            assert same_bits(results(captured), results(usual))


@pytest.mark.parametrize("precision", [None, "split32"])
def test_steps_in_backward(precision):
    def fit(inside):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 1))
        model = model.bfloat16() if precision else model
        optimizer = FusedAdamW(model.parameters(), ema_decay=0.9, precision=precision, **OPTIONS)
        if inside:
            step_in_backward(model, optimizer, bucket_bytes=1)
        for step in range(3):
            torch.manual_seed(step)
            x = torch.randn(8, 20, dtype=BF16 if precision else FP32)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return results(optimizer)

    assert same_bits(fit(True), fit(False))


def test_coupled_decay_and_adam():
    optimizer = FusedAdam(parameters(FP32, SHAPES), ema_decay=0.9, lr=0.05, weight_decay=0.3)
    wanted = averaged_in_float64(optimizer, 3, 0.9)
    for found, want in zip(averages(optimizer), wanted, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-6)


# What is refused
# ------------------------------------------------------------------------------------------------

ALLOWED = "must be a number of at least 0 and below 1, a float tensor of shape"
BAD = [
    1,
    1.0,
    -0.1,
    math.nan,
    math.inf,
    "0.9",
    True,
    [0.9],
    torch.tensor([0.9]),
    torch.tensor(1),
    torch.tensor(0.9, device="meta"),
    torch.tensor(0.9j),
]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_bad_decays_are_named(value):
    for make in (FusedAdam, FusedAdamW):
        with pytest.raises(ValueError, match=f"(?s)^ema_decay=.*{ALLOWED}"):
            make([torch.zeros(1)], ema_decay=value)
    optimizer = FusedAdamW(parameters(FP32, SHAPES), ema_decay=0.5, **OPTIONS)
    with pytest.raises(ValueError, match=ALLOWED):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "ema_decay": value})
    assert len(optimizer.param_groups) == 1
    train(optimizer, 1)
    before, saved = results(optimizer), copy.deepcopy(optimizer.state_dict())
    # Between steps, switched on between steps, and in a checkpoint.
    for group in ({"ema_decay": value}, {"ema_decay": None}, {"ema_decay": value}):
        optimizer.param_groups[0].update(group)
        if group["ema_decay"] is not None:
            with pytest.raises(ValueError, match=ALLOWED):
                train(optimizer, 1)
            assert same_bits(results(optimizer), before)
    optimizer.param_groups[0]["ema_decay"] = 0.5
    saved["param_groups"][0]["ema_decay"] = value
    with pytest.raises(ValueError, match=ALLOWED):
        optimizer.load_state_dict(saved)
    assert same_bits(results(optimizer), before)


def test_it_cannot_be_combined_with_a_differentiable_step():
    message = "ema_decay=0.5 cannot be combined with differentiable=True, because that step is"
    with pytest.raises(ValueError, match=message):
        FusedAdamW([torch.zeros(1)], ema_decay=0.5, differentiable=True)
    with pytest.raises(ValueError, match=message):
        FusedAdamW([{"params": [torch.zeros(1)], "ema_decay": 0.5}], differentiable=True)


def test_numpys_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    optimizer = FusedAdamW([torch.zeros(1)], ema_decay=numpy.float32(0.5))
    assert optimizer.param_groups[0]["ema_decay"] == 0.5
    assert type(optimizer.param_groups[0]["ema_decay"]) is float
