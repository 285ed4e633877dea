"""Notices when what a plan rests on has changed: which parameters, where, in which layout. Decides nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
        live: the parameters that the plan steps, in order, and their gradients.
        idle: those that must have no gradient.
        buffers: flat parameters and gradients, if there are any.
    """

    def __init__(
        self, live: Sequence[Tensor], grads: Sequence[Tensor], idle: Sequence[Tensor], buffers: FlatBuffers | None
    ) -> None:
        self.live, self.idle = list(live), list(idle)
        self.addresses = list(map(data_ptr, live))
        slots = buffers.grad_addresses if buffers else {}
        self.slots = [slots.get(param, 0) for param in live]
        self.grad_addresses = list(map(data_ptr, grads))
        self.at_home = list(map(operator.eq, self.grad_addresses, self.slots))
        # Gradients that are the very views we made of our buffers: their addresses say all.
        views = [buffers.places[param].grad_view for param in live if param in buffers.places] if buffers else []
        self.views = views if len(views) == len(grads) and all(map(operator.is_, views, grads)) else None
        self.layouts = Layouts(live if self.views else [*live, *grads])

    def gradients(self) -> tuple[list[Tensor], list[int]] | None:
        """This step's gradients of the live parameters and their addresses; None if the plan no longer fits.

        Gradients may have moved; parameters, layouts, and who has a gradient may not have changed.
        """
        if any(param.grad is not None for param in self.idle):
            return None
        grads: list[Any] = [param.grad for param in self.live]
        if self.views and not all(map(operator.is_, grads, self.views)):
            return None
        if not self.layouts.hold(self.live if self.views else [*self.live, *grads]):
            return None
        if list(map(data_ptr, self.live)) != self.addresses:
            return None
        addresses = list(map(data_ptr, grads))
        if addresses != self.grad_addresses:
            if list(map(operator.eq, addresses, self.slots)) != self.at_home:
                return None
            self.grad_addresses = addresses
        return grads, addresses
