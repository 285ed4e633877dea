"""Precision recipes with clipping, skipped steps, scalers, captured steps, steps in backward, and
parameters that overlap.
"""

import pytest
import torch
from graphs import Recorder
from recipes import BF16, FP16, every_backend, members, parameters, train, trained
from torch import nn
from training import gradient, results, same_bits, values

from fused_adam import FusedAdamW, step_in_backward


@pytest.mark.parametrize("precision", ["split32-bf16", "master32-int8", "native-fp32"])
def test_clipping(precision):
    """As gradients scaled by hand: the norm of two elements of 8 is clipped by a power of two."""

    def run(backend, factor, **options):
        p = nn.Parameter(torch.ones(64, dtype=BF16))
        optimizer = FusedAdamW([p], lr=1e-2, precision=precision, backend=backend, **options)
        p.grad = values((64,), 1, BF16) * factor
        optimizer.step()
        return optimizer

    norm = run("reference", 1.0, max_grad_norm=1e9).grad_norm.item()
    clipped = run("reference", 1.0, max_grad_norm=norm / 2)
    assert clipped.grad_norm.item() == norm
    assert same_bits(results(clipped), results(run("triton", 1.0, max_grad_norm=norm / 2)))
    for got, want in zip(
        clipped.export_fp32()["state"]["state"].values(),
        run("reference", 0.5).export_fp32()["state"]["state"].values(),
        strict=True,
    ):
        torch.testing.assert_close(got["exp_avg"], want["exp_avg"], rtol=1e-2, atol=1e-4)


@every_backend
@pytest.mark.parametrize("precision", ["split24-int8", "sr-bf16", "master32-fp32"])
def test_a_skipped_step_leaves_every_stored_bit(precision, backend):
    """For a GradScaler's flag, or a gradient that is not finite; and the next step is as if none
    had been.
    """
    optimizer = trained(precision, 1, backend=backend, fused=True, skip_nonfinite=True)
    before = results(optimizer)
    optimizer.found_inf = torch.ones(())
    train(optimizer, 1, first=7)
    assert same_bits(results(optimizer), before)
    del optimizer.found_inf
    train(optimizer, 1, first=7, scale=float("nan"))
    assert same_bits(results(optimizer), before) and optimizer.skipped_steps == 2
    optimizer.grad_scale = torch.tensor(8.0)
    train(optimizer, 1, first=1, scale=8.0)
    assert same_bits(results(optimizer), results(trained(precision, 2)))


def test_a_scaler_over_master_weights_in_half_precision():
    def run(scale):
        params = parameters(FP16, [(5,), (40,)])
        optimizer = FusedAdamW(params, lr=1e-2, precision="master32", fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            optimizer.zero_grad()
            factor = float("inf") if step == 1 and scale > 1 else 1.0
            if step != 1 or scale > 1:
                scaler.scale(
                    sum((p * gradient(p, i, step)).sum() * factor for i, p in enumerate(params))
                ).backward()
                scaler.step(optimizer)
                scaler.update()
        return results(optimizer)

    assert same_bits(run(4.0), run(1.0))


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8", "master32-fp32"])
def test_captured_steps(precision, monkeypatch):
    def run(flatten):
        params = parameters(BF16, [(5,), (33, 3)])
        return FusedAdamW(
            params, lr=1e-2, precision=precision, backend="triton", capturable=True, flatten=flatten
        )

    for flatten in (False, True):
        captured = run(flatten)
        train(captured, 1)
        with monkeypatch.context() as patch:
            graph = Recorder(patch)
            for i, p in enumerate(members(captured)):
                p.grad.copy_(gradient(p, i, 1))
            graph.capture(captured.step)
            for step in (1, 2):
                for i, p in enumerate(members(captured)):
                    p.grad.copy_(gradient(p, i, step))
                graph.replay()
        plain = FusedAdamW(parameters(BF16, [(5,), (33, 3)]), lr=1e-2, precision=precision)
        train(plain, 3)
        assert same_bits(results(captured), results(plain))


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8", "sr-bf16"])
def test_steps_in_backward(precision):
    """A parameter keeps its place in the optimizer when it is stepped alone."""

    def fit(inside):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 1)).bfloat16()
        optimizer = FusedAdamW(model.parameters(), lr=1e-2, precision=precision)
        if inside:
            step_in_backward(model, optimizer, bucket_bytes=1)
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(8, 20, dtype=BF16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return results(optimizer)

    assert same_bits(fit(True), fit(False))


@every_backend
@pytest.mark.parametrize("precision", ["split24-int8", "sr-bf16"])
def test_a_parameter_without_a_gradient_is_left_alone(precision, backend):
    """It has a step count of its own, and with it random bits."""
    late = FusedAdamW(
        parameters(BF16, [(40,), (33,)]), lr=1e-2, precision=precision, backend=backend
    )
    first, second = members(late)
    first.grad = gradient(first, 0, 0)
    late.step()
    assert list(late.state) == [first]
    train(late, 2, first=1)
    both = FusedAdamW(parameters(BF16, [(40,), (33,)]), lr=1e-2, precision=precision)
    train(both, 1)
    assert late.state[second]["step"] == 2
    other = FusedAdamW(parameters(BF16, [(40,), (33,)]), lr=1e-2, precision=precision)
    for step in (1, 2):
        members(other)[1].grad = gradient(second, 1, step)
        other.step()
    assert same_bits(results(late)[1:], results(other)[1:])


@pytest.mark.filterwarnings(
    "ignore:optimizer contains a parameter group with duplicate:UserWarning"
)
@pytest.mark.parametrize("precision", ["split24-int8", "master32"])
def test_parameters_listed_twice_and_views_that_overlap(precision):
    """They are stepped one after the other; the second finds what the first wrote."""

    def run(backend):
        base = values((100,), 1, BF16)
        first, second, other = (
            nn.Parameter(base[:70]),
            nn.Parameter(base[40:]),
            nn.Parameter(values((9,), 2, BF16)),
        )
        optimizer = FusedAdamW(
            [first, second, other, other], lr=1e-2, precision=precision, backend=backend
        )
        train(optimizer, 2)
        assert optimizer.state[other]["step"] == 4 and first[40] == base[40] == second[0]
        return results(optimizer)

    assert same_bits(run("reference"), run("triton"))
