"""torch's tests of groups, inference mode and zero_grad, in own words, on both classes."""

import pytest
import torch
from class_pairs import backward, both_classes, flat_or_not, network, params_of

from fused_adam import FusedAdam


@both_classes
@flat_or_not
class TestGroups:
    @pytest.mark.parametrize(
        "schedulers",
        [
            [lambda o: torch.optim.lr_scheduler.StepLR(o, gamma=0.9, step_size=10)],
            [
                lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4),
                lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9),
            ],
            [lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5)],
        ],
    )
    def test_param_group_with_schedulers_goes_in_the_right_direction(
        self, ours, theirs, flatten, schedulers
    ):
        weight, bias, x = (
            torch.randn(10, 5).requires_grad_(),
            torch.randn(10).requires_grad_(),
            torch.randn(5),
        )
        optimizer = ours(
            [{"params": weight}, {"params": bias, "lr": 0.01}], lr=0.05, flatten=flatten
        )
        schedulers = [make(optimizer) for make in schedulers]

        def closure():
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss.backward()
            return loss

        before = closure().item()
        for _ in range(20):
            optimizer.step(closure)
            for scheduler in schedulers:
                scheduler.step()
        assert closure().item() < before

    def test_weight_decay_and_lr_of_groups(self, ours, theirs, flatten):
        runs = []
        for cls, extra in ((ours, {"flatten": flatten}), (theirs, {})):
            model = network()
            optimizer = cls(
                [
                    {"params": model[0].parameters(), "weight_decay": 0.3},
                    {"params": model[2].parameters(), "lr": 1e-28},
                ],
                lr=0.01,
                **extra,
            )
            start = [p.detach().clone() for p in model[2].parameters()]
            for _ in range(5):
                backward(optimizer)
                optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(start, model[2].parameters(), strict=True))
            runs.append([p.detach() for p in model.parameters()])
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_lr_as_a_tensor_of_any_shape(self, ours, theirs, flatten, shape):
        lr = torch.full(shape, 0.01)
        runs = []
        for cls, rate, extra in ((ours, lr, {"flatten": flatten}), (theirs, 0.01, {})):
            optimizer = cls(network().parameters(), lr=rate, **extra)
            for _ in range(5):
                backward(optimizer)
                optimizer.step()
            runs.append([p.detach() for p in params_of(optimizer)])
            if cls is ours:
                assert optimizer.param_groups[0]["lr"] is lr and optimizer.defaults["lr"] is lr
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-6, atol=1e-8
            )  # 0.01 as a float32 tensor is off by 2e-8

    def test_schedulers_write_into_a_tensor_lr(self, ours, theirs, flatten):
        lr = torch.tensor(0.1)
        optimizer = ours(network().parameters(), lr=lr, flatten=flatten)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        backward(optimizer)
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr and lr == 0.05

    @pytest.mark.parametrize("shape", [(2,), (3, 4)])
    def test_complex_equals_its_real_view(self, ours, theirs, flatten, shape):
        torch.manual_seed(0)
        a = torch.randn(shape, dtype=torch.complex64, requires_grad=True)
        b = torch.view_as_real(a.detach().clone()).requires_grad_()
        mixed = torch.randn(3, requires_grad=True)
        twin = mixed.detach().clone().requires_grad_()
        optimizers = [
            ours([a, mixed], lr=0.01, flatten=flatten),
            ours([b, twin], lr=0.01, flatten=flatten),
        ]
        for _ in range(4):
            for optimizer, (z, w) in zip(
                optimizers, ((torch.view_as_real(a), mixed), (b, twin)), strict=True
            ):
                optimizer.zero_grad()
                ((z - 1).square().sum() + w.square().sum()).backward()
                optimizer.step()
        assert torch.equal(torch.view_as_real(a.detach()), b.detach()) and torch.equal(mixed, twin)
        for key, value in optimizers[0].state[a].items():
            assert torch.equal(
                torch.view_as_real(value) if value.is_complex() else value,
                optimizers[1].state[b][key],
            )

    def test_a_step_without_gradients_changes_nothing(self, ours, theirs, flatten):
        params = [torch.randn(2, 3, requires_grad=False) for _ in range(2)]
        before = [p.clone() for p in params]
        optimizer = ours(params, lr=0.1, weight_decay=0.1, flatten=flatten)
        optimizer.step()
        assert (
            all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
            and not optimizer.state
        )

    def test_a_step_with_zero_gradients_changes_nothing_but_decay(self, ours, theirs, flatten):
        p = torch.randn(5, requires_grad=True)
        before = p.detach().clone()
        optimizer = ours([p], weight_decay=0, flatten=flatten)
        p.grad = torch.zeros_like(p)
        for _ in range(3):
            optimizer.step()
        assert torch.equal(p.detach(), before)


@both_classes
def test_inference_tensors_are_stepped(ours, theirs):
    with torch.inference_mode():
        param = torch.ones(3)
        param.grad = torch.ones(3)
    optimizer = ours([param], lr=0.1)
    for steps in (1, 2):
        with torch.inference_mode():
            optimizer.step()
        assert optimizer.state[param]["step"] == steps
    assert (param < 1).all()


@flat_or_not
def test_inference_mode_leaves_nothing_behind(flatten):
    """What a step makes inside inference mode is used outside it by the next."""
    params = [torch.ones(3, requires_grad=True), torch.ones(4, 4, requires_grad=True)]
    optimizer = FusedAdam(params, flatten=flatten)
    for mode in (True, False):
        for p in params:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
        with torch.inference_mode(mode):
            optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


@both_classes
def test_zero_grad_without_set_to_none(ours, theirs):
    optimizer = ours(network().parameters())
    backward(optimizer)
    grads = [p.grad for p in params_of(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    assert all(
        p.grad is g and not g.any() for p, g in zip(params_of(optimizer), grads, strict=True)
    )
    optimizer.zero_grad()
    assert all(p.grad is None for p in params_of(optimizer))
