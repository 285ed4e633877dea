"""Lightning Fabric: its loop clips and accumulates, saves and resumes."""

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from training import results, same_bits

from fused_adam import FusedAdamW

STEPS, SAVED, LR, CLIP, PARTS = 6, 3, 1e-2, 0.05, 2


def make(precision, options):
    """What a loop with Fabric holds."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 33), nn.GELU(), nn.Linear(33, 3))
    if precision == "bf16-true":
        model = model.bfloat16()  # before the optimizer is made, so that a recipe finds bfloat16
    optimizer = FusedAdamW(model.parameters(), lr=LR, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, wrapped = fabric.setup(model, optimizer)
    return fabric, {"model": model, "optimizer": wrapped, "scheduler": scheduler}, optimizer


def train(fabric, state, first, last):
    model, optimizer = state["model"], state["optimizer"]
    for step in range(first, last):
        for part in range(PARTS):
            generator = torch.Generator().manual_seed(PARTS * step + part)
            with fabric.no_backward_sync(model, enabled=part + 1 < PARTS):
                loss = model(torch.randn(4, 6, generator=generator)).square().mean()
                fabric.backward(loss / PARTS)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        state["scheduler"].step()


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("32-true", {}),
        ("32-true", {"flatten": True}),
        ("bf16-mixed", {}),
        ("bf16-true", {"precision": "split32-bf16"}),
        ("bf16-true", {"precision": "split24-int8", "seed": 3}),
    ],
    ids=str,
)
def test_resuming_from_a_checkpoint(precision, options, tmp_path):
    """Weights, state and learning rates have the bits of a training that was never stopped."""
    fabric, state, whole = make(precision, options)
    train(fabric, state, 0, SAVED)
    fabric.save(tmp_path / "saved", state)
    train(fabric, state, SAVED, STEPS)
    fabric, state, rest = make(precision, options)
    fabric.load(tmp_path / "saved", state)
    train(fabric, state, SAVED, STEPS)
    assert same_bits(results(rest), results(whole))
    assert all(entry["step"] == STEPS for entry in results(rest))
    assert rest.param_groups[0]["lr"] == whole.param_groups[0]["lr"]
    assert rest.param_groups[0]["lr"] == pytest.approx(LR * 0.9**STEPS)


def test_fabric_clips():
    trained = []
    for clip in (CLIP, 100.0):
        fabric, state, optimizer = make("32-true", {})
        state["model"](torch.ones(4, 6)).square().mean().backward()
        fabric.clip_gradients(state["model"], state["optimizer"], max_norm=clip)
        optimizer.step()
        trained.append(results(optimizer))
    assert not same_bits(*trained)
