"""The logic of torch's own tests of checkpoints and hooks, for every configuration of its optimizer
database. test_torch_suite.py says how they compare.
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
from torch_cases import FP32, SHAPES, every_case
from training import parameters, results, same_bits, train, values


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
