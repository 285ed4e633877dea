"""Moves users' parameters and gradients into flat buffers, where that can be proven safe. No
optimizer state here.
"""

from __future__ import annotations

import operator
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import Slot, segments

# Of parameters that we have moved: an optimizer that is made later may move them again.
_our_storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()


def owns_its_storage(param: Tensor) -> bool:
    """Whether nobody else can see this parameter's memory, so that moving it moves it for
    everybody.

    The storage has two holders when the parameter is alone: the parameter and the handle we ask
    through. Whether another process has it, too, only storages on the CPU know: those on a GPU
    always answer that they are shared. Memory that torch did not allocate (`from_numpy`,
    `frombuffer`, `from_dlpack`, a mapped file) cannot be resized: its owner sees it in ways that no
    count of holders tells.
    """
    storage = param.untyped_storage()
    on_host = param.device.type == "cpu"
    return (
        storage.nbytes() == param.numel() * param.element_size()
        and torch._C._storage_Use_Count(storage._cdata) == 2
        and (storage.resizable() or storage in _our_storages)
        and not (on_host and storage.is_shared())
        # Pinned memory was asked for, and buffers are not.
        and not (on_host and torch.cuda.is_initialized() and param.is_pinned())  # type: ignore[no-untyped-call]
    )


def is_eligible(param: Tensor) -> bool:
    """Trained, dense, contiguous, floating point, a plain leaf tensor, and the only owner of its
    whole storage.
    """
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


def _let_go_of_grad(param: Tensor) -> bool:
    """Take away the parameter's gradient, unless somebody else holds it, and may write to it."""
    grad = param.grad
    if grad is None:
        return True
    ref = weakref.ref(grad)
    param.grad = grad = None
    held = ref()
    if held is not None:
        param.grad = held
    return held is None


@dataclass(slots=True, eq=False)
class FlatParam:
    """One parameter's slots in the flat buffers, and the gradient that lies in its slot."""

    param: Slot
    grad: Slot
    grad_view: Tensor
    zeroed: int  # the view's version when `zero_grad()` zeroed it: what has another one now was written to
    had_gradient: bool = False  # one that the view can hold

    def holds(self, param: Tensor) -> bool:
        """Whether the parameter still is where we put it."""
        return param.data_ptr() == self.param.address and param.dtype == self.param.segment.dtype

    def takes(self, param: Tensor) -> bool:
        """Whether the parameter's next gradient can be added up in the view.

        It has to be like the one that is there, or was. In a view a sparse gradient would become a
        dense one, which nothing refuses, and one of another dtype cannot lie there. A gradient that
        is part of another buffer stays
        there: DDP with gradient_as_bucket_view puts a view of its bucket wherever it finds a
        gradient, also for unused parameters. A parameter that never had a gradient gets no view, so
        that functions which go over all gradients do not give it one.
        """
        grad = param.grad
        if grad is not None and grad is not self.grad_view:
            alike = grad.layout == torch.strided and grad.dtype == param.dtype
            self.had_gradient = alike and owns_its_storage(grad)
        alike = self.had_gradient and param.grad_dtype in (None, param.dtype)
        return alike and param.requires_grad and self.holds(param)

    def is_zeroed(self) -> bool:
        """Whether nothing has written to the view since it was zeroed, as far as one can tell
        without waiting.
        """
        # Collectives, `grad.data` and arrays over its memory count no version. On the CPU the
        # values tell.
        view = self.grad_view
        return view._version == self.zeroed and not (
            view.device.type == "cpu" and bool(view.count_nonzero())
        )


def read_grad(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, where torch has them."""
    return [param.grad for param in params]


class FlatBuffers:
    """Parameters and gradients of one optimizer in flat segments per (device, dtype).

    `zero_grad()` gives every parameter that ever had a gradient a view of its slot for the next
    one. A view that nothing has written to since it was zeroed is no gradient: torch would have
    None there. The view's version counter tells. Where that cannot, views count as gradients, see
    `always`.

    Args:
        params: all parameters. Those not eligible stay where they are and are used through their
            addresses.

    Peak extra memory: one segment and the gradients' buffers, which are here to stay.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.places: dict[Tensor, FlatParam] = {}
        self.grad_addresses: dict[Tensor, int] = {}
        self.grad_segments: list[Tensor] = []
        self.params = list(params)
        self.uncounted = (
            False  # whether gradients are written or zeroed in ways that no version counts
        )
        self.always = False  # whether every view counts as a gradient, written to or not
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for param in params:
            if is_eligible(param):
                kinds[param.device, param.dtype].append(param)
        for (device, dtype), members in kinds.items():
            numels = [param.numel() for param in members]
            rest = iter(members)
            for slots, grad_slots in zip(
                segments(numels, dtype, device), segments(numels, dtype, device), strict=True
            ):
                self.grad_segments.append(grad_slots[0].segment)
                for slot, grad_slot in zip(slots, grad_slots, strict=True):
                    self._move(next(rest), slot, grad_slot)

    def _move(self, param: Tensor, slot: Slot, grad_slot: Slot) -> None:
        param.data = slot.view(param).copy_(param.detach())
        view = grad_slot.view(param)
        self.places[param] = FlatParam(slot, grad_slot, view, view._version)
        self.grad_addresses[param] = grad_slot.address
        _our_storages.add(param.untyped_storage())

    def read(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients; None for views of ours that nothing was written to."""
        grads = read_grad(params)
        if self.always:
            return grads
        return [
            None if grad is not None and self._is_zeroed(param, grad) else grad
            for param, grad in zip(params, grads, strict=True)
        ]

    def _is_zeroed(self, param: Tensor, grad: Tensor) -> bool:
        place = self.places.get(param)
        return place is not None and grad is place.grad_view and place.is_zeroed()

    def in_buffers(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[int, ...]:
        """The positions of gradients that are views of ours."""
        places = map(self.places.get, params)
        return tuple(
            i
            for i, (place, grad) in enumerate(zip(places, grads, strict=True))
            if place and grad is place.grad_view
        )

    def all_written(self, places: Sequence[FlatParam]) -> bool:
        """Whether the view of each place is a gradient."""
        if self.always or False not in [
            place.grad_view._version != place.zeroed for place in places
        ]:
            return True
        return not any(place.is_zeroed() for place in places)

    def look_for_uncounted(self) -> None:
        """Let all views count from now on if one is not zero that nothing is known to have written
        to.

        A CUDA graph of a backward pass does that, or a collective over all gradients. Waits for the
        device.
        """
        zeroed = [
            param.grad
            for param in self.places
            if param.grad is not None and self._is_zeroed(param, param.grad)
        ]
        if any(bool(view.count_nonzero()) for view in zeroed):
            self.uncounted = self.always = True

    def place(self, param: Tensor, grad: Tensor) -> FlatParam | None:
        """Where parameter and gradient lie, if both still are in their slots."""
        place = self.places.get(param)
        if place is None or not place.holds(param):
            return None
        if (
            grad.data_ptr() != place.grad.address
            or grad.dtype != param.dtype
            or grad.stride() != param.stride()
        ):
            return None
        return place

    def keep(self, params: Sequence[Tensor]) -> None:
        """Let go of parameters that the optimizer no longer has, and of gradient buffers that
        nothing lies in.
        """
        if len(params) == len(self.params) and all(map(operator.is_, params, self.params)):
            return
        self.params = list(params)
        known = set(map(id, params))
        for param in [param for param in self.places if id(param) not in known]:
            place = self.places.pop(param)
            del self.grad_addresses[param]
            # Its gradient is somebody else's now: out of the memory that we zero.
            if param.grad is place.grad_view:
                param.grad = (
                    None if place.is_zeroed() and not self.always else place.grad_view.clone()
                )
        used = {id(place.grad.segment) for place in self.places.values()}
        self.grad_segments = [segment for segment in self.grad_segments if id(segment) in used]

    def zero_grad(self, set_to_none: bool) -> list[Tensor]:
        """Zero the gradient buffers, and return the parameters whose gradients are not in them.

        Args:
            set_to_none: as in torch, no parameter has a gradient until something writes one. Else
                every gradient stays one, of zeros.
        """
        if self.grad_segments:
            torch._foreach_zero_(self.grad_segments)
        others = []
        for param in self.params:
            place, grad = self.places.get(param), param.grad
            if place is None or not place.takes(param) or (grad is None and not set_to_none):
                others.append(param)
                continue
            attached = grad is place.grad_view
            del grad
            if not attached:
                if not set_to_none and not _let_go_of_grad(param):
                    others.append(param)
                    continue
                param.grad = place.grad_view
            if set_to_none:
                place.zeroed = place.grad_view._version
            elif not attached:
                place.zeroed = -1  # a gradient, as the one that it replaces
        return others
