"""Inputs of public bug reports: gradients that come and go.

report_runs.py says how the tests compare.
"""

import pytest
import torch
from report_runs import assert_like_torch, over_setups
from torch import nn
from training import set_grad


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
