"""The ordinary training loop: groups, closures, schedulers, missing gradients, copies."""

import copy
import pickle

import pytest
import torch
from next_to_torch import BACKENDS, FLATTEN, close, pair
from torch import nn
from training import gradient, parameters, results, same_bits, train, values

from fused_adam import FusedAdam, FusedAdamW


def test_is_a_torch_adam():
    adam, adamw = FusedAdam([torch.zeros(1)]), FusedAdamW([torch.zeros(1)])
    assert isinstance(adam, torch.optim.Adam) and not isinstance(adam, torch.optim.AdamW)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(adamw, FusedAdam)
    for ours, theirs in (
        (adam, torch.optim.Adam([torch.zeros(1)])),
        (adamw, torch.optim.AdamW([torch.zeros(1)])),
    ):
        assert ours.defaults == theirs.defaults and list(ours.defaults) == list(theirs.defaults)
        assert list(ours.param_groups[0]) == list(theirs.param_groups[0])


@pytest.mark.parametrize("flatten", FLATTEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_param_groups_have_their_own_options(backend, flatten):
    runs = []
    for cls, extra in (
        (FusedAdam, {"backend": backend, "flatten": flatten}),
        (torch.optim.Adam, {}),
    ):
        params = parameters(torch.float32, [(5,), (6,), (7,), (8,)])
        groups = [
            {"params": params[0], "lr": 1e-2},
            {"params": params[1:2], "betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": True},
            {"params": params[2:3], "weight_decay": 0.1, "maximize": True},
            {"params": params[3:], "weight_decay": 0.1, "decoupled_weight_decay": True},
        ]
        runs.append(cls(groups, lr=1e-3, **extra))
        train(runs[-1], 5)
    close(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_param_group_after_steps(backend):
    a, b = pair(backend=backend)
    for optimizer in (a, b):
        train(optimizer, 3)
        optimizer.add_param_group({"params": parameters(torch.float32, [(9,)]), "lr": 0.1})
        train(optimizer, 2)
    assert [r["step"].item() for r in results(a)] == [5, 5, 2]
    close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_gradients_are_skipped(backend):
    """Nothing of them changes, and they have no state; state appears with the first gradient."""
    a, b = pair(((5,), (6,), (7,)), backend=backend)
    for optimizer in (a, b):
        params = optimizer.param_groups[0]["params"]
        for step in range(6):
            for index, p in enumerate(params):
                p.grad = gradient(p, index, step)
            if step in (0, 3):
                params[1].grad = None
            if step >= 2:
                params[2].grad = None
            optimizer.step()
            if step == 0:
                assert params[1] not in optimizer.state and len(optimizer.state) == 2
    assert [r["step"].item() for r in results(a)] == [6, 4, 2]
    close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_steps_large_parameters_that_end_within_a_slot(dtype):
    """They are not copied. Compiled code takes whole slots only: the rest goes through a copy."""
    arena = torch.full((20037,), 7.0, dtype=dtype)
    runs = []
    for backend in ("compiled", "reference"):
        memory = arena.clone()
        param = memory[16:-16].copy_(values((20005,), 0, dtype)).requires_grad_()
        optimizer = FusedAdamW([param], lr=0.1, amsgrad=True, backend=backend)
        train(optimizer, 3)
        assert (memory[:16] == 7).all() and (memory[-16:] == 7).all()
        runs.append(results(optimizer))
    assert same_bits(*runs)


def test_step_without_any_gradient_does_nothing():
    a, _ = pair()
    before = results(a)
    assert a.step() is None
    assert same_bits(results(a), before) and not a.state


@pytest.mark.parametrize("flatten", FLATTEN)
def test_frozen_and_unfrozen_layers_keep_their_counters(flatten):
    a, b = pair(((5,), (6,)), flatten=flatten, weight_decay=0.1)
    for optimizer in (a, b):
        frozen = optimizer.param_groups[0]["params"][1]
        for step in range(7):
            frozen.requires_grad_(not 3 <= step < 5)
            optimizer.zero_grad()
            for index, p in enumerate(optimizer.param_groups[0]["params"]):
                if p.requires_grad:
                    (p * gradient(p, index, step)).sum().backward()
            optimizer.step()
    assert [r["step"].item() for r in results(a)] == [7, 5]
    close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_be_mixed_in_one_group(backend):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    mixed = [parameters(dtype, [(20,)])[0] for dtype in dtypes]
    optimizer = FusedAdam(mixed, lr=0.1, backend=backend)
    alone = [FusedAdam(parameters(dtype, [(20,)]), lr=0.1) for dtype in dtypes]
    for step in range(3):
        for p, single in zip(mixed, alone, strict=True):
            p.grad = gradient(p, 0, step)
            single.param_groups[0]["params"][0].grad = gradient(p, 0, step)
            single.step()
        optimizer.step()
    got = results(optimizer)
    assert same_bits(got[:3], [results(single)[0] for single in alone[:3]])
    torch.testing.assert_close(
        got[3]["param"], results(alone[3])[0]["param"], rtol=1e-15, atol=1e-15
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_parameters_are_pairs_of_real_ones(backend):
    real = values((6, 4, 2), 0, torch.float32)
    a = torch.view_as_complex(real.clone()).requires_grad_()
    b = real.clone().requires_grad_()
    ours, expected = FusedAdam([a], backend=backend), FusedAdam([b])
    for step in range(3):
        grad = gradient(b, 0, step)
        a.grad, b.grad = torch.view_as_complex(grad.clone()), grad
        if step == 1:  # a lazily conjugated gradient
            a.grad = a.grad.conj().resolve_conj().conj()
        ours.step()
        expected.step()
    assert a.dtype == ours.state[a]["exp_avg"].dtype == torch.complex64
    assert torch.equal(torch.view_as_real(a.detach()), b.detach())
    assert torch.equal(
        torch.view_as_real(ours.state[a]["exp_avg_sq"]), expected.state[b]["exp_avg_sq"]
    )


def test_closure_is_run_with_gradients_and_its_loss_returned():
    param = nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], lr=0.1)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1 and (param < 1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),  # changes betas too
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: (t + 1) / 10),
    ],
)
@pytest.mark.parametrize("flatten", FLATTEN)
def test_schedulers(make, flatten):
    a, b = pair(flatten=flatten, lr=1e-2)
    for optimizer in (a, b):
        scheduler = make(optimizer)
        train(optimizer, 10, after=lambda _, s=scheduler: s.step())
    close(a, b, atol=3e-6)


def test_lr_and_betas_as_tensors():
    lr, betas = torch.tensor(1e-2), (torch.tensor(0.8), torch.tensor(0.99))
    for backend in BACKENDS:
        a = FusedAdam(parameters(torch.float32), lr=lr.clone(), betas=betas, backend=backend)
        b = FusedAdam(
            parameters(torch.float32), lr=lr.item(), betas=(betas[0].item(), betas[1].item())
        )
        for step in range(4):
            a.param_groups[0]["lr"].fill_(0.01 * (step + 1))
            b.param_groups[0]["lr"] = torch.tensor(0.01 * (step + 1)).item()
            train(a, 1, first=step)
            train(b, 1, first=step)
        assert same_bits(results(a), results(b))


def test_differentiable_goes_through_torch():
    gradients = []
    for cls in (FusedAdam, torch.optim.Adam):
        lr = torch.tensor(0.1, requires_grad=True)
        param = torch.ones(3, requires_grad=True).clone()
        optimizer = cls([param], lr=lr, differentiable=True)
        param.grad = torch.ones(3, requires_grad=True)
        optimizer.step()
        gradients += torch.autograd.grad(param.sum(), lr)
    assert gradients[0] == gradients[1] and gradients[0].round() == -3


def test_autograd_notices_that_a_step_changed_a_saved_tensor():
    for backend in BACKENDS:
        param = nn.Parameter(torch.ones(3))
        optimizer = FusedAdam([param], backend=backend)
        loss = (param * param).sum()
        param.grad = torch.ones(3)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_copies_continue_alike():
    for flatten in FLATTEN:
        a, _ = pair(flatten=flatten)
        train(a, 2)
        for twin in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
            assert twin._backend == a._backend and twin._flatten == flatten
            train(twin, 2, first=2)
            original = copy.deepcopy(a)
            train(original, 2, first=2)
            assert same_bits(results(twin), results(original))


def test_names_of_parameters_are_kept():
    module = nn.Linear(2, 3)
    optimizer = FusedAdam(module.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_state_is_made_on_a_gpu_that_is_not_the_current_one(monkeypatch):
    """torch's `__dlpack__` raises there; the second GPU is missing here, so it raises for all."""

    def refuse(self, **kwargs):
        raise BufferError("Can't export tensors on a different CUDA device index")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", refuse)
    for flatten in (False, True):
        optimizer = FusedAdam(parameters(torch.float32), flatten=flatten)
        train(optimizer, 1)
        assert all(entry["step"] == 1 for entry in optimizer.state.values())
