"""Inputs of public bug reports: checkpoints of other shapes and of other optimizers.

report_runs.py says how the tests compare.
"""

import copy

import pytest
import torch
from report_runs import Run, assert_equal_runs, assert_like_torch, members, over_setups


def tensors_of(optimizer):
    """Weights, state and groups, to see that nothing has changed."""
    state = {
        index: {key: value.clone() for key, value in entry.items()}
        for index, entry in optimizer.state_dict()["state"].items()
    }
    return (
        [p.detach().clone() for p in members(optimizer)],
        state,
        optimizer.state_dict()["param_groups"],
    )


def assert_unchanged(optimizer, before) -> None:
    *tensors, groups = tensors_of(optimizer)
    torch.testing.assert_close(tensors, list(before[:2]), rtol=0, atol=0)
    assert groups == before[2]


def saved_by(run, **more):
    """A checkpoint of three steps in the form of apex and TransformerEngine: the count is the
    group's."""
    run.step(3)
    saved = copy.deepcopy(run.optimizer.state_dict())
    for group in saved["param_groups"]:
        kept = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "params")}
        group.clear()
        group.update(kept, bias_correction=True, **more)
    for entry in saved["state"].values():
        del entry["step"]
    return saved


@over_setups
@pytest.mark.parametrize("count", [3, torch.tensor(3, dtype=torch.int32), torch.tensor([3.0])])
def test_a_checkpoint_whose_count_is_in_the_group(setup, count):
    """apex: https://github.com/NVIDIA/apex/pull/1615; TransformerEngine, whose count is a tensor
    with capturable: https://github.com/NVIDIA/TransformerEngine/issues/1986. Training goes on as if
    it had never stopped."""
    plain, source = Run(setup, ours=False), Run(setup, ours=False)
    saved = saved_by(source, step=count)
    run = Run(setup, ours=True)
    with torch.no_grad():
        for mine, other in zip(run.params, source.params, strict=True):
            mine.copy_(other)
        plain.step(3)
        for other, mine in zip(plain.params, run.params, strict=True):
            other.copy_(mine)  # a bfloat16 parameter begins at the nearest number
    run.optimizer.load_state_dict(saved)
    run.time = 3
    run.step(2)
    plain.step(2)
    assert_equal_runs(run, plain)


@over_setups
def test_a_checkpoint_whose_empty_group_has_no_count(setup):
    """https://github.com/NVIDIA/TransformerEngine/pull/3318: a group without parameters was never
    counted."""

    def groups(params):
        return [{"params": []}, {"params": params}]

    source = Run(setup, False, groups)
    saved = saved_by(source, step=3)
    for absent in (None, "no key"):
        saved["param_groups"][0]["step"] = absent
        if absent:
            del saved["param_groups"][0]["step"]
        run = Run(setup, True, groups)
        run.optimizer.load_state_dict(saved)
        assert [run.state[param]["step"].item() for param in run.params] == [3] * len(run.params)
        run.step()
        assert [run.state[param]["step"].item() for param in run.params] == [4] * len(run.params)


def adamax(saved):
    for entry in saved["state"].values():
        entry["exp_inf"] = entry.pop("exp_avg_sq")


def lion(saved):
    for group in saved["param_groups"]:
        group.update(eps=0.0)  # some implementations have one
    for entry in saved["state"].values():
        del entry["exp_avg_sq"], entry["step"]


def adabelief(saved):
    for entry in saved["state"].values():
        entry["exp_avg_var"] = entry.pop("exp_avg_sq")


def eight_bit(saved):
    for entry in saved["state"].values():
        entry["state1"], entry["state2"] = entry.pop("exp_avg"), entry.pop("exp_avg_sq")


def sgd(saved):
    for group in saved["param_groups"]:
        del group["betas"], group["eps"]
        group["momentum"] = 0.9
    for entry in saved["state"].values():
        moment = entry["exp_avg"]
        entry.clear()
        entry["momentum_buffer"] = moment


def assert_refused(setup, other) -> None:
    source, run = Run(setup, ours=False), Run(setup, ours=True)
    source.step(2)
    run.step(2)
    saved, before = copy.deepcopy(source.optimizer.state_dict()), tensors_of(run.optimizer)
    other(saved)
    with pytest.raises(ValueError):
        run.optimizer.load_state_dict(saved)
    assert_unchanged(run.optimizer, before)
    run.step()


@over_setups
@pytest.mark.parametrize("other", [adamax, lion, adabelief, eight_bit])
def test_a_checkpoint_of_another_optimizer_is_refused(setup, other):
    """https://github.com/juntang-zhuang/Adabelief-Optimizer/issues/7,
    https://github.com/ultralytics/yolov3/issues/80, https://github.com/pytorch/ao/issues/1044:
    torch loads it and raises KeyError at the next step. Here the load raises and nothing has
    changed."""
    assert_refused(setup, other)


@over_setups
def test_a_checkpoint_of_sgd_is_refused(setup):
    """https://github.com/pytorch/pytorch/issues/7499: its groups have no betas."""
    assert_refused(setup, sgd)


@over_setups
def test_amsgrad_is_turned_on_by_the_options_of_the_run_that_resumes(setup):
    """https://github.com/facebookresearch/fairseq/issues/3965 (KeyError: 'max_exp_avg_sq'): the
    maximum begins at zero, which the next second moment exceeds."""
    source = Run(setup, ours=True)
    source.step(3)
    run = Run(setup, ours=True, amsgrad=True)
    run.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
    run.optimizer.param_groups[0]["amsgrad"] = True
    run.time = 3
    run.step()
    for param in run.params:
        assert torch.equal(run.state[param]["max_exp_avg_sq"], run.state[param]["exp_avg_sq"])
        assert run.state[param]["step"] == 4


@over_setups
def test_keys_that_a_scheduler_made_come_back(setup):
    """https://github.com/pytorch/pytorch/issues/140900: `initial_lr` is saved and loaded like any
    other key."""

    def script(run):
        scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, step_size=1, gamma=0.5)
        for _ in range(2):
            run.step()
            scheduler.step()
        saved, clock = copy.deepcopy(run.optimizer.state_dict()), scheduler.state_dict()
        run.optimizer = run.build(run.params)
        run.optimizer.load_state_dict(saved)
        scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5, last_epoch=1)
        scheduler.load_state_dict(clock)
        run.step()
        scheduler.step()
        run.step()
        group = run.optimizer.param_groups[0]
        return group["initial_lr"], group["lr"]

    assert_like_torch(setup, script)


@over_setups
def test_state_goes_by_position_whatever_the_names(setup):
    """https://github.com/facebookresearch/fairscale/issues/380: numbers in another order than the
    entries; names that differ decide nothing, as in torch."""

    def script(run):
        run.step(2)
        saved = copy.deepcopy(run.optimizer.state_dict())
        saved["state"] = dict(reversed(saved["state"].items()))
        numbers = {old: 100 - old for old in saved["state"]}
        saved["state"] = {numbers[old]: entry for old, entry in saved["state"].items()}
        for group in saved["param_groups"]:
            group["params"] = [numbers[old] for old in group["params"]]
        run.optimizer = run.build([(f"other.{i}", param) for i, param in enumerate(run.params)])
        run.optimizer.load_state_dict(saved)
        run.step(2)
        return run.optimizer.param_groups[0]["param_names"]

    assert_like_torch(setup, script)
