"""Inputs of public bug reports: groups that are edited, and parameters that are replaced.

report_runs.py says how the tests compare.
"""

import copy

import pytest
import torch
from report_runs import BF16, assert_like_torch, members, over_setups
from torch import nn
from training import values


def split_groups(params):
    """Two groups with their own learning rate and decay."""
    return [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3, "weight_decay": 0.0}]


# Groups that are edited between steps ------------------------------------------------------------


@over_setups
def test_a_parameter_moves_to_another_group(setup):
    """It takes its state along and obeys the new group:
    https://github.com/roboflow/rf-detr/pull/1409 (regrouping)."""

    def script(run):
        run.step(2)
        first, second = run.optimizer.param_groups
        second["params"].insert(1, first["params"].pop(0))
        run.step(3)

    assert_like_torch(setup, script, split_groups)


@over_setups
def test_groups_change_places(setup):
    """`param_groups.reverse()`, and the parameters within:
    https://github.com/pytorch/pytorch/issues/1489 (order)."""

    def script(run):
        run.step(2)
        run.optimizer.param_groups.reverse()
        run.step(2)
        for group in run.optimizer.param_groups:
            group["params"].reverse()
        run.step(2)

    assert_like_torch(setup, script, split_groups)


@over_setups
def test_parameters_change_places_with_equal_shapes(setup):
    """Same count, same shapes, other order: nothing but identity tells.
    https://github.com/pytorch/pytorch/issues/1489"""

    def script(run):
        one, two = run.param((6,)), run.param((6,))
        run.optimizer.add_param_group({"params": [one, two], "lr": 3e-3})
        run.step(2)
        run.step(without=[one])
        run.optimizer.param_groups[1]["params"][:] = [two, one]
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_the_list_of_a_group_is_replaced(setup):
    """A new list with a new parameter in the middle, behind the optimizer's back:
    https://github.com/mosaicml/composer/pull/249."""

    def script(run):
        run.step(2)
        group = run.optimizer.param_groups[0]
        group["params"] = [*group["params"][:2], run.param((9,)), *group["params"][2:]]
        run.step(3)

    assert_like_torch(setup, script)


@over_setups
def test_a_group_is_appended_by_hand(setup):
    """Without add_param_group, with all keys: https://github.com/mosaicml/composer/pull/249."""

    def script(run):
        run.step(2)
        first = run.optimizer.param_groups[0]
        group = {**first, "params": [run.param((6,)), run.param((2, 2))], "lr": 3e-3}
        run.optimizer.param_groups.insert(0, group)
        run.step(3)

    assert_like_torch(setup, script)


@over_setups
def test_groups_are_replaced_through_setstate(setup):
    """`optimizer.__setstate__({"param_groups": ...})`:
    https://github.com/IntelLabs/distiller/issues/35."""

    def script(run):
        run.step(2)
        first = run.optimizer.param_groups[0]
        groups = [
            {**first, "params": first["params"][2:], "lr": 3e-3},
            {**first, "params": first["params"][:2]},
        ]
        run.optimizer.__setstate__({"param_groups": groups})
        run.step(3)
        return run.optimizer.param_groups is groups

    assert_like_torch(setup, script)


@over_setups
def test_a_reference_to_the_groups_from_before_loading(setup):
    """It is stale afterwards, as in torch: https://github.com/NVIDIA/apex/issues/766."""

    def script(run):
        run.step(2)
        held = run.optimizer.param_groups
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        held[0]["lr"] = 3e-3
        run.step(2)
        return held is run.optimizer.param_groups, run.optimizer.param_groups[0]["lr"]

    assert_like_torch(setup, script)


@over_setups
def test_a_parameter_leaves_and_comes_back(setup):
    """Its state waits for it: https://github.com/mosaicml/composer/issues/1002 (frozen layers leave
    their groups)."""

    def script(run):
        run.step(2)
        params = run.optimizer.param_groups[0]["params"]
        gone = params.pop(1)
        gone.grad = None
        run.step(2)
        params.append(gone)
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_a_parameter_leaves_and_its_state_stays(setup):
    """`state_dict()` raises KeyError as in torch, until the entry is deleted:
    https://github.com/pytorch/pytorch/issues/42428."""

    def script(run):
        run.step(2)
        gone = run.optimizer.param_groups[0]["params"].pop(1)
        run.step()
        with pytest.raises(KeyError):
            run.optimizer.state_dict()
        del run.state[gone]
        saved = run.optimizer.state_dict()
        run.step()
        return list(saved["state"]), saved["param_groups"][0]["params"]

    assert_like_torch(setup, script)


@over_setups
def test_parameters_already_there_in_a_new_group(setup):
    """Refused with torch's text, and nothing changes:
    https://github.com/speediedan/finetuning-scheduler/issues/30."""

    def script(run):
        run.step(2)
        with pytest.raises(ValueError, match="appear in more than one parameter group") as error:
            run.optimizer.add_param_group({"params": [run.param((2,)), run.params[1]]})
        run.step(2)
        return str(error.value), len(run.optimizer.param_groups)

    assert_like_torch(setup, script)


@over_setups
def test_a_group_that_was_added_is_there_before_its_checkpoint_loads(setup):
    """https://github.com/Lightning-AI/pytorch-lightning/issues/6891: torch's text without the
    group, and with it training goes on."""

    def script(run):
        run.step(2)
        run.optimizer.add_param_group({"params": [run.param((6,))], "lr": 3e-3})
        run.step(2)
        saved = copy.deepcopy(run.optimizer.state_dict())
        params = members(run.optimizer)
        run.optimizer = run.build(run.params)
        with pytest.raises(ValueError, match="different number of parameter groups"):
            run.optimizer.load_state_dict(saved)
        run.optimizer.add_param_group({"params": params[-1:]})
        run.optimizer.load_state_dict(saved)
        run.step(2)
        return run.optimizer.param_groups[1]["lr"]

    assert_like_torch(setup, script)


# Parameters that are replaced --------------------------------------------------------------------


def replace(run, place, change):
    """Replace the parameter at `place` and every tensor of its entry that has its shape, as pruning
    code does."""
    params = run.optimizer.param_groups[0]["params"]
    old = params[place]
    new = nn.Parameter(change(old.detach(), "param"))
    entry = run.state.pop(old)
    for key, value in entry.items():
        if value.shape == old.shape:
            entry[key] = change(value, key)
    params[place] = run.number(new, run.numbers[old])
    run.state[new] = entry


@over_setups
def test_rows_are_pruned_with_their_state(setup):
    """https://github.com/graphdeco-inria/gaussian-splatting/issues/897: a mask over parameter and
    moments."""

    def script(run):
        run.step(3)
        replace(run, 2, lambda tensor, key: tensor[torch.arange(40) % 3 != 0])
        run.step(3)

    assert_like_torch(setup, script)


@over_setups
def test_rows_are_added_with_empty_state(setup):
    """https://github.com/graphdeco-inria/gaussian-splatting/issues/897: densification concatenates
    zeros to moments."""

    def script(run):
        def grow(tensor, key):
            more = values((8,), 99, BF16) if key == "param" else torch.zeros(8)
            return torch.cat([tensor, more.to(tensor.dtype)])

        run.step(3)
        replace(run, 2, grow)
        run.step(3)

    assert_like_torch(setup, script)


@over_setups
def test_columns_are_pruned_with_their_state(setup):
    """https://github.com/FasterAI-Labs/fasterai/pull/93: `index_select` on a dimension; the counter
    stays."""

    def script(run):
        run.step(3)
        replace(run, 1, lambda tensor, key: tensor.index_select(1, torch.tensor([3, 0])))
        run.step(3)

    assert_like_torch(setup, script)


@over_setups
def test_state_moves_to_a_parameter_of_the_same_shape(setup):
    """https://github.com/huggingface/accelerate/pull/4141: `state[new] = state.pop(old)` for every
    parameter."""

    def script(run):
        run.step(3)
        for place in range(len(run.params)):
            replace(run, place, lambda tensor, key: tensor.clone() if key == "param" else tensor)
        run.step(3)

    assert_like_torch(setup, script)


@over_setups
def test_flat_partitions_take_the_parameters_places(setup):
    """https://github.com/deepspeedai/DeepSpeed/issues/169: ZeRO replaces the lists before the first
    step."""

    def script(run):
        whole = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in run.params]))
        run.optimizer.param_groups[0]["params"] = [run.number(whole, 50)]
        run.step(3)

    assert_like_torch(setup, script)
