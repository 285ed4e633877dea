"""The promise in one number: SHA-256 of all weights and moments after a fixed training, to be
checked on any machine.

The same training and hashes as in the tests, which a stranger's machine need not have. Integer
arithmetic makes the gradients, so that no random generator of any version takes part.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from fused_adam import FusedAdam

# Steps -> SHA-256 after them.
HASHES = {
    1000: "869091b3e33581671e0dc8a745e4edf241f38d0f87a8d85883fe6f45228027af",
    30: "55aa245e1e179c7e87e83c9fd087e61927c7bbbc6edc9613fd60d453ec24a92f",
}
GROUPS: tuple[dict[str, Any], ...] = (
    {"weight_decay": 0.1},
    {"weight_decay": 0.01, "amsgrad": True, "lr": 3e-3},
    {"weight_decay": 0.1, "decoupled_weight_decay": False, "betas": (0.8, 0.99), "maximize": True},
)
SIZES = (1, 131, 1000)


def noise(numel: int, seed: int) -> Tensor:
    """float64 numbers in [-1, 1), the same on every machine: a multiplicative hash, then an exact
    scaling.
    """
    x = (torch.arange(numel, dtype=torch.int64) + 1) * 2654435761 + seed * 40503
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    x = (x ^ (x >> 13)) * 3266489917 % 2**32
    return (x ^ (x >> 16)).double() / 2**31 - 1


def digest(steps: int, device: torch.device, backend: str, flatten: bool) -> str:
    """Train `steps` steps and hash; with the learning rate of a scheduler and gradients that follow
    the weights.
    """
    names = [
        (f"{numel}-{dtype}-{group}", numel, dtype, group)
        for group in range(len(GROUPS))
        for dtype in ("float32", "bfloat16")
        for numel in SIZES
    ]
    params = {
        name: torch.nn.Parameter(noise(numel, seed).to(getattr(torch, dtype)).to(device))
        for seed, (name, numel, dtype, _) in enumerate(names)
    }
    groups: list[dict[str, Any]] = [
        {"params": [params[name] for name, _, _, group in names if group == number], **options}
        for number, options in enumerate(GROUPS)
    ]
    optimizer = FusedAdam(
        groups, lr=1e-2, decoupled_weight_decay=True, backend=backend, flatten=flatten
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / 2000)
        for seed, param in enumerate(params.values()):
            wave = noise(param.numel(), 100 + seed + 1000 * step).float().to(device)
            grad = (0.5 * param.detach().float() + wave).to(param.dtype)
            if param.grad is None:
                param.grad = grad
            else:
                param.grad.copy_(grad)
        optimizer.step()
    sha = hashlib.sha256()
    for name, param in params.items():
        for key, value in {"param": param.detach(), **optimizer.state[param]}.items():
            sha.update(f"{name} {key}".encode())
            sha.update(bytes(value.cpu().contiguous().reshape(-1).view(torch.uint8).tolist()))
    return sha.hexdigest()
