"""Runs that tests compare: seeded parameters and gradients through an optimizer, and equality of
bits.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# Around a vector (16), a slot (128) and a block (8192 under the interpreter); empty and 0-dim ones.
SHAPES = [(), (1,), (15,), (16, 1), (0, 3), (127,), (129,), (33, 65), (8191,), (8193,)]


def values(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """Numbers of size one to two, either sign: in float16 their squares times 1 - beta2 stay normal
    numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    size = 0.5 + 1.5 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -size, size).to(dtype)


def parameters(
    dtype: torch.dtype, shapes: Sequence[Sequence[int]] = SHAPES, device: str = "cpu"
) -> list[Tensor]:
    return [
        torch.nn.Parameter(values(shape, i, dtype).to(device)) for i, shape in enumerate(shapes)
    ]


def gradient(param: Tensor, index: int, step: int, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of parameter number `index` at `step`, the same on every device."""
    return values(param.shape, 1000 * (step + 1) + index, dtype or param.dtype).to(param.device)


def set_grad(param: Tensor, grad: Tensor) -> None:
    """What backward does: add into the buffer that is there, else hand a tensor over."""
    if param.grad is None:
        param.grad = grad
    else:
        param.grad += grad


def train(
    optimizer: torch.optim.Optimizer,
    steps: int,
    first: int = 0,
    after: Callable[[int], Any] | None = None,
) -> None:
    """`steps` ordinary steps on all parameters of the optimizer, numbered in the order of its
    groups.
    """
    for step in range(first, first + steps):
        optimizer.zero_grad()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, param in enumerate(params):
            set_grad(param, gradient(param, index, step))
        optimizer.step()
        if after:
            after(step)


def results(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Parameters and state in order, copied to the CPU."""
    return [
        {
            "param": param.detach().cpu().clone(),
            **{k: v.cpu().clone() for k, v in optimizer.state.get(param, {}).items()},
        }
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def same_bits(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    """Equal keys, dtypes, shapes and bits: zeros by sign, NaNs whatever their payload."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(_same(x[key], y[key]) for key in x)
        for x, y in zip(a, b, strict=True)
    )


def _same(x: Tensor, y: Tensor) -> bool:
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    same = (x == y) & (x.signbit() == y.signbit()) | (x.isnan() & y.isnan())
    return bool(same.all())


def through_a_file(saved: Any) -> Any:
    """What comes back of it, saved and loaded as users do."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
