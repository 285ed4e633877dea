"""Inputs of public bug reports: state that is edited, moved or replaced, and others' defaults.

report_runs.py says how the tests compare.
"""

import collections
import copy

import pytest
import torch
from report_runs import BF16, FP32, Run, assert_like_torch, members, over_setups
from training import set_grad

# State that is edited, moved or replaced ---------------------------------------------------------


@over_setups
def test_state_goes_to_the_host_and_back(setup):
    """https://github.com/pytorch/pytorch/issues/41839: every tensor of every entry is replaced by a
    copy, twice."""

    def script(run):
        run.step(2)
        for _ in range(2):
            for entry in run.state.values():
                for key, value in entry.items():
                    entry[key] = value.to("cpu", copy=True)
            run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_state_moves_through_entries_held_from_before(setup):
    """https://github.com/PrimeIntellect-ai/prime-rl/pull/3258: the offloader keeps the entries, not
    the optimizer."""

    def script(run):
        run.step(2)
        entries = list(run.state.values())
        run.step()
        for factor in (0.5, 2.0):
            for entry in entries:
                for key in ("exp_avg", "exp_avg_sq"):
                    entry[key] = entry[key] * factor
            run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_state_is_stepped_in_the_buffers_it_was_put_in(setup):
    """https://github.com/PrimeIntellect-ai/prime-rl/pull/3552: buffers that are kept, filled and
    put into entries."""

    def script(run):
        run.step(2)
        buffers = {}
        for param in run.params:
            for key in ("exp_avg", "exp_avg_sq"):
                buffers[param, key] = run.state[param][key].clone()
                run.state[param][key] = buffers[param, key]
        run.step(2)
        held = [run.state[param][key] for param, key in buffers]
        pairs = zip(held, buffers.values(), strict=True)
        return [a.data_ptr() == b.data_ptr() for a, b in pairs]

    assert_like_torch(setup, script)


@over_setups
def test_moments_in_shared_memory_are_stepped_there(setup):
    """https://github.com/MorvanZhou/pytorch-A3C/issues/2: state is made by hand before the first
    step, and shared."""

    def script(run):
        shared = []
        for param in run.params:
            entry = run.state[param]
            entry["step"] = torch.zeros(()).share_memory_()
            for key in ("exp_avg", "exp_avg_sq"):
                entry[key] = torch.zeros(param.shape).share_memory_()
                shared.append(entry[key])
        run.step(2)
        held = [run.state[param][key] for param in run.params for key in ("exp_avg", "exp_avg_sq")]
        pairs = zip(held, shared, strict=True)
        return [a.data_ptr() == b.data_ptr() and b.is_shared() for a, b in pairs]

    assert_like_torch(setup, script)


@over_setups
def test_state_that_is_asked_for_before_the_first_step(setup):
    """https://github.com/verl-project/verl/pull/299: offloading an optimizer without state leaves
    empty entries."""

    def script(run):
        for param in run.params:
            for key, value in run.state[param].items():
                run.state[param][key] = value.to("cpu")
        run.step(3)

    assert_like_torch(setup, script)


@over_setups
def test_state_is_replaced_by_a_dict_of_the_same_entries(setup):
    """https://github.com/pytorch/pytorch/issues/1488: `o.state = defaultdict(dict, o.state)`."""

    def script(run):
        run.step(2)
        run.optimizer.state = collections.defaultdict(dict, run.optimizer.state)
        run.step(2)
        run.optimizer.param_groups[0]["params"].append(run.param((6,)))
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_state_is_replaced_by_an_empty_dict(setup):
    """https://github.com/allenai/OLMo/pull/314: moments and counters begin anew."""

    def script(run):
        run.step(3)
        run.optimizer.state = collections.defaultdict(dict)
        run.forget(run.params)
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_moments_are_reset_by_new_zeros(setup):
    """https://github.com/Guitaricet/relora/issues/10: counters go on."""

    def script(run):
        run.step(3)
        for group in run.optimizer.param_groups:
            for param in group["params"]:
                entry = run.state[param]
                entry["exp_avg"] = torch.zeros(param.shape)
                entry["exp_avg_sq"] = torch.zeros(param.shape)
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_moments_are_pruned_in_place(setup):
    """https://github.com/axolotl-ai-cloud/axolotl/pull/1414: small ones become zero, through
    entries held before."""

    def script(run):
        run.step(3)
        moments = [entry[key] for entry in run.state.values() for key in ("exp_avg", "exp_avg_sq")]
        run.step()
        for moment in moments:
            moment.mul_(torch.arange(moment.numel()).view_as(moment) % 2)
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_the_entry_of_one_parameter_is_deleted(setup):
    """https://github.com/deepspeedai/DeepSpeed/issues/5615: that parameter begins anew, the others
    go on."""

    def script(run):
        run.step(3)
        del run.state[run.params[1]]
        run.forget(run.params[1:2])
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
@pytest.mark.parametrize("how", ["in place", "replaced", "number"])
def test_a_dummy_step_that_makes_state_is_taken_back(setup, how):
    """https://github.com/pytorch/torchtitan/pull/4382 and
    https://github.com/NVIDIA/Megatron-LM/pull/5976: a step with zero gradients, no rate and no
    decay, after which counters are reset: the first real step is number one."""

    def script(run):
        held = [(group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups]
        for group in run.optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        for param in run.params:
            param.grad = torch.zeros_like(param)
        run.optimizer.step()
        for group, (lr, weight_decay) in zip(run.optimizer.param_groups, held, strict=True):
            group.update(lr=lr, weight_decay=weight_decay)
        for entry in run.state.values():
            if how == "in place":
                entry["step"].zero_()
            else:
                entry["step"] = torch.tensor(0.0 if how == "replaced" else 0)
        run.step(3)

    assert_like_torch(setup, script)


@over_setups
def test_a_shallow_copy_shares_state_with_the_original(setup):
    """https://github.com/mlverse/torch/issues/1028: `copy.copy(optimizer)`, and then steps on
    either."""

    def script(run):
        run.step(2)
        original, twin = run.optimizer, copy.copy(run.optimizer)
        for optimizer in (twin, original, twin, twin, original):
            run.optimizer = optimizer
            run.step()
        return [each.state[run.params[0]]["step"].item() for each in (original, twin)]

    assert_like_torch(setup, script)


@over_setups
def test_a_hook_that_makes_moments_of_another_dtype(setup):
    """https://github.com/pytorch/torchtitan/pull/4615: bfloat16 zeros before the first step stay
    bfloat16, as with that recipe, unless another is given; torch's CPU paths raise."""
    run, plain = Run(setup, ours=True), Run(setup, ours=True)

    def make_state(optimizer, args, kwargs):
        for param in members(optimizer):
            if not optimizer.state[param]:
                optimizer.state[param].update(
                    step=torch.zeros(()),
                    exp_avg=torch.zeros(param.shape, dtype=BF16),
                    exp_avg_sq=torch.zeros(param.shape, dtype=BF16),
                )

    run.optimizer.register_step_pre_hook(make_state)
    for group in plain.optimizer.param_groups:
        group["precision"] = group.get("precision") or "native-bf16"  # a recipe is kept
    for each in (run, plain):
        each.step(3)
    for a, b in zip(run.params, plain.params, strict=True):
        assert torch.equal(a, b) and run.state[a].keys() == plain.state[b].keys()
        for key, value in plain.state[b].items():
            assert run.state[a][key].dtype == value.dtype
            assert torch.equal(run.state[a][key], value)


@over_setups
@pytest.mark.parametrize("missing", ["exp_avg", "exp_avg_sq"])
def test_an_entry_that_lacks_a_moment_is_refused(setup, missing):
    """https://github.com/kozistr/pytorch_optimizer/issues/462: half an entry is a mistake (torch:
    KeyError), and zeros in the place of what is missing would be wrong without a word."""
    run = Run(setup, ours=True)
    run.step(2)
    held = run.state[run.params[1]].pop(missing)
    weights = [param.detach().clone() for param in run.params]
    with pytest.raises(ValueError) as error:
        run.step()
    assert repr(missing) in str(error.value) and "parameter 1" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(weights, run.params, strict=True))
    assert [run.state[param]["step"].item() for param in run.params] == [2] * len(run.params)
    run.state[run.params[1]][missing] = held
    run.step()
    assert [run.state[param]["step"].item() for param in run.params] == [3] * len(run.params)


# Defaults that somebody else has set --------------------------------------------------------------


@over_setups
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_default_dtype_rounds_no_count(setup, dtype):
    """https://github.com/pytorch/pytorch/issues/110940: loaders of models set it; bfloat16 has no
    1001."""

    def script(run):
        run.step()
        saved = copy.deepcopy(run.optimizer.state_dict())
        for entry in saved["state"].values():
            entry["step"] = torch.tensor(1001.0 if dtype == BF16 else 2049.0)
        torch.set_default_dtype(dtype)
        try:
            run.optimizer.load_state_dict(saved)
            run.step(2)
        finally:
            torch.set_default_dtype(FP32)

    assert_like_torch(setup, script)


@over_setups
@pytest.mark.parametrize("first", ["load", "step"])
def test_a_default_device_changes_nothing(setup, first):
    """https://github.com/pytorch/pytorch/issues/113758: tensors made without a device. Here the
    default is "meta", which has no values: whatever is made on it by mistake raises."""

    def script(run):
        if first == "load":
            run.step()
            saved = copy.deepcopy(run.optimizer.state_dict())
        for time in range(3):
            run.optimizer.zero_grad()
            for param in run.params:
                set_grad(param, run.gradient(param))
            # torch 2.11 makes its own step counters there.
            with torch.device("meta" if run.ours else "cpu"):
                if first == "load" and time == 0:
                    run.optimizer.load_state_dict(saved)
                run.update()

    assert_like_torch(setup, script)
