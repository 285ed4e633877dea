"""Inputs of public bug reports: edited groups and state, strange checkpoints, missing gradients.

Each test does the same to our optimizer and to torch's, and compares all parameters and their
state. Where torch goes wrong or raises, it states the right outcome. The docstring has the thread.
`SETUPS` are the optimizers that every test runs on.
"""

import collections
import copy
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import nn
from training import MOMENTS, set_grad, values

import fused_adam
from bench.harness import oracle

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(5,), (3, 4), (40,), (7,)]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


class Setup(NamedTuple):
    """How the optimizer under test is built."""

    backend: str
    flatten: bool
    max_grad_norm: float | None
    precision: str | None = None

    def __str__(self) -> str:
        words = [
            self.backend,
            "flatten" * self.flatten,
            "clip" * (self.max_grad_norm is not None),
            self.precision,
        ]
        return "-".join(filter(None, words))


SETUPS = [
    *(Setup("reference", *choice) for choice in product((False, True), (None, 1.0))),
    # Exact float32 training of bfloat16 parameters: torch's numbers on float32 parameters.
    Setup("reference", False, 1.0, "split32"),
    # Triton's interpreter is slow: each choice once.
    Setup("triton", False, 1.0),
    Setup("triton", True, None, "split32"),
]


over_setups = pytest.mark.parametrize("setup", SETUPS, ids=str)


class Run:
    """One optimizer and its parameters. Gradients depend on a parameter's number and on the time,
    not on its place."""

    def __init__(self, setup: Setup, ours: bool, groups=None, **options) -> None:
        self.setup, self.ours, self.time = setup, ours, 0
        # Torch trains in float32 what a recipe stores in bfloat16: all inputs are bfloat16 numbers.
        self.dtype = BF16 if ours and setup.precision else FP32
        self.numbers: dict[torch.Tensor, int] = {}
        self.params = [self.param(shape) for shape in SHAPES]
        self.groups, self.options = groups, {**OPTIONS, **options}
        self.optimizer = self.build(self.params)

    def build(self, params):
        """Another optimizer of the same kind."""
        members = self.groups(params) if self.groups else params
        if not self.ours:
            return torch.optim.AdamW(members, **self.options)
        return fused_adam.FusedAdamW(members, **self.options, **self.setup._asdict())

    def number(self, param, number: int):
        self.numbers[param] = number
        return param

    def param(self, shape):
        """A new parameter, with a number of its own."""
        number = len(self.numbers)
        return self.number(nn.Parameter(values(shape, number, BF16).to(self.dtype)), number)

    def gradient(self, param):
        seed = 1000 * (self.time + 1) + self.numbers[param]
        return values(param.shape, seed, BF16).to(self.dtype)

    def update(self) -> None:
        """The optimizer's step, with torch's own clipping before it where ours clips inside."""
        if not self.ours and self.setup.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(members(self.optimizer), self.setup.max_grad_norm)
        self.optimizer.step()
        self.time += 1

    def step(self, times: int = 1, without=()) -> None:
        """Ordinary steps; the parameters in `without` get no gradient."""
        for _ in range(times):
            self.optimizer.zero_grad()
            for param in members(self.optimizer):
                if not any(param is other for other in without):
                    set_grad(param, self.gradient(param))
            self.update()

    @property
    def state(self):
        return self.optimizer.state

    def forget(self, params) -> None:
        """Round torch's weights as ours are without their state: a recipe keeps the rest of a
        weight there."""
        if not self.ours and self.setup.precision:
            for param in params:
                param.data = param.data.to(BF16).to(FP32)


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_equal_runs(ours: Run, theirs: Run) -> None:
    """Step counts are equal, and all values as near as rounding lets them be."""
    options = oracle.Options(lr=1e-2, weight_decay=0.1, decoupled=True)
    clip = ours.setup.max_grad_norm is not None  # torch rounds the norm, its inverse, the gradients
    roundings = (1, 8 if clip else 4)
    within = [oracle.tolerance(FP32, theirs.time, options, number) for number in roundings]
    mine, others = members(ours.optimizer), members(theirs.optimizer)
    assert [len(g["params"]) for g in ours.optimizer.param_groups] == [
        len(g["params"]) for g in theirs.optimizer.param_groups
    ]
    weights = mine
    if ours.setup.precision:
        weights = list(ours.optimizer.export_fp32()["params"].values())
    for param, weight, other in zip(mine, weights, others, strict=True):
        got, want = ours.state.get(param, {}), theirs.state.get(other, {})
        assert {key for key in got if key != "remainder"} == set(want)
        assert not want or got["step"] == want["step"]
        pairs = {
            "param": (weight, other),
            **{key: (got[key], want[key]) for key in MOMENTS if key in want},
        }
        for key, (a, b) in pairs.items():
            atol = sum(tolerance[key] for tolerance in within)
            torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=atol, check_dtype=True)


def assert_like_torch(setup: Setup, script: Callable[[Run], object], groups=None) -> None:
    """Run the script on our optimizer and on torch's: both end with the same numbers."""
    runs = [Run(setup, ours, groups) for ours in (True, False)]
    outcomes = [script(run) for run in runs]
    assert outcomes[0] == outcomes[1]
    assert_equal_runs(*runs)


def split_groups(params):
    """Two groups with their own learning rate and decay."""
    return [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3, "weight_decay": 0.0}]


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
    """https://github.com/pytorch/torchtitan/pull/4615: bfloat16 zeros before the first step. What
    is stored is what the optimizer was told to store; torch's CPU paths raise."""
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
    for each in (run, plain):
        each.step(3)
    for a, b in zip(run.params, plain.params, strict=True):
        assert torch.equal(a, b) and run.state[a]["exp_avg"].dtype == FP32
        assert all(torch.equal(run.state[a][key], plain.state[b][key]) for key in plain.state[b])


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


# Checkpoints of other shapes and other optimizers ------------------------------------------------


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
            with torch.device("meta"):
                if first == "load" and time == 0:
                    run.optimizer.load_state_dict(saved)
                run.update()

    assert_like_torch(setup, script)


# Gradients that come and go ----------------------------------------------------------------------


@over_setups
def test_parameters_whose_first_gradient_comes_late(setup):
    """https://github.com/kozistr/pytorch_optimizer/issues/462: module dropout leaves out other
    parameters every step."""

    def script(run):
        for out in ([1, 3], [0], [0, 1, 2], [], [2], [0, 1, 2, 3], [3]):
            run.step(without=[run.params[i] for i in out])

    assert_like_torch(setup, script)


@over_setups
def test_frozen_layers_rest_and_go_on(setup):
    """https://github.com/KellerJordan/Muon/issues/54: no decay, no momentum and no count without a
    gradient."""

    def script(run):
        frozen = run.params[1:3]
        run.step(2)
        for param in frozen:
            param.requires_grad_(False)
        run.step(2, without=frozen)
        for param in frozen:
            param.requires_grad_(True)
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_a_layer_frozen_from_the_start_thaws(setup):
    """https://github.com/mosaicml/composer/issues/1002: it is in the optimizer all the time."""

    def script(run):
        frozen = run.params[:2]
        for param in frozen:
            param.requires_grad_(False)
        run.optimizer = run.build(run.params)
        run.step(2, without=frozen)
        for param in frozen:
            param.requires_grad_(True)
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_gradients_that_are_zero_are_set_to_none(setup):
    """https://github.com/megvii-model/DetNAS/issues/3: paths that were not sampled must neither
    decay nor move."""

    def script(run):
        run.step(2)
        for _ in range(2):
            run.optimizer.zero_grad(set_to_none=False)
            for param in run.params[1:]:
                set_grad(param, run.gradient(param))
            for param in run.params:
                if param.grad is not None and not param.grad.any():
                    param.grad = None
            run.update()

    assert_like_torch(setup, script)


@over_setups
def test_a_gradient_of_zeros_is_a_gradient(setup):
    """https://github.com/pytorch/pytorch/issues/28294: what backward or a reduction wrote counts,
    whatever its value."""

    def script(run):
        run.step(2)
        for _ in range(2):
            run.optimizer.zero_grad()
            for param in run.params:
                set_grad(
                    param,
                    torch.zeros_like(param) if param is run.params[1] else run.gradient(param),
                )
            run.update()

    assert_like_torch(setup, script)


@over_setups
def test_backward_of_zero_times_a_parameter_is_a_gradient(setup):
    """https://github.com/pytorch/pytorch/issues/28294: the trick `loss + 0 * unused.sum()` of DDP
    users."""

    def script(run):
        run.step(2)
        run.optimizer.zero_grad()
        sum((param * (0 if param is run.params[1] else 1)).sum() for param in run.params).backward()
        run.update()

    assert_like_torch(setup, script)


@over_setups
def test_gradients_are_reset_by_hand(setup):
    """https://github.com/rlworkgroup/garage/issues/1990: `param.grad = None` in a loop instead of
    zero_grad()."""

    def script(run):
        run.step()
        for out in (1, 2, 3):
            for param in run.params:
                param.grad = None
            for place, param in enumerate(run.params):
                if place != out:
                    set_grad(param, run.gradient(param))
            run.update()

    assert_like_torch(setup, script)


@over_setups
def test_the_model_resets_gradients(setup):
    """https://github.com/facebookresearch/fairscale/issues/354: nn.Module.zero_grad() parts
    gradients from buckets."""

    def script(run):
        model = nn.ParameterList(run.params)
        run.step()
        for out in (1, 2):
            model.zero_grad()
            for place, param in enumerate(run.params):
                if place != out:
                    set_grad(param, run.gradient(param))
            run.update()
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
@pytest.mark.parametrize("call", ["plain", "positional", "keyword"])
def test_every_way_to_call_zero_grad(setup, call):
    """https://github.com/NVIDIA/apex/pull/1579: zero_grad() without arguments, zero_grad(True),
    set_to_none=True."""

    def script(run):
        run.step()
        for _ in range(2):
            if call == "plain":
                run.optimizer.zero_grad()
            elif call == "positional":
                run.optimizer.zero_grad(True)
            else:
                run.optimizer.zero_grad(set_to_none=True)
            for param in run.params[1:]:
                set_grad(param, run.gradient(param))
            run.update()

    assert_like_torch(setup, script)


@over_setups
def test_a_missing_gradient_among_flat_ones(setup):
    """https://github.com/NVIDIA/apex/issues/131: one parameter never takes part."""

    def script(run):
        run.step(3, without=[run.params[2]])
        return len(run.state)

    assert_like_torch(setup, script)


@over_setups
def test_a_step_before_any_gradient(setup):
    """https://github.com/pytorch/pytorch/issues/150610: neither decay nor state."""

    def script(run):
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.optimizer.step()
        run.step(2)

    assert_like_torch(setup, script)


@over_setups
def test_gradients_that_stay_are_stepped_again(setup):
    """Without zero_grad() the same gradient counts twice:
    https://github.com/pytorch/pytorch/pull/42754."""

    def script(run):
        run.step()
        for _ in range(2):
            run.update() if run.setup.max_grad_norm is None else run.step()

    assert_like_torch(setup, script)
