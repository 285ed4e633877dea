"""GradScaler: scale and overflow flag inside the step (torch's contract, part G)."""

import copy
import pickle

import pytest
import torch
from torch import nn
from training import gradient, parameters, results, same_bits

from fused_adam import FusedAdam, FusedAdamW

BACKENDS = ["reference", "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def scaled_training(optimizer, scaler, overflow_at=(), steps=5, unscale_at=()):
    """Losses scaled, some of them infinite, through the scaler's whole protocol."""
    for step in range(steps):
        optimizer.zero_grad()
        factor = float("inf") if step in overflow_at else 1.0
        params = optimizer.param_groups[0]["params"]
        loss = sum((p * gradient(p, i, step)).sum() * factor for i, p in enumerate(params))
        scaler.scale(loss).backward()
        if step in unscale_at:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("fused", [None, True])
@every_backend
def test_g1_g2_training_with_a_scaler_equals_training_without(backend, fused):
    """The scale is a power of two, so the unscaled gradients are the same bits; overflowing steps
    leave no trace.
    """
    scaled = FusedAdamW(parameters(torch.float32), fused=fused, backend=backend)
    scaled_training(
        scaled, torch.amp.GradScaler("cpu", init_scale=1024.0), overflow_at=(0, 3), unscale_at=(2,)
    )
    plain = FusedAdamW(parameters(torch.float32))
    for step in (1, 2, 4):
        for i, p in enumerate(plain.param_groups[0]["params"]):
            p.grad = gradient(p, i, step)
        plain.step()
    assert same_bits(results(scaled), results(plain))
    assert all(r["step"] == 3 for r in results(scaled))


def test_g2_the_scaler_calls_a_fused_step_always_and_others_when_finite():
    for fused, calls in ((True, 3), (None, 2)):
        optimizer = FusedAdam(parameters(torch.float32), fused=fused)
        seen = []
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append(1))
        scaled_training(
            optimizer, torch.amp.GradScaler("cpu", init_scale=8.0), overflow_at=(1,), steps=3
        )
        assert len(seen) == calls
        assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")


def test_g3_closures_are_refused_by_the_scaler():
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(FusedAdam(parameters(torch.float32), fused=True), closure=lambda: 1.0)


@every_backend
def test_g4_a_scale_the_user_sets_is_multiplied_by_the_scalers(backend):
    scaled, plain = (
        FusedAdamW(parameters(torch.float32), fused=True, backend=backend) for _ in range(2)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for optimizer, factor in ((scaled, 4.0), (plain, 1.0)):
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            p.grad = gradient(p, i, 0) * factor * (16.0 if optimizer is scaled else 1.0)
    scaler.scale(torch.ones(()))  # makes its scale
    scaled.grad_scale = torch.full((), 4.0)
    scaler.step(scaled)
    plain.step()
    assert same_bits(results(scaled), results(plain))


@every_backend
def test_g7_scale_and_flag_are_honoured_whatever_fused_says(backend):
    """torch asserts that they are None unless the step is fused."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.full((3,), 8.0)
    optimizer = FusedAdam([param], backend=backend)
    optimizer.grad_scale, optimizer.found_inf = torch.full((), 8.0), torch.zeros(())
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full((3,), 0.1))


@every_backend
def test_g8_unscaled_and_clipped_by_the_user(backend):
    """unscale_, clip_grad_norm_, step: the step neither unscales again nor writes."""
    runs = []
    for fused in (None, True):
        optimizer = FusedAdamW(parameters(torch.float32), fused=fused, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        params = optimizer.param_groups[0]["params"]
        for step in range(2):
            optimizer.zero_grad()
            scaler.scale(
                sum((p * gradient(p, i, step)).sum() for i, p in enumerate(params))
            ).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
        runs.append(results(optimizer))
    assert same_bits(*runs)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("nan")])
@every_backend
def test_g5_g6_any_found_inf_but_zero_skips(backend, found_inf, scale, shape):
    """On two devices the flag is the sum 2.0, which torch's kernels take for "no overflow"."""
    optimizer = FusedAdam([nn.Parameter(torch.ones(3))], fused=True, backend=backend)
    [param] = optimizer.param_groups[0]["params"]
    before = param.detach().clone()
    for flag in (found_inf, 0.0, found_inf):
        param.grad = torch.full((3,), 2.0)
        optimizer.found_inf = torch.full(shape, flag)
        optimizer.grad_scale = None if scale is None else torch.full(shape, scale)
        optimizer.step()
        assert (param.grad == 2).all()  # never rewritten, unlike torch's fused step
        if flag:
            assert torch.equal(param.detach(), before)
        before = param.detach().clone()
    state = optimizer.state[param]
    assert state["step"] == 1
    torch.testing.assert_close(state["exp_avg"], torch.full((3,), 0.1 * 2 / (scale or 1)))


@every_backend
def test_g9_state_exists_after_a_skipped_first_step(backend):
    optimizer = FusedAdam([nn.Parameter(torch.ones(3))], fused=True, backend=backend)
    [param] = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(3)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.state[param]["step"] == 0 and not optimizer.state[param]["exp_avg"].any()


def test_g10_support_is_derived_so_copies_and_checkpoints_keep_it():
    fused, other = (
        FusedAdam(parameters(torch.float32), fused=True),
        FusedAdam(parameters(torch.float32)),
    )
    assert fused._step_supports_amp_scaling and not other._step_supports_amp_scaling
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert twin._step_supports_amp_scaling
    other.load_state_dict(fused.state_dict())
    fused.load_state_dict(FusedAdam(parameters(torch.float32)).state_dict())
    assert fused._step_supports_amp_scaling and other._step_supports_amp_scaling
    assert FusedAdam(
        [{"params": parameters(torch.float32), "fused": True}]
    )._step_supports_amp_scaling


@pytest.mark.parametrize("fused", [None, True])
def test_fp16_gradients_as_in_torch(fused):
    """Only the fused protocol takes them: unscale_ refuses fp16 gradients."""
    optimizer = FusedAdam(parameters(torch.float16), fused=fused, eps=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    if fused:
        scaled_training(optimizer, scaler, steps=2)
        assert all(r["step"] == 2 for r in results(optimizer))
    else:
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            scaled_training(optimizer, scaler, steps=2)
