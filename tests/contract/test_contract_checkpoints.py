"""torch's tests of checkpoints and hooks, in own words, on both classes."""

import copy
import warnings

import pytest
import torch
from class_pairs import backward, both_classes, flat_or_not, network
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fused_adam import FusedAdam, FusedAdamW


@both_classes
@flat_or_not
class TestCheckpoints:
    def test_older_state_dicts_load(self, ours, theirs, flatten):
        newer = ("maximize", "foreach", "fused", "differentiable", "capturable")
        optimizer = ours(network().parameters(), lr=0.1, flatten=flatten)
        backward(optimizer)
        optimizer.step()
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for key in newer:
                del group[key]
        optimizer.load_state_dict(old)
        assert all(key in optimizer.param_groups[0] for key in newer)
        backward(optimizer)
        optimizer.step()

    @pytest.mark.parametrize(("named", "loads_named"), [(False, True), (True, False), (True, True)])
    def test_named_and_unnamed_state_dicts(self, ours, theirs, flatten, named, loads_named):
        model = network()
        params = model.named_parameters() if named else model.parameters()
        other = (
            [(f"other.{n}", p) for n, p in network().named_parameters()]
            if loads_named
            else network().parameters()
        )
        a, b = ours(params, flatten=flatten), ours(other, flatten=flatten, lr=0.5)
        backward(b)
        b.step()
        a.load_state_dict(b.state_dict())
        names = a.param_groups[0].get("param_names")
        if loads_named:
            assert names == [f"other.{n}" for n, _ in model.named_parameters()]
        else:
            assert names == [n for n, _ in model.named_parameters()]
        assert a.param_groups[0]["lr"] == 0.5
        backward(a)
        a.step()

    def test_a_plain_number_for_the_step_loads(self, ours, theirs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten)
        backward(optimizer)
        optimizer.step()
        state = optimizer.state_dict()
        for entry in state["state"].values():
            entry["step"] = entry["step"].item()
        optimizer.load_state_dict(state)
        assert all(
            torch.is_tensor(entry["step"]) and entry["step"] == 1
            for entry in optimizer.state.values()
        )

    def test_decoupled_decay_between_adam_and_adamw(self, ours, theirs, flatten):
        """An Adam keeps what an AdamW's checkpoint says; an AdamW stays one whatever it loads."""
        adamw = FusedAdamW(network().parameters(), flatten=flatten)
        adam = FusedAdam(network().parameters(), flatten=flatten)
        adam.load_state_dict(adamw.state_dict())
        assert adam.param_groups[0]["decoupled_weight_decay"] is True
        adamw.load_state_dict(FusedAdam(network().parameters()).state_dict())
        assert adamw.param_groups[0]["decoupled_weight_decay"] is True
        with_default = FusedAdam(network().parameters())
        with_default.load_state_dict(theirs(network().parameters()).state_dict())
        assert with_default.param_groups[0]["decoupled_weight_decay"] is (
            theirs is torch.optim.AdamW
        )

    def test_load_casts_to_the_parameters_dtype_and_device(self, ours, theirs, flatten):
        source = theirs(network(torch.float64).parameters())
        backward(source)
        source.step()
        target = ours(network(torch.float32).parameters(), flatten=flatten)
        target.load_state_dict(source.state_dict())
        for entry in target.state.values():
            assert (
                entry["exp_avg"].dtype
                == entry["exp_avg_sq"].dtype
                == entry["step"].dtype
                == torch.float32
            )
        backward(target)
        target.step()

    @pytest.mark.parametrize("prepend", [False, True])
    def test_hooks_on_state_dicts(self, ours, theirs, flatten, prepend):
        optimizer = ours(network().parameters(), lr=0.1, flatten=flatten)
        backward(optimizer)
        optimizer.step()
        order = []

        def replace_lr(optimizer, state):
            order.append("replace")
            state["param_groups"][0]["lr"] = 0.002

        optimizer.register_load_state_dict_pre_hook(lambda o, s: order.append("first"))
        handle = optimizer.register_load_state_dict_pre_hook(replace_lr, prepend=prepend)
        optimizer.register_load_state_dict_post_hook(
            lambda o: order.append(o.param_groups[0]["lr"])
        )
        optimizer.load_state_dict(optimizer.state_dict())
        assert order == (["replace", "first", 0.002] if prepend else ["first", "replace", 0.002])
        handle.remove()
        optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
        assert optimizer.state_dict()["extra"] == 1


@both_classes
@flat_or_not
class TestHooks:
    def test_order_of_step_hooks(self, ours, theirs, flatten):
        data = []
        handles = [
            register_optimizer_step_pre_hook(lambda o, args, kwargs: data.append(0)),
            register_optimizer_step_post_hook(lambda o, args, kwargs: data.append(5)),
        ]
        optimizer = ours(network().parameters(), flatten=flatten)
        optimizer.register_step_pre_hook(lambda o, args, kwargs: data.append(1))
        optimizer.register_step_post_hook(lambda o, args, kwargs: data.append(2))
        optimizer.step()
        for handle in handles:
            handle.remove()
        optimizer.step()
        assert data == [0, 1, 2, 5, 1, 2]  # once each, also without gradients

    def test_pre_hooks_may_replace_arguments(self, ours, theirs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten)
        seen = []

        def closure():
            seen.append("closure")
            return torch.ones(())

        handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
        assert optimizer.step() == 1 and seen == ["closure"]
        handle.remove()
        optimizer.register_step_pre_hook(lambda o, args, kwargs: 5)
        with pytest.raises(RuntimeError, match=r"must return None or a tuple of .*but got 5"):
            optimizer.step()

    def test_names_in_the_profiler(self, ours, theirs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten)
        backward(optimizer)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
            optimizer.zero_grad()
        names = {event.name for event in profile.events()}
        assert f"Optimizer.step#{ours.__name__}.step" in names
        assert f"Optimizer.zero_grad#{ours.__name__}.zero_grad" in names

    def test_keyword_closure_and_hooks_after_schedulers(self, ours, theirs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps step
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backward(optimizer)
            assert optimizer.step(closure=None) is None
            assert optimizer.step(closure=lambda: 3.0) == 3.0
