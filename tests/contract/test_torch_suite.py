"""The logic of torch's own optimizer tests, for every configuration of its optimizer database.

test_contract.py has errors, directions, and equality at every step; here is the rest that needs no
GPU. Where torch's test compares two of torch's paths, ours compares our optimizer with torch's, or
bit by bit with itself. Every test runs with `flatten` off and on.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_optimizers import (
    optim_inputs_func_adam,
    optim_inputs_func_adamw,
)
from training import gradient, parameters, results, same_bits, train, values

from bench.harness import oracle
from fused_adam import FusedAdam, FusedAdamW

FP32 = torch.float32
SHAPES = [(10, 5), (10,), ()]
PAIRS = [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)]
# Configurations with tensors for betas are the database's for GPUs; our classes step them on a CPU.
DATABASE = {FusedAdam: optim_inputs_func_adam("cuda"), FusedAdamW: optim_inputs_func_adamw("cuda")}
CASES = [
    pytest.param(
        ours,
        theirs,
        configuration.kwargs,
        flatten,
        id=f"{ours.__name__}-{configuration.desc}{'-flatten' if flatten else ''}",
    )
    for ours, theirs in PAIRS
    for configuration in DATABASE[ours]
    for flatten in (False, True)
]
every_case = pytest.mark.parametrize(("ours", "theirs", "kwargs", "flatten"), CASES)
both_classes = pytest.mark.parametrize(("ours", "theirs"), PAIRS)
flat_or_not = pytest.mark.parametrize("flatten", [False, True])
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


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def named(params, names):
    return [(f"name{i}", param) for i, param in enumerate(params)] if names else params


def without_names(state_dict):
    groups = [dict(group) for group in state_dict["param_groups"]]
    for group in groups:
        group.pop("param_names", None)
    return {"state": state_dict["state"], "param_groups": groups}


def assert_same_state_dicts(a, b):
    assert a.keys() == b.keys() and a["param_groups"] == b["param_groups"]
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)


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


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_names", [False, True])
@pytest.mark.parametrize("own_names", [False, True])
@every_case
def test_a_resumed_run_goes_on_alike(ours, theirs, kwargs, flatten, saved_names, own_names):
    first = parameters(FP32, SHAPES)
    optimizer = ours(named(first, saved_names), flatten=flatten, **copy.deepcopy(kwargs))
    train(optimizer, 4)
    second = [nn.Parameter(param.detach().clone()) for param in first]
    resumed = ours(named(second, own_names), flatten=flatten, **copy.deepcopy(kwargs))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(4, 8):
        for each in (optimizer, resumed):
            train(each, 1, first=step)
        assert all(map(torch.equal, first, second))
    assert_same_state_dicts(*(without_names(o.state_dict()) for o in (optimizer, resumed)))
    names = [f"name{i}" for i in range(len(first))] if saved_names or own_names else None
    assert resumed.state_dict()["param_groups"][0].get("param_names") == names
    resumed.param_groups.extend(resumed.param_groups)  # a group that is there twice looks the same
    last = [without_names(o.state_dict())["param_groups"][-1] for o in (optimizer, resumed)]
    assert last[0] == last[1]


@pytest.mark.parametrize("names", [False, True])
@every_case
def test_a_file_holds_what_was_saved(ours, theirs, kwargs, flatten, names):
    params = parameters(FP32, SHAPES)
    optimizer = ours(named(params, names), flatten=flatten, **copy.deepcopy(kwargs))
    train(optimizer, 3)
    saved, file = optimizer.state_dict(), io.BytesIO()
    torch.save(saved, file)
    for weights_only in (False, True):
        file.seek(0)
        assert_same_state_dicts(torch.load(file, weights_only=weights_only), saved)


@pytest.mark.parametrize("change", ["older", "step as a number"])
@every_case
def test_older_checkpoints_change_no_bit(ours, theirs, kwargs, flatten, change):
    """Without options that torch added later and this run does not use, or with plain counts."""
    runs = []
    for loads in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
        images = values((1, 4, 16, 16), 0, FP32)
        optimizer = ours(model.parameters(), flatten=flatten, **copy.deepcopy(kwargs))
        for step in range(4):
            if step == 3 and loads:
                saved = copy.deepcopy(optimizer.state_dict())
                for group in saved["param_groups"]:
                    for key in ("maximize", "foreach", "fused", "differentiable", "capturable"):
                        if change == "older" and not group[key]:
                            del group[key]
                for entry in saved["state"].values():
                    if change != "older":
                        entry["step"] = entry["step"].item()
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
        runs.append(results(optimizer))
    assert same_bits(*runs)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@every_case
def test_copies_go_on_alike(ours, theirs, kwargs, flatten, how):
    optimizer = ours(parameters(FP32, SHAPES), flatten=flatten, **copy.deepcopy(kwargs))
    train(optimizer, 3)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    for each in (optimizer, twin):
        train(each, 2, first=3)
    assert same_bits(results(optimizer), results(twin))
    assert not any(map(torch.equal, members(optimizer), parameters(FP32, SHAPES)))


# Hooks -------------------------------------------------------------------------------------------


def mark(optimizer):
    optimizer.state["test"] = 1


def unmark(optimizer, state_dict):
    state_dict["marked"] = state_dict["state"].pop("test", 0) == 1
    return state_dict


@pytest.mark.parametrize("stepped", [False, True])
@every_case
def test_hooks_on_saving(ours, theirs, kwargs, flatten, stepped):
    """A hook before may put something into the state, and one after may take it out again."""
    optimizer = ours(parameters(FP32, SHAPES), flatten=flatten, **copy.deepcopy(kwargs))
    if stepped:
        train(optimizer, 1)
    after = optimizer.register_state_dict_post_hook(unmark)
    assert optimizer.state_dict()["marked"] is False
    before = optimizer.register_state_dict_pre_hook(mark)
    saved = optimizer.state_dict()
    assert saved["marked"] is True and "test" not in saved["state"]
    after.remove()
    assert optimizer.state_dict()["state"]["test"] == 1
    before.remove()
    train(optimizer, 1)  # a foreign key in the state is in nobody's way


@every_case
def test_hooks_on_loading(ours, theirs, kwargs, flatten):
    optimizer = ours(parameters(FP32, SHAPES), flatten=flatten, **copy.deepcopy(kwargs))
    train(optimizer, 1)
    saved = optimizer.state_dict()

    def change(optimizer, state_dict):
        state_dict["param_groups"][0]["lr"] = 0.002

    def replace(optimizer, state_dict):
        other = copy.deepcopy(state_dict)
        other["param_groups"][0]["lr"] = 0.003
        return other

    def note(optimizer):
        optimizer.state["replaced"] = optimizer.param_groups[0]["lr"] == 0.003

    optimizer.register_load_state_dict_post_hook(note)
    first = optimizer.register_load_state_dict_pre_hook(change)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002 and optimizer.state["replaced"] is False
    second = optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002  # the one that was there before comes last
    first.remove()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.003 and optimizer.state["replaced"] is True
    second.remove()
    train(optimizer, 1)
    assert [entry["step"] for entry in map(optimizer.state.get, members(optimizer))] == [2, 2, 2]


@every_case
def test_hooks_around_steps(ours, theirs, kwargs, flatten):
    """Global and local ones, in torch's order, beside another optimizer that has its own."""
    params, calls = parameters(FP32, SHAPES), []

    def hook(name):
        return lambda optimizer, args, kwargs: calls.append((name, type(optimizer)))

    optimizer = ours(params, flatten=flatten, **copy.deepcopy(kwargs))
    other = torch.optim.SGD(parameters(FP32, SHAPES))
    handles = [
        register_optimizer_step_pre_hook(hook("global before")),
        register_optimizer_step_post_hook(hook("global after")),
        *(each.register_step_pre_hook(hook("before")) for each in (optimizer, other)),
        *(each.register_step_post_hook(hook("after")) for each in (optimizer, other)),
    ]
    order = ["global before", "before", "after", "global after"]
    for each in (optimizer, other, optimizer):
        train(each, 1)
    expected = [(name, type(o)) for o in (optimizer, other, optimizer) for name in order]
    for handle in handles:
        handle.remove()
    train(optimizer, 1)
    assert calls == expected
