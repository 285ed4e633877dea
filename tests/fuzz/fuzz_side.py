"""One optimizer of a fuzzed run: its parameters in guarded memory, commands on both, and what is in
them. No model.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_adam import FusedAdam

SENTINEL = 7.0  # what lies around the user's tensors
VALUES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema")  # entries that are stored as numbers


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def numbers(tensor: Tensor) -> np.ndarray:
    """Flat float64, in the order of the elements, not of the memory."""
    return real(tensor.detach()).reshape(-1).to(torch.float64, copy=True).numpy()


def bits(tensor: Tensor) -> bytes:
    value: bytes = (
        real(tensor.detach())
        .clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )
    return value


def is_expanded(tensor: Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


class Guarded:
    """A tensor in the midst of memory that nobody may write to: around it, and between its
    elements.
    """

    def __init__(self, values: Tensor, layout: str) -> None:
        shape, n = values.shape, values.numel()
        spread = 2 if layout == "strided" else 1
        self.buffer = torch.full((spread * n + 13,), SENTINEL, dtype=values.dtype)
        strides = torch.empty(shape, device="meta").stride()
        if layout == "transposed" and len(shape) > 1:
            strides = torch.empty(shape[::-1], device="meta").stride()[::-1]
        where = (shape, [spread * stride for stride in strides], 5)
        self.outside = torch.ones(self.buffer.shape, dtype=torch.bool)
        self.outside.as_strided(*where).fill_(False)
        self.tensor = self.buffer.as_strided(*where).copy_(values)

    def intact(self) -> bool:
        return bool((self.buffer[self.outside] == SENTINEL).all())


def laid_out(values: Tensor, layout: str, guards: list[Guarded]) -> Tensor:
    """The same values in memory of their own ("own") or in guarded memory of the layout given."""
    if layout == "own":
        return values.clone(memory_format=torch.contiguous_format)
    guards.append(Guarded(values, layout))
    return guards[-1].tensor


@dataclass
class Side:
    """An optimizer under test. `forgetful`: it makes a new plan at every step."""

    arguments: dict[str, Any]  # of the constructor
    forgetful: bool = False
    params: list[nn.Parameter] = field(default_factory=list)
    guards: list[Guarded] = field(default_factory=list)
    optimizer: Any = None

    def add(self, values: Tensor, layout: str, shared: tuple[int, int] | None) -> None:
        """A parameter; shared: a view on another one, from one of its elements on."""
        if shared:
            tensor = self.params[shared[0]].detach().view(-1)[shared[1] :]
        else:
            tensor = laid_out(values, layout, self.guards)
        self.params.append(nn.Parameter(tensor))

    def group(self, options: dict[str, Any], members: list[int]) -> None:
        group = {"params": [self.params[i] for i in members], **options}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*duplicate parameters", UserWarning)
            if self.optimizer is None:
                self.optimizer = FusedAdam([group], **self.arguments)
            else:
                self.optimizer.add_param_group(group)

    def rebuild(self, arguments: dict[str, Any], precisions: list[str | None]) -> None:
        """Another optimizer over the same parameters, which goes on from this one's state_dict."""
        old, self.optimizer, self.arguments = self.optimizer, None, arguments
        for group, precision in zip(old.param_groups, precisions, strict=True):
            members = [self.number(p) for p in group["params"]]
            self.group({"precision": precision}, members)
        self.optimizer.load_state_dict(old.state_dict())

    def number(self, param: Tensor) -> int:
        return next(i for i, other in enumerate(self.params) if other is param)

    def copied(self, how: str) -> None:
        """Go on with copies of parameters and optimizer: they own their memory."""
        pair = (self.params, self.optimizer)
        self.params, self.optimizer = (
            copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        )
        self.guards = []
        self.optimizer.zero_grad()

    def set_grad(self, i: int, grad: Tensor | None, keep: bool) -> None:
        """keep: write into the gradient that is there, as backward does."""
        param = self.params[i]
        old = param.grad
        if (
            keep
            and old is not None
            and grad is not None
            and old.dtype == grad.dtype
            and not is_expanded(old)
        ):
            old.copy_(grad)
            return
        param.grad = None
        if grad is not None:
            param.grad_dtype = grad.dtype
            param.grad = grad

    def step(self) -> None:
        if self.forgetful:
            self.optimizer._engine.drop_plans()
        self.optimizer.step()

    def snapshot(self, i: int) -> dict[str, bytes]:
        """All bits of a parameter and its state."""
        entry = dict.get(self.optimizer.state, self.params[i], {})
        return {"param": bits(self.params[i]), **{key: bits(value) for key, value in entry.items()}}

    def read(self, i: int) -> dict[str, np.ndarray]:
        """Weight and moments as numbers, decoded from what is stored."""
        param, entry = self.params[i].detach(), dict.get(self.optimizer.state, self.params[i], {})
        found = {"param": numbers(param)}
        if "master_weight" in entry:
            master = entry["master_weight"]
            found["param"] = numbers(
                torch.where(master.to(param.dtype) == param, master, param.float())
            )
        elif "remainder" in entry:
            remainder = entry["remainder"].to(torch.int32) << (
                8 if entry["remainder"].dtype == torch.int8 else 0
            )
            low = torch.where(param == 0, remainder.clamp(min=0), remainder)
            found["param"] = numbers(
                ((param.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)
            )
        if "exp_avg_ratio" in entry:
            found |= decoded(entry)
        found |= {key: numbers(entry[key]) for key in VALUES if key in entry}
        return found


def decoded(entry: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The moments of 8-bit codes, whose groups of 32 follow the order of the memory."""
    ratio, lattice = entry["exp_avg_ratio"], entry["exp_avg_sq_lattice"]

    def per_element(scale: Tensor) -> Tensor:
        return scale.repeat_interleave(32)[: ratio.numel()]

    def in_place_of(codes: Tensor, values: Tensor) -> np.ndarray:
        return numbers(values.as_strided(codes.shape, codes.stride()))

    codes = lattice.as_strided((lattice.numel(),), (1,)).long()
    scale = per_element(entry["exp_avg_sq_lattice_scale"].view(torch.int16).long() << 16)
    half_step = scale & -scale
    v = torch.where(codes == 0, 0, (scale - half_step) + 2 * half_step * codes)
    root = ((v >> 1) + (127 << 22)).to(torch.int32).view(torch.float32).double()
    m = ratio.as_strided((ratio.numel(),), (1,)).double() * root
    m = m * per_element(entry["exp_avg_ratio_scale"]).double()
    return {
        "exp_avg": in_place_of(ratio, m),
        "exp_avg_sq": in_place_of(lattice, v.to(torch.int32).view(torch.float32)),
    }
