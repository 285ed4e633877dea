"""Moves users' parameters and gradients into flat buffers, where that can be proven safe. No optimizer state here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arena import Slot, segments


def owns_its_storage(param: Tensor) -> bool:
    """Whether nobody else can see this parameter's memory, so that moving it moves it for everybody.

    The storage has two holders when the parameter is alone: the parameter and the handle we ask through. Whether
    another process has it, too, only storages on the CPU know: those on a GPU always answer that they are shared.
    """
    storage = param.untyped_storage()
    return (
        storage.nbytes() == param.numel() * param.element_size()
        and torch._C._storage_Use_Count(storage._cdata) == 2
        and not (param.device.type == "cpu" and storage.is_shared())
    )


def is_eligible(param: Tensor) -> bool:
    """Trained, dense, contiguous, floating point, a plain leaf tensor, and the only owner of its whole storage."""
    return (
        type(param) in (Tensor, torch.nn.Parameter)
        and param.requires_grad  # a frozen model under adapters would be copied, and given gradients it never has
        and param.layout == torch.strided
        and param.is_floating_point()
        and param.is_contiguous()
        and param.is_leaf
        and not param.is_inference()
        and param.device.type != "meta"
        and param.numel() > 0
        and owns_its_storage(param)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One parameter's slots in the flat buffers, and the gradient that lies in its slot."""

    param: Slot
    grad: Slot
    grad_view: Tensor

    def holds(self, param: Tensor) -> bool:
        """Whether the parameter still is where we put it."""
        return param.data_ptr() == self.param.address and param.dtype == self.param.segment.dtype


class FlatBuffers:
    """Parameters and gradients of one optimizer in flat segments per (device, dtype).

    Args:
        params: all parameters. Those not eligible stay where they are and are used through their addresses.

    Peak extra memory: one segment and the gradients' buffers, which are here to stay.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.places: dict[Tensor, Place] = {}
        self.grad_addresses: dict[Tensor, int] = {}
        self.grad_segments: list[Tensor] = []
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for param in params:
            if is_eligible(param):
                kinds[param.device, param.dtype].append(param)
        for (device, dtype), members in kinds.items():
            numels = [param.numel() for param in members]
            rest = iter(members)
            for slots, grad_slots in zip(segments(numels, dtype, device), segments(numels, dtype, device), strict=True):
                self.grad_segments.append(grad_slots[0].segment)
                for slot, grad_slot in zip(slots, grad_slots, strict=True):
                    self._move(next(rest), slot, grad_slot)

    def _move(self, param: Tensor, slot: Slot, grad_slot: Slot) -> None:
        data = slot.view(param).copy_(param.detach())
        grad = grad_slot.view(param)
        param.data = data
        place = self.places[param] = Place(slot, grad_slot, grad)
        self.grad_addresses[param] = grad_slot.address
        if param.grad is not None and param.grad.layout == torch.strided and param.grad.dtype == param.dtype:
            grad.copy_(param.grad)
            param.grad = None
        self._attach(param, place)

    def _attach(self, param: Tensor, place: Place) -> None:
        # One frozen since has no gradient, so that it is not stepped; one of another dtype cannot lie in the buffer.
        fits = param.grad_dtype in (None, param.dtype)
        if fits and param.requires_grad and param.grad is None and place.holds(param):
            param.grad = place.grad_view

    def place(self, param: Tensor, grad: Tensor) -> Place | None:
        """Where parameter and gradient lie, if both still are in their slots."""
        place = self.places.get(param)
        if place is None or not place.holds(param):
            return None
        if grad.data_ptr() != place.grad.address or grad.dtype != param.dtype or grad.stride() != param.stride():
            return None
        return place

    def zero_grad(self) -> None:
        """Zero the gradient buffers and put every parameter's gradient back into its slot."""
        if self.grad_segments:
            torch._foreach_zero_(self.grad_segments)
        for param, place in self.places.items():
            param.grad = None
            self._attach(param, place)
