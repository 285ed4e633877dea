"""Parameters and gradients to step on, one optimizer over them, and the parity check that every
optimizer passes before it is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .optimizers import Case, Optimizer, OptimizerSpec, make, step_of
from .oracle import AdamWOptions, adam_model, tolerance
from .timing import give_back_memory

Shapes = Sequence[Sequence[int]]


def make_params(shapes: Shapes, case: Case, seed: int = 0) -> list[Tensor]:
    """Random parameters of the size of trained weights, each with a random gradient."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(shape: Sequence[int], size: float, dtype: torch.dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=case.device, dtype=torch.float32)
        return values.mul_(size).to(dtype)

    params: list[Tensor] = []
    for shape in shapes:
        param = torch.nn.Parameter(normal(shape, 0.02, case.dtype))
        params.append(with_grad(param, normal(shape, 1e-3, case.grad_dtype)))
    return params


def with_grad(param: Tensor, grad: Tensor) -> Tensor:
    """The parameter with this gradient, which may have a dtype of its own."""
    if grad.dtype != param.dtype:
        param.grad_dtype = grad.dtype
    param.grad = grad
    return param


def copy_params(params: Sequence[Tensor]) -> list[Tensor]:
    """The same values and gradients in memory of their own."""
    copies: list[Tensor] = []
    for param in params:
        assert param.grad is not None
        copy = torch.nn.Parameter(param.detach().clone())
        copies.append(with_grad(copy, param.grad.clone()))
    return copies


@dataclass
class Instance:
    """One optimizer over parameters of its own.

    step: everything from gradients to new weights and their averages.
    averages: those that the optimizer does not keep itself.
    """

    spec: OptimizerSpec
    params: list[Tensor]
    optimizer: Optimizer
    step: Callable[[], object]
    averages: list[Tensor] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """How many numbers it learns."""
        return sum(param.numel() for param in self.params)

    def state_bytes(self) -> int:
        """Bytes of averages and of all tensors in its state; step counters are not counted."""
        held = sum(
            tensor_bytes(tensor)
            for param in self.params
            for key, value in self.optimizer.state.get(param, {}).items()
            if key != "step"
            for tensor in tensors_in(value)
        )
        return held + sum(average.nbytes for average in self.averages)

    def moved_bytes(self, clip: bool) -> float:
        """Bytes a perfect step moves: parameters and state read and written, gradients read.

        Clipping reads gradients once more, because their norm is known only after all of them.
        Averaging after the step reads parameters once more.
        """
        params = sum(param.nbytes for param in self.params)
        grads = sum(param.grad.nbytes for param in self.params if param.grad is not None)
        passes = 3 if self.averages else 2
        return passes * params + 2 * self.state_bytes() + grads * (2 if clip else 1)


def tensors_in(value: Any) -> list[Tensor]:
    """A state's tensor, or those that an object of the optimizer's own holds in its place."""
    if torch.is_tensor(value):
        return [value]
    return [held for held in getattr(value, "__dict__", {}).values() if torch.is_tensor(held)]


def tensor_bytes(tensor: Tensor) -> int:
    """Memory behind a tensor; of a wrapper around several plain tensors, that of all of them."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.nbytes)


def instantiate(spec: OptimizerSpec, params: list[Tensor], case: Case) -> Instance | str:
    """An optimizer over these parameters, whose gradients it keeps; or the reason for its absence.

    As in a training loop, gradients come after `zero_grad()`: with flat buffers into these.
    """
    grads = [param.grad for param in params]
    optimizer = make(spec, params, case)
    if isinstance(optimizer, str):
        return optimizer
    optimizer.zero_grad()
    for param, grad in zip(params, grads, strict=True):
        assert grad is not None
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)
    instance = Instance(spec, params, optimizer, step_of(spec, optimizer, params, case.options))
    if case.options.ema_decay is not None and not spec.averages:
        add_averages(instance, case.options.ema_decay)
    return instance


def add_averages(instance: Instance, decay: float) -> None:
    """Average the weights after each step, as torch's users do."""
    model = torch.nn.ParameterList(instance.params)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    instance.averages = list(averaged.parameters())
    step = instance.step

    def step_and_average() -> None:
        step()
        averaged.update_parameters(model)

    instance.step = step_and_average


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


# The parity check: a few small steps, compared with a float64 run. An optimizer that computes
# something else is not timed.

# One element, less than a vector, a matrix, more than 8-bit optimizers leave unquantised.
PARITY_SHAPES = ((1,), (7,), (64, 33), (8192,))
# Falling, so that AMSGrad's maximum differs from the moment itself.
GRADIENT_SIZES = (1.0, 0.3, 0.1, 0.03, 0.01)
# A decay and a learning rate that nobody can leave out unnoticed, whatever the dtype's digits.
LR, WEIGHT_DECAY, BETAS = 1e-2, 20.0, (0.9, 0.95)
EPS = 1e-3  # 1e-8 is nothing in float16: torch's own paths divide by zero there
PARAM_SIZE = 0.05  # as far as the steps go, so that rounding is small in comparison
# torch's paths reach 0.004 in bfloat16; a missing AMSGrad takes 0.015, another beta 0.2, no decay
# 0.9.
ALLOWED_RMS, ALLOWED_RMS_LOSSY = 0.01, 0.05


@dataclass(frozen=True)
class Parity:
    """How close an optimizer came to the float64 run.

    error: the largest |parameter - float64 run|, of at most `allowed` (None where only the
        direction is compared).
    rms: the root mean square of that difference over the way the float64 run went, at most
        `allowed_rms`.
    """

    error: float
    allowed: float | None
    rms: float
    allowed_rms: float

    @property
    def passed(self) -> bool:
        """Whether the optimizer does what it says. False for a NaN."""
        return self.rms <= self.allowed_rms and (self.allowed is None or self.error <= self.allowed)

    @property
    def text(self) -> str:
        """The reason, where it did not pass."""
        allowed = "any" if self.allowed is None else f"{self.allowed:.2g}"
        return (
            f"wrong: after {len(GRADIENT_SIZES)} steps {self.rms:.2g} of the way (allowed "
            f"{self.allowed_rms:g}) and {self.error:.2g} (allowed {allowed}) from float64"
        )


def check_parity(spec: OptimizerSpec, case: Case) -> Parity | str:
    """Step small parameters of the case's dtypes; or the reason why that cannot be done."""
    options = AdamWOptions(
        LR, BETAS, EPS, WEIGHT_DECAY, amsgrad=case.options.amsgrad, clip=case.options.clip
    )
    case = replace(case, options=options)
    generator = torch.Generator().manual_seed(1)

    def normal(size: float, dtype: torch.dtype) -> list[Tensor]:
        tensors = [size * torch.randn(shape, generator=generator) for shape in PARITY_SHAPES]
        return [tensor.to(case.device, dtype) for tensor in tensors]

    params = [
        with_grad(torch.nn.Parameter(value), torch.zeros_like(value, dtype=case.grad_dtype))
        for value in normal(PARAM_SIZE, case.dtype)
    ]
    steps = [normal(size, case.grad_dtype) for size in GRADIENT_SIZES]
    start = [param.detach().double().clone() for param in params]
    truth = adam_model(start, steps, options)
    instance = instantiate(spec, params, case)
    if isinstance(instance, str):
        return instance
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            assert param.grad is not None
            param.grad.copy_(grad)
        instance.step()
    reached, goal, begin = (
        torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        for tensors in (params, truth, start)
    )
    error = (reached - goal).abs().max().item()
    rms = ((reached - goal).square().mean() / (goal - begin).square().mean()).sqrt().item()
    # With fewer digits the sum of roundings allows more than the steps' own size: there the
    # direction decides.
    exact = case.dtype in (torch.float32, torch.float64) and case.grad_dtype == case.dtype
    allowed = None
    if exact and not spec.quantised:
        largest = begin.abs().max().item()
        # 4 roundings: torch's paths round after each operation.
        allowed = tolerance(case.dtype, len(steps), options, 4, largest)["param"]
    return Parity(error, allowed, rms, ALLOWED_RMS_LOSSY if spec.quantised else ALLOWED_RMS)
