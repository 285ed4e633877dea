"""The parity gate: a few small steps beside a float64 run. An optimizer that does something else
gets no time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .optimizers import Case, OptimizerSpec
from .oracle import Options, adamw, tolerance
from .workload import instantiate

# One element, less than a vector, a matrix, more than 8-bit optimizers leave unquantised.
SHAPES = ((1,), (7,), (64, 33), (8192,))
# Falling, so that AMSGrad's maximum differs from the moment itself.
GRADIENT_SIZES = (1.0, 0.3, 0.1, 0.03, 0.01)
# A decay and a learning rate that nobody can leave out unnoticed, whatever the dtype's digits.
LR, WEIGHT_DECAY, BETAS = 1e-2, 20.0, (0.9, 0.95)
EPS = 1e-3  # 1e-8 is nothing in float16: torch's own paths divide by zero there
PARAM_SIZE = 0.05  # as far as the steps go, so that rounding is small beside them
# torch's paths reach 0.004 in bfloat16; a missing AMSGrad takes 0.015, another beta 0.2, no decay
# 0.9.
ALLOWED_RMS, ALLOWED_RMS_LOSSY = 0.01, 0.05


@dataclass(frozen=True)
class Parity:
    """error: the largest |parameter - float64 run|, of at most `allowed` (None where only the
    direction is judged).

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
        return (
            f"wrong: after {len(GRADIENT_SIZES)} steps {self.rms:.2g} of the way (allowed {self.allowed_rms:g}) and "
            f"{self.error:.2g} (allowed {'any' if self.allowed is None else format(self.allowed, '.2g')}) from float64"
        )


def judge(spec: OptimizerSpec, case: Case) -> Parity | str:
    """Step small parameters of the case's dtypes; or the reason why that cannot be done."""
    options = Options(LR, BETAS, EPS, WEIGHT_DECAY, case.options.amsgrad, case.options.clip)
    case = replace(case, options=options)
    generator = torch.Generator().manual_seed(1)
    params: list[Tensor] = []
    steps: list[list[Tensor]] = []
    for shape in SHAPES:
        param: Tensor = torch.nn.Parameter(
            (PARAM_SIZE * torch.randn(shape, generator=generator)).to(case.device, case.dtype)
        )
        if case.grad_dtype != case.dtype:
            param.grad_dtype = case.grad_dtype
        param.grad = torch.zeros(shape, dtype=case.grad_dtype, device=case.device)
        params.append(param)
    for size in GRADIENT_SIZES:
        grads = [size * torch.randn(shape, generator=generator) for shape in SHAPES]
        steps.append([grad.to(case.device, case.grad_dtype) for grad in grads])
    start = [param.detach().double().clone() for param in params]
    truth = adamw(start, steps, options)
    instance = instantiate(spec, params, case)
    if isinstance(instance, str):
        return instance
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            assert param.grad is not None
            param.grad.copy_(grad)
        instance.step()
    found = torch.cat([param.detach().double().flatten() for param in params])
    goal, begin = (
        torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (truth, start)
    )
    error = (found - goal).abs().max().item()
    rms = ((found - goal).square().mean() / (goal - begin).square().mean()).sqrt().item()
    # With fewer digits the sum of roundings allows more than the steps' own size: there the
    # direction decides.
    strict = (
        not spec.quantised
        and case.dtype in (torch.float32, torch.float64)
        and case.grad_dtype == case.dtype
    )
    largest = begin.abs().max().item()
    allowed = tolerance(case.dtype, case.dtype, len(steps), largest, options) if strict else None
    return Parity(error, allowed, rms, ALLOWED_RMS_LOSSY if spec.quantised else ALLOWED_RMS)
