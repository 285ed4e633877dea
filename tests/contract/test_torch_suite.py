"""The logic of torch's own optimizer tests, for every configuration of its optimizer database.

test_contract_database.py has errors, directions, and equality at every step;
test_torch_suite_checkpoints.py has checkpoints and hooks; here is the rest that needs no GPU. Where
torch's test compares two of torch's paths, ours compares our optimizer with torch's, or bit by bit
with itself. Every test runs with `flatten` off and on.
"""

import copy

import pytest
import torch
from class_pairs import both_classes, flat_or_not
from torch import nn
from torch.testing._internal import common_optimizers
from torch_cases import FP32, SHAPES, every_case
from training import gradient, parameters, results, same_bits, train, values

from bench.harness import oracle

ADAM = next(info for info in common_optimizers.optim_db if info.optim_cls is torch.optim.Adam)
SCHEDULERS = ADAM.scheduler_inputs


def for_torch(kwargs):
    """The same configuration as torch's default path takes it on a CPU."""
    kwargs = {key: value for key, value in kwargs.items() if key != "capturable"}
    if isinstance(kwargs.get("lr"), torch.Tensor):
        kwargs["lr"] = kwargs["lr"].item()
    if "betas" in kwargs:
        kwargs["betas"] = tuple(beta.item() for beta in kwargs["betas"])
    return kwargs


def tolerance(optimizer, steps):
    """How far ours and torch's may lie apart by rounding alone."""
    options = oracle.Options(
        lr=max(group["lr"] for group in optimizer.param_groups),
        betas=optimizer.param_groups[0]["betas"],
        weight_decay=max(float(group["weight_decay"]) for group in optimizer.param_groups),
        decoupled=bool(optimizer.param_groups[0]["decoupled_weight_decay"]),
    )
    ours, theirs = (oracle.tolerance(FP32, steps, options, roundings) for roundings in (1, 4))
    return {key: ours[key] + theirs[key] for key in ours}


def assert_near(a, b, steps):
    """Equal parameters and gradients: equal counts, and values as near as rounding lets them."""
    within = tolerance(b, steps)
    for mine, other in zip(results(a), results(b), strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=within.get(key, 0.0))


# Groups and rates --------------------------------------------------------------------------------


@every_case
def test_rates_of_groups(ours, theirs, kwargs, flatten):
    """A group of its own configuration beside one whose rate is too small to move anything."""
    runs = []
    for cls, config in ((ours, {**kwargs}), (theirs, for_torch(kwargs))):
        *params, still = parameters(FP32, [*SHAPES, (2, 2)])
        config = {"lr": 1e-3, **copy.deepcopy(config)}
        extra = {"flatten": flatten} if cls is ours else {}
        groups = [{"params": params, **config}, {"params": [still]}]
        optimizer = cls(groups, lr=1e-28, **extra)
        before = still.detach().clone()
        train(optimizer, 5)
        assert torch.equal(still, before) and optimizer.state[still]["step"] == 5
        runs.append(optimizer)
    assert_near(*runs, steps=5)


@every_case
def test_decays_of_groups(ours, theirs, kwargs, flatten):
    runs = []
    for cls, config in ((ours, {**kwargs}), (theirs, for_torch(kwargs))):
        one, two = parameters(FP32, [(10, 5), (10, 5)])
        extra = {"flatten": flatten} if cls is ours else {}
        groups = [
            {"params": [one], **copy.deepcopy(config)},
            {"params": [two], **copy.deepcopy(config), "weight_decay": 0.0},
        ]
        runs.append(cls(groups, **extra))
        train(runs[-1], 5)
    assert_near(*runs, steps=5)


@pytest.mark.parametrize("dimensions", [0, 1, 2])
@every_case
def test_a_rate_as_a_tensor(ours, theirs, kwargs, flatten, dimensions):
    """A power of two is the same number as a float32 tensor: so are all results."""
    runs = []
    for lr in (2.0**-7, torch.full([1] * dimensions, 2.0**-7)):
        config = {**copy.deepcopy(kwargs), "lr": lr}
        optimizer = ours(parameters(FP32, SHAPES), flatten=flatten, **config)
        train(optimizer, 5)
        runs.append(results(optimizer))
    assert same_bits(*runs)


@pytest.mark.parametrize("number", range(len(SCHEDULERS)))
@pytest.mark.parametrize("grouped", [False, True])
@both_classes
@flat_or_not
def test_schedulers_write_the_same_rates(ours, theirs, flatten, grouped, number):
    runs, rates = [], []
    for cls, extra in ((ours, {"flatten": flatten}), (theirs, {})):
        params = parameters(FP32, SHAPES)
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.01}] if grouped else params
        optimizer = cls(groups, **extra)
        schedulers = [make(optimizer) for make in SCHEDULERS[number]]
        seen = []
        for step in range(20):
            train(optimizer, 1, first=step)
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([float(step % 3)] if plateau else []))
            seen.append([group["lr"] for group in optimizer.param_groups])
        runs.append(optimizer)
        rates.append(seen)
    assert rates[0] == rates[1]
    assert_near(*runs, steps=20)


# Complex numbers ---------------------------------------------------------------------------------


@every_case
def test_complex_parameters_equal_their_real_and_imaginary_parts(ours, theirs, kwargs, flatten):
    """The loss is a polynomial of one complex parameter, or of the two real ones in it."""
    whole = torch.view_as_complex(values((4, 2), 0, FP32)).requires_grad_()
    parts = [part.detach().clone().requires_grad_() for part in (whole.real, whole.imag)]
    real, twin = parameters(FP32, [(3,)]), parameters(FP32, [(3,)])
    a = ours([whole, *real], flatten=flatten, **copy.deepcopy(kwargs))
    b = ours([*parts, *twin], flatten=flatten, **copy.deepcopy(kwargs))
    for _ in range(3):
        for optimizer, z, w in ((a, whole, real[0]), (b, torch.complex(*parts), twin[0])):
            optimizer.zero_grad()
            ((z.real**2 + z.real * z.imag - z.imag).sum() + w.square().sum()).backward()
            optimizer.step()
        assert torch.equal(whole.real, parts[0]) and torch.equal(whole.imag, parts[1])
        assert torch.equal(real[0], twin[0])


# Gradients that say nothing ----------------------------------------------------------------------


@every_case
def test_parameters_that_need_no_gradient(ours, theirs, kwargs, flatten):
    params = [param.requires_grad_(False) for param in parameters(FP32, SHAPES)]
    before = [param.clone() for param in params]
    optimizer = ours(params, flatten=flatten, **copy.deepcopy(kwargs))
    assert optimizer.step(lambda: torch.ones(1)) == 1
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, params, before)) and not optimizer.state


@every_case
def test_gradients_of_zeros_move_nothing_but_decay(ours, theirs, kwargs, flatten):
    runs = []
    for cls, config in ((ours, {**kwargs}), (theirs, for_torch(kwargs))):
        params = parameters(FP32, SHAPES)
        extra = {"flatten": flatten} if cls is ours else {}
        optimizer = cls(params, **copy.deepcopy(config), **extra)
        before = [param.detach().clone() for param in params]
        for _ in range(3):
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer.step()
        assert [optimizer.state[param]["step"] for param in params] == [3] * len(params)
        if not optimizer.param_groups[0]["weight_decay"]:
            assert all(map(torch.equal, params, before))
            assert not any(optimizer.state[param]["exp_avg"].any() for param in params)
        runs.append(optimizer)
    assert_near(*runs, steps=3)


# Flags -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_case
def test_foreach_and_fused_change_no_bit(ours, theirs, kwargs, flatten, dtype):
    """Also with a layer that rests for two steps and a step without gradients."""
    runs = []
    for flags in ({}, {"foreach": True}, {"fused": True}):
        if flags.get("foreach") and isinstance(kwargs.get("betas"), tuple):
            continue  # torch refuses tensors for betas there, and so do we
        params = parameters(dtype, SHAPES)
        optimizer = ours(params, flatten=flatten, **copy.deepcopy(kwargs), **flags)
        for step in range(7):
            for index, param in enumerate(params):
                resting = step == 2 or (step in (3, 4) and index == 1)
                param.grad = None if resting else gradient(param, index, step)
            optimizer.step()
        runs.append(results(optimizer))
    assert [r["step"].item() for r in runs[0]] == [6, 4, 6]
    assert all(same_bits(run, runs[0]) for run in runs)


@both_classes
@flat_or_not
def test_parameters_on_the_meta_device(ours, theirs, flatten):
    """An error that names the device. `to_empty` makes new parameters, so there is none to step."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
        optimizer = ours(model.parameters(), fused=True, flatten=flatten)
        for param in model.parameters():
            param.grad = torch.rand_like(param)
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()
    assert not optimizer.state
    optimizer.zero_grad(set_to_none=True)
    model.to_empty(device="cpu")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("scale", [None, 1.0])
@every_case
def test_an_overflow_flag_skips_the_step(ours, theirs, kwargs, flatten, scale):
    params = parameters(FP32, SHAPES)
    optimizer = ours(params, fused=True, flatten=flatten, **copy.deepcopy(kwargs))
    for index, param in enumerate(params):
        param.grad = gradient(param, index, 0)
    before = [param.detach().clone() for param in params]
    optimizer.grad_scale = None if scale is None else torch.tensor([scale])
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert [optimizer.state[param]["step"] for param in params] == [0] * len(params)
