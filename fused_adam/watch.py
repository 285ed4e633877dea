"""Notices when what a plan rests on has changed: which parameters, where, in which layout. Decides nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .distributed import Shards, is_sharded
from .flatten import FlatBuffers

try:
    from torch._C._dynamo import guards
except ImportError:
    guards = None  # type: ignore[assignment]

data_ptr = torch.Tensor.data_ptr


def layouts(tensors: Sequence[Tensor]) -> list[Any]:
    """Type, dtype, layout, device, sizes, strides, conjugate and negative bits of each tensor, to be compared."""
    return [
        t is not None and (type(t), t.dtype, t.layout, t.device, t.shape, t.stride(), t.is_conj(), t.is_neg())
        for t in tensors
    ]


def read_grad(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, where torch has them."""
    return [param.grad for param in params]


def reader(attribute: str) -> Callable[[Sequence[Tensor]], list[Tensor | None]]:
    """How gradients are read, of many parameters at once: every step does so."""
    if attribute == "grad":
        return read_grad
    return lambda params: [getattr(param, attribute, None) for param in params]


class Layouts:
    """Says whether tensors still have the layouts they had, without holding on to them.

    torch.compile's own guard does that in C++, 50 ns per tensor where Python takes 600. It is not public, and refuses
    a tensor that is listed twice: where it cannot be used Python does it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._check: Callable[..., bool]
        if guards is not None and len(set(map(id, tensors))) == len(tensors):
            self._check = guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        else:
            before = layouts(tensors)
            self._check = lambda *now: layouts(now) == before

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        return bool(self._check(*tensors))


class Watch:
    """All that one plan rests on, besides who the parameters are.

    Args:
        live, grads: the parameters that the plan steps, in order, and their gradients, or what is here of them.
        idle: those that must have no gradient.
        buffers: flat parameters and gradients, if there are any.
        read: how gradients are read.
        moved: this step's gradients that lay otherwise than their DTensors, see `Shards.gradient_parts`.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        grads: Sequence[Tensor],
        idle: Sequence[Tensor],
        buffers: FlatBuffers | None,
        read: Callable[[Sequence[Tensor]], list[Tensor | None]],
        moved: dict[Tensor, Tensor],
    ) -> None:
        self.live, self.idle, self.read = list(live), list(idle), read
        self.shards, self.moved = Shards(live) if any(map(is_sharded, live)) else None, moved
        memory = self.shards.parts() if self.shards else self.live
        self.addresses = list(map(data_ptr, memory))
        slots = buffers.grad_addresses if buffers else {}
        self.slots = [slots.get(param, 0) for param in live]
        self.grad_addresses = list(map(data_ptr, grads))
        self.at_home = list(map(operator.eq, self.grad_addresses, self.slots))
        # Gradients that are the very views we made of our buffers: their addresses say all.
        views = [buffers.places[param].grad_view for param in live if param in buffers.places] if buffers else []
        self.views = views if len(views) == len(grads) and all(map(operator.is_, views, grads)) else None
        self.layouts = Layouts(memory if self.views else [*memory, *grads])

    def gradients(self) -> tuple[list[Tensor], list[int]] | None:
        """This step's gradients of the live parameters and their addresses; None if the plan no longer fits.

        Gradients may have moved; parameters, layouts, and who has a gradient may not have changed.
        """
        if any(map(operator.is_not, self.read(self.idle), repeat(None))):
            return None
        grads: list[Any] = self.read(self.live)
        if self.views and not all(map(operator.is_, grads, self.views)):
            return None
        memory = self.live
        if self.shards:
            memory, grads = self.shards.parts(), self.shards.gradient_parts(grads, self.moved)
        if not self.layouts.hold(memory if self.views else [*memory, *grads]):
            return None
        if list(map(data_ptr, memory)) != self.addresses:
            return None
        addresses = list(map(data_ptr, grads))
        if addresses != self.grad_addresses:
            if list(map(operator.eq, addresses, self.slots)) != self.at_home:
                return None
            self.grad_addresses = addresses
        return grads, addresses
