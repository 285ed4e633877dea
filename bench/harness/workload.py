"""Parameters and gradients to step on, and one optimizer over them. No time is taken here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .optimizers import Case, Optimizer, OptimizerSpec, make, step_of
from .timing import give_back_memory

Shapes = Sequence[Sequence[int]]


def make_params(shapes: Shapes, case: Case, seed: int = 0) -> list[Tensor]:
    """Random parameters of the size of trained weights, each with a random gradient."""
    generator = torch.Generator(case.device).manual_seed(seed)
    params: list[Tensor] = []
    for shape in shapes:
        values = torch.randn(*shape, generator=generator, device=case.device, dtype=torch.float32)
        param = torch.nn.Parameter(values.mul_(0.02).to(case.dtype))
        if case.grad_dtype != case.dtype:
            param.grad_dtype = case.grad_dtype
        values = torch.randn(*shape, generator=generator, device=case.device, dtype=torch.float32)
        param.grad = values.mul_(1e-3).to(case.grad_dtype)
        params.append(param)
    return params


def copy_params(params: Sequence[Tensor]) -> list[Tensor]:
    """The same values and gradients in memory of their own."""
    copies: list[Tensor] = []
    for param in params:
        assert param.grad is not None
        copy = torch.nn.Parameter(param.detach().clone())
        if param.grad.dtype != param.dtype:
            copy.grad_dtype = param.grad.dtype
        copy.grad = param.grad.clone()
        copies.append(copy)
    return copies


@dataclass
class Instance:
    """One optimizer over parameters of its own. step: everything from gradients to new weights."""

    spec: OptimizerSpec
    params: list[Tensor]
    optimizer: Optimizer
    step: Callable[[], object]

    @property
    def numel(self) -> int:
        """How many numbers it learns."""
        return sum(param.numel() for param in self.params)

    def state_bytes(self) -> int:
        """Bytes of every tensor in its state that is as long as a parameter's; step counters are
        not counted.
        """
        return sum(
            tensor_bytes(value)
            for param in self.params
            for key, value in self.optimizer.state.get(param, {}).items()
            if torch.is_tensor(value) and key != "step"
        )

    def moved_bytes(self, clip: bool) -> float:
        """Bytes a perfect step moves: parameters and state read and written, gradients read, once
        more to clip.
        """
        params = sum(param.nbytes for param in self.params)
        grads = sum(param.grad.nbytes for param in self.params if param.grad is not None)
        return 2 * params + 2 * self.state_bytes() + grads * (2 if clip else 1)


def tensor_bytes(tensor: Tensor) -> int:
    """Memory behind a tensor; of a wrapper around several plain tensors, that of all of them."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.nbytes)


def instantiate(spec: OptimizerSpec, params: list[Tensor], case: Case) -> Instance | str:
    """An optimizer over these parameters, whose gradients it keeps; or the reason for its absence.

    Moving parameters into flat buffers zeroes their gradients: the values are put back.
    """
    grads = [param.grad for param in params]
    optimizer = make(spec, params, case)
    if isinstance(optimizer, str):
        return optimizer
    for param, grad in zip(params, grads, strict=True):
        if param.grad is not grad:
            assert param.grad is not None and grad is not None
            param.grad.copy_(grad)
    return Instance(spec, params, optimizer, step_of(spec, optimizer, params, case.options))


def one_line(error: BaseException) -> str:
    """An error as a reason in a table."""
    text = " ".join(str(error).split()) or "no text"
    return f"{type(error).__name__}: {text[:200]}"


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Give memory back to the device afterwards."""
    try:
        yield
    finally:
        give_back_memory()
