"""flatten=True: users' parameters and gradients in flat buffers. No optimizer state here."""

from __future__ import annotations

import operator
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_private import foreach_zero_, holders_of
from .memory import Slot, segments

# Storages of parameters that we have moved: a later optimizer may move them again.
_our_storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()


def owns_its_storage(param: Tensor) -> bool:
    """Whether nobody else can see this tensor's memory, so that moving it is safe.

    A storage that belongs to one tensor has two holders: the tensor, and the handle we ask through.
    """
    storage = param.untyped_storage()
    on_host = param.device.type == "cpu"
    return (
        storage.nbytes() == param.numel() * param.element_size()
        and holders_of(storage) == 2
        # Memory that torch did not allocate (`from_numpy`, `from_dlpack`, a mapped file) has an
        # owner that no count of holders shows. It cannot be resized.
        and (storage.resizable() or storage in _our_storages)
        # Another process may have it. Storages on a GPU always say so, hence they are not asked.
        and not (on_host and storage.is_shared())
        # The user asked for pinned memory, and flat buffers are not pinned.
        and not (on_host and torch.cuda.is_initialized() and param.is_pinned())  # type: ignore[no-untyped-call]
    )


def is_eligible(param: Tensor) -> bool:
    """Whether the parameter can be moved: dense, plain, trained, and alone in its storage."""
    return (
        type(param) in (Tensor, torch.nn.Parameter)
        # A frozen model under adapters would be copied, and get memory for gradients it never has.
        and param.requires_grad
        and param.layout == torch.strided
        and param.is_floating_point()
        and param.is_contiguous()
        and param.is_leaf
        and not param.is_inference()
        and param.device.type != "meta"
        and param.numel() > 0
        and owns_its_storage(param)
    )


def _drop_grad(param: Tensor) -> bool:
    """Set the gradient to None, unless somebody else holds it and may write to it.

    Returns whether there was a gradient, and now is none.
    """
    grad = param.grad
    if grad is None:
        return False
    ref = weakref.ref(grad)
    param.grad = grad = None
    param.grad = ref()
    return param.grad is None


@dataclass(slots=True, eq=False)
class FlatParam:
    """One parameter's slots in the flat buffers, and the gradient that lies in its slot."""

    param: Slot
    grad: Slot
    grad_view: Tensor
    # Version of `grad_view` after `zero_grad()`: any other version means that it was written to.
    zeroed: int
    had_gradient: bool = False  # one that the view can hold

    def holds(self, param: Tensor) -> bool:
        """Whether the parameter still is where we put it."""
        return param.data_ptr() == self.param.address and param.dtype == self.param.segment.dtype

    def takes(self, param: Tensor) -> bool:
        """Whether the parameter's next gradient can be accumulated in the view.

        A parameter that never had a gradient gets no view, so that functions which go over all
        gradients do not give it one.
        """
        grad = param.grad
        if grad is not None and grad is not self.grad_view:
            # The next gradient will be like this one. In a view a sparse gradient would silently
            # become dense, and one of another dtype does not fit. One that is part of another
            # buffer stays there: DDP with gradient_as_bucket_view puts a view of its bucket
            # wherever it finds a gradient, also for unused parameters.
            fits = grad.layout == torch.strided and grad.dtype == param.dtype
            self.had_gradient = fits and owns_its_storage(grad)
        fits = self.had_gradient and param.grad_dtype in (None, param.dtype)
        return fits and param.requires_grad and self.holds(param)

    def is_zeroed(self) -> bool:
        """Whether the view is unwritten since it was zeroed, as far as one can tell cheaply."""
        # Collectives, `grad.data` and arrays over the memory do not change the version. On the CPU
        # the values tell; on a GPU reading them would wait.
        view = self.grad_view
        return view._version == self.zeroed and not (
            view.device.type == "cpu" and bool(view.count_nonzero())
        )


def read_grad(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, where torch has them."""
    return [param.grad for param in params]


class FlatBuffers:
    """Parameters and gradients of one optimizer in flat segments per device and dtype.

    `zero_grad()` gives every parameter that ever had a gradient a view of its slot, to accumulate
    the next one in. A view that nothing has written to since is no gradient: torch would have None
    there. The view's version tells; where it cannot, all views count as gradients, see `always`.

    Peak extra memory: one segment for parameters as they move, and the gradients' buffers, which
    stay.

    Args:
        params: all parameters. Those that are not eligible stay where they are, and are stepped on
            there.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.flat_params: dict[Tensor, FlatParam] = {}
        self.grad_segments: list[Tensor] = []
        self.params = list(params)
        # Whether gradients are written or zeroed in ways that change no version, such as replays of
        # a CUDA graph.
        self.uncounted = False
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
        self.flat_params[param] = FlatParam(slot, grad_slot, view, view._version)
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
        flat_param = self.flat_params.get(param)
        return flat_param is not None and grad is flat_param.grad_view and flat_param.is_zeroed()

    def in_buffers(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[int, ...]:
        """The positions of gradients that are views of ours."""
        flat_params = map(self.flat_params.get, params)
        return tuple(
            i
            for i, (flat_param, grad) in enumerate(zip(flat_params, grads, strict=True))
            if flat_param and grad is flat_param.grad_view
        )

    def all_written(self, flat_params: Sequence[FlatParam]) -> bool:
        """Whether the view of each of these is a gradient."""
        # In an ordinary step the versions alone answer, without a look at any values.
        if self.always or all(x.grad_view._version != x.zeroed for x in flat_params):
            return True
        return not any(flat_param.is_zeroed() for flat_param in flat_params)

    def look_for_uncounted(self) -> None:
        """Find gradients that were written without a new version; then all views count from now on.

        A CUDA graph of a backward pass writes such gradients, or a collective over all of them.
        Waits for the device.
        """
        for param, flat_param in self.flat_params.items():
            view = flat_param.grad_view
            if param.grad is view and flat_param.is_zeroed() and bool(view.count_nonzero()):
                self.uncounted = self.always = True
                return

    def find(self, param: Tensor, grad: Tensor) -> FlatParam | None:
        """The slots of parameter and gradient, if both still are in them."""
        flat_param = self.flat_params.get(param)
        if flat_param is None or not flat_param.holds(param):
            return None
        in_slot = grad.data_ptr() == flat_param.grad.address
        # Someone may have put another view of our memory there.
        in_slot = in_slot and grad.dtype == param.dtype and grad.stride() == param.stride()
        return flat_param if in_slot else None

    def keep(self, params: Sequence[Tensor]) -> None:
        """Forget parameters that the optimizer no longer has, and gradient buffers left empty."""
        if len(params) == len(self.params) and all(map(operator.is_, params, self.params)):
            return
        self.params = list(params)
        known = set(map(id, params))
        for param in [param for param in self.flat_params if id(param) not in known]:
            flat_param = self.flat_params.pop(param)
            # Its gradient is somebody else's now, so it leaves the memory that we zero.
            if param.grad is flat_param.grad_view:
                is_none = flat_param.is_zeroed() and not self.always
                param.grad = None if is_none else flat_param.grad_view.clone()
        used = {id(flat_param.grad.segment) for flat_param in self.flat_params.values()}
        self.grad_segments = [segment for segment in self.grad_segments if id(segment) in used]

    def zero_grad(self, set_to_none: bool) -> list[Tensor]:
        """Zero the gradient buffers, and return the parameters whose gradients are not in them.

        Args:
            set_to_none: as in torch, no parameter has a gradient until something writes one. Else
                every gradient stays one, of zeros.
        """
        if self.grad_segments:
            foreach_zero_(self.grad_segments)
        others = []
        for param in self.params:
            flat_param = self.flat_params.get(param)
            if flat_param is None or not flat_param.takes(param):
                others.append(param)
                continue
            attached = param.grad is flat_param.grad_view
            if not (attached or set_to_none or _drop_grad(param)):
                others.append(param)
                continue
            if not attached:
                param.grad = flat_param.grad_view
            if set_to_none:
                flat_param.zeroed = flat_param.grad_view._version
            elif not attached:
                flat_param.zeroed = -1  # a gradient of zeros, like the one that it replaces
        return others
