"""Train matrices with Muon, the rest with FusedAdamW, and resume: `python examples/muon.py`.

Writes checkpoint.pt into the current folder.
"""

import torch
from torch import nn

from fused_adam import FusedAdamW


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(64, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 64)
    )
    # Muon is for matrices between embedding and head. Biases, embedding and head need Adam.
    matrices = [layer.weight for layer in model[1:-1] if isinstance(layer, nn.Linear)]
    rest = [param for param in model.parameters() if not any(param is each for each in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.1),
        FusedAdamW(rest, lr=3e-3, betas=(0.8, 0.95), weight_decay=0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20) for optimizer in optimizers
    ]
    return model, optimizers, schedulers


def train(model, optimizers, schedulers, first, last):
    for step in range(first, last):
        tokens = torch.randint(64, (32,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    print(f"step {last}: loss {loss.item():.4f}")


model, optimizers, schedulers = build()
train(model, optimizers, schedulers, 0, 10)
torch.save([part.state_dict() for part in (model, *optimizers, *schedulers)], "checkpoint.pt")

model, optimizers, schedulers = build()  # as a later process does
for part, state in zip((model, *optimizers, *schedulers), torch.load("checkpoint.pt"), strict=True):
    part.load_state_dict(state)
train(model, optimizers, schedulers, 10, 20)
