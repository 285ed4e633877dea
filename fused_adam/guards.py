"""Checks whether a cached plan still fits this step: parameters, gradients, state, step counters.

The word is torch.compile's: a guard says whether cached work may be used again. Guards decide
nothing; where one fails, the engine plans anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import compress, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distributed import LocalShards, is_sharded, local
from .plan import Row
from .state.arena import Arena, Entries, State
from .state.flatten import FlatBuffers, read_grad
from .state.param_state import ParamState
from .torch_private import dynamo_guards as guards
from .torch_private import under_fake_mode

GradReader = Callable[[Sequence[Tensor]], list[Tensor | None]]

data_ptr = torch.Tensor.data_ptr


class Gradients(NamedTuple):
    """This step's gradients of the parameters that a plan steps, in order."""

    tensors: list[Tensor]  # of a DTensor, this rank's shard
    addresses: list[int]


class StoredParam(NamedTuple):
    """A parameter, and what a plan's tables assume about its state."""

    param: Tensor
    param_state: ParamState
    entries: Entries


def reader(attribute: str) -> GradReader:
    """Return the function that reads this attribute of many parameters at once."""
    if attribute == "grad":
        return read_grad
    return lambda params: [getattr(param, attribute, None) for param in params]


def layouts(tensors: Sequence[Tensor]) -> list[Any]:
    """Return what a kernel assumes about each tensor besides its address, to be compared.

    That is type, dtype, layout, device, sizes, strides, conjugate bit and negative bit.
    """
    return [
        t is not None
        and (type(t), t.dtype, t.layout, t.device, t.shape, t.stride(), t.is_conj(), t.is_neg())
        for t in tensors
    ]


class LayoutGuard:
    """Says whether tensors still have the layouts they had, without keeping them alive.

    torch.compile's TensorGuards takes 50 ns per tensor, where Python takes 600. It refuses a tensor
    that is listed twice; then, and where torch does not have it, Python compares.
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
        """Whether these tensors have the layouts of those that the guard was made with."""
        return bool(self._check(*tensors))


class StateGuard:
    """Says whether `optimizer.state` still holds the tensors that a plan's tables point to.

    Users may edit `state` between steps, so every step asks. Two cheap questions answer it:

    - Has an entry changed? torch.compile numbers the contents of dicts, and never uses a number
      twice. One number per parameter (40 ns) replaces comparing its tensors (110 to 160 ns), and
      keeps none of them alive. Where numbers cannot be had, every step compares all tensors.
    - Has a tensor other memory? `tensor.data = other` changes no dict. Reading all addresses would
      cost as much as the rest of the step's Python, so with more than `MAX_ADDRESSES` tensors one
      tensor per segment is read. That notices a loop over all state.

    Args:
        state: the optimizer's state.
        rows: what the plan's tables say about the parameters that it steps.
    """

    MAX_ADDRESSES = 64

    def __init__(self, state: State, rows: Sequence[Row]) -> None:
        self.members = members = [
            StoredParam(row.user_param, row.param_state, row.entries)
            for row in sorted(rows, key=operator.attrgetter("grad_index"))
        ]
        self.params = [member.param for member in members]
        views = [
            (slot.segment, param_state.refs[key], slot.address)
            for _, param_state, entries in members
            for key, slot in param_state.slots.items()
            if key in entries
        ]
        views += [
            (param_state.counters.steps, param_state.refs["step"], param_state.step_address)
            for _, param_state, _ in members
            if param_state.counters
        ]
        if len(views) > self.MAX_ADDRESSES:
            by_segment = {id(segment): (segment, ref, at) for segment, ref, at in views}
            views = list(by_segment.values())
        self.refs = [ref for _, ref, _ in views]
        self.addresses = [address for _, _, address in views]
        # Entries of DTensors are DTensors: the address is that of the local tensor.
        sharded = any(map(is_sharded, self.params))
        self._address = (lambda tensor: local(tensor).data_ptr()) if sharded else data_ptr
        self._remember(state)

    def _remember(self, state: State) -> None:
        """Take the entries as they are now for unchanged."""
        # Looking up an entry costs more than anything else here, because a tensor's hash is
        # computed in Python. Entries in the order of the parameters need no look-up.
        entries = [state.get(param) for param in self.params]
        self.in_order = list(map(id, state.values())) == list(map(id, entries))
        self.versions = self._versions(state)

    def _versions(self, state: State) -> list[int] | None:
        """The number of each entry's contents; None where torch has none."""
        if guards is None:
            return None
        in_order = self.in_order and len(state) == len(self.params)
        entries = state.values() if in_order else map(state.get, self.params)
        try:
            return list(map(guards.dict_version, entries))
        except (RuntimeError, SystemError):  # an entry was removed, or is no dict
            return None

    def holds(self, state: State) -> bool:
        """Whether the tensors are the same. Other changes of the entries do not matter."""
        versions = self._versions(state)
        if versions is None or versions != self.versions:
            if not self._same_tensors(state):
                return False
            self._remember(state)
        address, tensors = self._address, [ref() for ref in self.refs]
        return [tensor is not None and address(tensor) for tensor in tensors] == self.addresses

    def _same_tensors(self, state: State) -> bool:
        for param, param_state, entries in self.members:
            entry = state.get(param)
            if not isinstance(entry, dict):
                return False
            if not param_state.holds_step(entry.get("step"), local(param).device):
                return False
            for key, spec in entries.items():
                if not param_state.holds(key, entry.get(key), spec.dtype):
                    return False
        return True


class PlanGuard:
    """Says whether a plan fits this step, and reads the step's gradients on the way.

    Gradients may lie elsewhere than in the last step. Everything else has to be as it was: step
    counters, state, who has a gradient, the layouts of parameters and gradients, and the
    parameters' addresses. Which parameters the optimizer has is the engine's to check.

    Args:
        stepped: the parameters that the plan steps, in order.
        grads: their gradients; of a DTensor, this rank's shard.
        idle: parameters that must have no gradient.
        buffers: flat parameters and gradients, with `flatten=True`.
        read: reads gradients from the optimizer's `grad_attribute`.
        redistributed: this step's gradients whose placements differed from their parameter's, see
            `LocalShards.gradient_parts`.
        arena: the optimizer's, with all step counters.
        state_guard: the guard of these parameters' state.
    """

    def __init__(
        self,
        stepped: Sequence[Tensor],
        grads: Sequence[Tensor],
        idle: Sequence[Tensor],
        buffers: FlatBuffers | None,
        read: GradReader,
        redistributed: dict[Tensor, Tensor],
        arena: Arena,
        state_guard: StateGuard,
    ) -> None:
        self.stepped, self.idle, self.read, self.buffers = list(stepped), list(idle), read, buffers
        self.arena, self.state_guard, self.redistributed = arena, state_guard, redistributed
        self.shards = LocalShards(stepped) if any(map(is_sharded, stepped)) else None
        memory = self.shards.tensors() if self.shards else self.stepped
        self.addresses = list(map(data_ptr, memory))
        self.grad_addresses = list(map(data_ptr, grads))
        self.layouts = LayoutGuard(memory)
        # A plan updates gradients in our flat buffers together, so they must stay there and others
        # must stay out. -1 is no address; that of an empty gradient is 0.
        flat_params = buffers.flat_params if buffers else {}
        self.slots = [
            flat_params[param].grad.address if param in flat_params else -1 for param in stepped
        ]
        self.in_slot = list(map(operator.eq, self.grad_addresses, self.slots))
        self.flat_params = [flat_params[param] for param in compress(stepped, self.in_slot)]
        # If every gradient is the very view that we made, comparing objects replaces comparing
        # layouts.
        views = [flat_param.grad_view for flat_param in self.flat_params]
        all_ours = len(views) == len(grads) and all(map(operator.is_, views, grads))
        self.views = views if views and all_ours else None
        self.grad_layouts = None if self.views else LayoutGuard(grads)

    def gradients(self, state: State) -> Gradients | None:
        """Return the gradients of the plan's parameters, or None if the plan does not fit."""
        if under_fake_mode():
            return None  # real parameters are an error there, which planning anew raises
        if not self.arena.counters_unchanged() or not self.state_guard.holds(state):
            return None
        idle = self.buffers.read(self.idle) if self.buffers else self.read(self.idle)
        if any(map(operator.is_not, idle, repeat(None))):
            return None
        grads: list[Any] = self.read(self.stepped)
        if self.views and not all(map(operator.is_, grads, self.views)):
            return None
        # A view that nothing has written to since `zero_grad()` is no gradient.
        if self.flat_params and self.buffers and not self.buffers.all_written(self.flat_params):
            return None
        memory = self.stepped
        if self.shards:
            memory = self.shards.tensors()
            grads = self.shards.gradient_parts(grads, self.redistributed)
        if not self.layouts.hold(memory):
            return None
        if self.grad_layouts and not self.grad_layouts.hold(grads):
            return None
        if list(map(data_ptr, memory)) != self.addresses:
            return None
        addresses = list(map(data_ptr, grads))
        if addresses != self.grad_addresses:
            if list(map(operator.eq, addresses, self.slots)) != self.in_slot:
                return None
            self.grad_addresses = addresses
        # Addresses that did not change are the same list object, which compares in no time.
        return Gradients(grads, self.grad_addresses)
