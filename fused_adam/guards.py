"""Notices when what a plan rests on has changed: which parameters, where, in which layout. Decides
nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import compress, repeat
from typing import Any

import torch
from torch import Tensor

from .distributed import LocalShards, is_sharded, local
from .state.arena import ParamState, State
from .state.flatten import FlatBuffers, read_grad

try:
    from torch._C._dynamo import guards
except ImportError:
    guards = None  # type: ignore[assignment]

data_ptr = torch.Tensor.data_ptr


def layouts(tensors: Sequence[Tensor]) -> list[Any]:
    """Type, dtype, layout, device, sizes, strides, conjugate and negative bits of each tensor, to
    be compared.
    """
    return [
        t is not None
        and (type(t), t.dtype, t.layout, t.device, t.shape, t.stride(), t.is_conj(), t.is_neg())
        for t in tensors
    ]


def reader(attribute: str) -> Callable[[Sequence[Tensor]], list[Tensor | None]]:
    """How gradients are read, of many parameters at once: every step does so."""
    if attribute == "grad":
        return read_grad
    return lambda params: [getattr(param, attribute, None) for param in params]


class LayoutGuard:
    """Says whether tensors still have the layouts they had, without holding on to them.

    torch.compile's own guard does that in C++, 50 ns per tensor where Python takes 600. It is not
    public, and refuses
    a tensor that is listed twice: where it cannot be used Python does it.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._check: Callable[..., bool]
        if guards is not None and len(set(map(id, tensors))) == len(tensors):
            self._check = guards.TensorGuards(
                *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
            ).check
        else:
            before = layouts(tensors)
            self._check = lambda *now: layouts(now) == before

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        return bool(self._check(*tensors))


class StateGuard:
    """Says whether `optimizer.state` still holds the tensors that a plan's tables point to.

    torch.compile's guards give every dict a number that no other dict and no other content of it
    ever has: one number per parameter stands for all tensors of its entry (40 ns; comparing them
    one by one takes 110 to 160), and keeps
    none of them alive. It is not public: where it cannot be used, every step compares all.

    `tensor.data = other` changes no dict. Reading the addresses of all tensors would cost as much
    as the rest of the step's Python, so with many tensors one of each segment is asked: a loop over
    all state is noticed.

    Args:
        state: the optimizer's.
        members: parameters in the order of the tables; where their state is; the dtypes of what is
            stored.
    """

    ALL = 64  # up to so many tensors, all addresses are read

    def __init__(
        self, state: State, members: Sequence[tuple[Tensor, ParamState, dict[str, torch.dtype]]]
    ) -> None:
        self.members = members
        self.params = [param for param, *_ in members]
        places = [
            (slot.segment, param_state.refs[key], slot.address)
            for _, param_state, dtypes in members
            for key, slot in param_state.slots.items()
            if key in dtypes
        ]
        places += [
            (param_state.counters.steps, param_state.refs["step"], param_state.step_address)
            for _, param_state, _ in members
            if param_state.counters
        ]
        if len(places) > self.ALL:
            places = list(
                {id(segment): (segment, ref, address) for segment, ref, address in places}.values()
            )
        self.refs = [ref for _, ref, _ in places]
        self.addresses = [address for *_, address in places]
        self._note(state)

    def _note(self, state: State) -> None:
        # Looking an entry up costs more than anything else here: a tensor's hash is computed in
        # Python.
        self.aligned = list(map(id, state.values())) == [
            id(state.get(param)) for param in self.params
        ]
        self.versions = self._versions(state)

    def _versions(self, state: State) -> list[int] | None:
        if guards is None:
            return None
        aligned = self.aligned and len(state) == len(self.params)
        try:
            return list(
                map(guards.dict_version, state.values() if aligned else map(state.get, self.params))
            )
        except (
            RuntimeError,
            SystemError,
        ):  # not a dict: an entry that was removed, or something else in its place
            return None

    def holds(self, state: State) -> bool:
        """Whether the tensors are the same; also if somebody has changed entries, but not these
        tensors.
        """
        versions = self._versions(state)
        if versions is None or versions != self.versions:
            if not self._compare(state):
                return False
            self._note(state)
        tensors = [ref() for ref in self.refs]
        return [
            tensor is not None and local(tensor).data_ptr() for tensor in tensors
        ] == self.addresses

    def _compare(self, state: State) -> bool:
        for param, param_state, dtypes in self.members:
            entry = state.get(param)
            if not isinstance(entry, dict) or not param_state.holds_step(
                entry.get("step"), local(param).device
            ):
                return False
            if not all(
                param_state.holds(key, entry.get(key), dtype) for key, dtype in dtypes.items()
            ):
                return False
        return True


class PlanGuard:
    """All that one plan rests on, besides who the parameters are and where their state is.

    Args:
        live, grads: the parameters that the plan steps, in order, and their gradients, or what is
            here of them.
        idle: those that must have no gradient.
        buffers: flat parameters and gradients, if there are any.
        read: how gradients are read.
        moved: this step's gradients that lay otherwise than their DTensors, see
            `LocalShards.gradient_parts`.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        grads: Sequence[Tensor],
        idle: Sequence[Tensor],
        buffers: FlatBuffers | None,
        read: Callable[[Sequence[Tensor]], list[Tensor | None]],
        redistributed: dict[Tensor, Tensor],
    ) -> None:
        self.live, self.idle, self.read, self.buffers = list(live), list(idle), read, buffers
        self.shards, self.redistributed = (
            LocalShards(live) if any(map(is_sharded, live)) else None,
            redistributed,
        )
        memory = self.shards.tensors() if self.shards else self.live
        self.addresses = list(map(data_ptr, memory))
        slots = buffers.grad_addresses if buffers else {}
        self.slots = [slots.get(param, -1) for param in live]  # no address: empty gradients have 0
        self.grad_addresses = list(map(data_ptr, grads))
        self.at_home = list(map(operator.eq, self.grad_addresses, self.slots))
        # Gradients in our buffers: gradients only if something has written to them.
        self.places = (
            [buffers.places[param] for param in compress(live, self.at_home)] if buffers else []
        )
        # If all are the very views that we made of our buffers, their addresses say all.
        views = [place.grad_view for place in self.places]
        self.views = (
            views
            if views and len(views) == len(grads) and all(map(operator.is_, views, grads))
            else None
        )
        self.layouts = LayoutGuard(memory)
        self.grad_layouts = None if self.views else LayoutGuard(grads)

    def gradients(self) -> tuple[list[Tensor], list[int]] | None:
        """This step's gradients of the live parameters and their addresses; None if the plan no
        longer fits.

        Gradients may have moved; parameters, layouts, and who has a gradient may not have changed.
        """
        idle = self.buffers.read(self.idle) if self.buffers else self.read(self.idle)
        if any(map(operator.is_not, idle, repeat(None))):
            return None
        grads: list[Any] = self.read(self.live)
        if self.views and not all(map(operator.is_, grads, self.views)):
            return None
        if self.places and self.buffers and not self.buffers.all_written(self.places):
            return None
        memory = self.live
        if self.shards:
            memory, grads = (
                self.shards.tensors(),
                self.shards.gradient_parts(grads, self.redistributed),
            )
        if not self.layouts.hold(memory) or (
            self.grad_layouts and not self.grad_layouts.hold(grads)
        ):
            return None
        if list(map(data_ptr, memory)) != self.addresses:
            return None
        addresses = list(map(data_ptr, grads))
        if addresses != self.grad_addresses:
            if list(map(operator.eq, addresses, self.slots)) != self.at_home:
                return None
            self.grad_addresses = addresses
        # The same list if it can be: whoever compares it with the last one is done at once.
        return grads, self.grad_addresses
