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
    """Type, dtype, device, sizes, strides, conjugate and negative bits of each tensor, to be compared."""
    return [
        t is not None and (type(t), t.dtype, t.device, t.shape, t.stride(), t.is_conj(), t.is_neg()) for t in tensors
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
    """All that one plan rests on.

    Args:
        params: all parameters of the optimizer, in order.
        grads: their gradients or None.
        options: what else launches depend on, to be compared.
        buffers: flat parameters and gradients, if there are any.
    """

    def __init__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], options: object, buffers: FlatBuffers | None
    ) -> None:
        self.params = list(params)
        self.options = options
        self.idle = [param for param, grad in zip(params, grads, strict=True) if grad is None]
        self.live = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        found = [grad for grad in grads if grad is not None]
        self.layouts = Layouts([*self.live, *found])
        self.addresses = list(map(data_ptr, self.live))
        slots = buffers.grad_addresses if buffers else {}
        self.slots = [slots.get(param, 0) for param in self.live]
        self.grad_addresses = list(map(data_ptr, found))
        self.at_home = list(map(operator.eq, self.grad_addresses, self.slots))

    def gradients(self, params: Sequence[Tensor], options: object) -> tuple[list[Tensor], list[int]] | None:
        """This step's gradients of the live parameters and their addresses; None if the plan no longer fits.

        Gradients may have moved; parameters, layouts, and who has a gradient may not have changed.
        """
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return None
        if options != self.options or any(param.grad is not None for param in self.idle):
            return None
        grads: list[Any] = [param.grad for param in self.live]
        if not self.layouts.hold([*self.live, *grads]) or list(map(data_ptr, self.live)) != self.addresses:
            return None
        addresses = list(map(data_ptr, grads))
        if addresses != self.grad_addresses:
            if list(map(operator.eq, addresses, self.slots)) != self.at_home:
                return None
            self.grad_addresses = addresses
        return grads, addresses
