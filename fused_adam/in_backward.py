"""Step inside backward: a parameter is updated as soon as its gradient is whole, and the gradient
is let go.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .optimizer import FusedAdam

BUCKET_BYTES = 32 << 20


def step_in_backward(
    model_or_params: nn.Module | Iterable[Tensor],
    optimizer: FusedAdam,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> StepInBackward:
    """Update parameters while backward runs, so that their gradients never exist all at once.

    The loop stays as it is: `loss.backward()`, `optimizer.step()`, `scheduler.step()`. Backward may
    also run in a closure given to `step()`. Each gradient is used and freed inside backward, with
    the learning rates of that moment, and the results have the same bits; `step()` then takes the
    parameters that are not in `model_or_params`, runs its hooks and ends the round. At most
    `bucket_bytes` and one gradient are alive at a time: small parameters wait for each other, so
    that launches stay few.

    Args:
        model_or_params: a module, or some of the optimizer's parameters. Frozen ones are left out.
        optimizer: a FusedAdam or FusedAdamW that has all of them.
        bucket_bytes: bytes of gradients that are stepped together, more than 0.

    Returns a handle: `remove()` ends it, `with handle.accumulate():` adds gradients up over several
        backward calls.

    Raises:
        TypeError, ValueError: an argument is not what it must be, or the optimizer has an option
            that looks at all gradients before the first update (max_grad_norm, skip_nonfinite),
            keeps them (flatten=True), has them elsewhere (grad_attribute), or steps through
            autograd (differentiable=True).
        RuntimeError: training runs in several processes, whose gradients are not averaged yet when
            they arrive here. Later, from backward: a parameter got a second gradient before
            `optimizer.step()`. From `step()`: a GradScaler, which would know of an overflow only
            after the updates.
    """
    if not isinstance(optimizer, FusedAdam):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, but must be a FusedAdam or FusedAdamW"
        )
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes={bucket_bytes!r} must be a whole number of bytes above 0")
    reasons = {
        "max_grad_norm": (
            optimizer._max_grad_norm,
            "the norm needs all gradients before the first update",
        ),
        "skip_nonfinite": (
            optimizer._skip_nonfinite,
            "it needs all gradients before the first update",
        ),
        "flatten": (optimizer._flatten, "its gradients stay where they are"),
        "grad_attribute": (
            optimizer._grad_attribute if optimizer._grad_attribute != "grad" else None,
            "backward tells when `grad` is whole",
        ),
        "differentiable": (
            optimizer.defaults["differentiable"],
            "autograd would need the gradients again",
        ),
    }
    for name, (value, reason) in reasons.items():
        if value:
            raise ValueError(
                f"{name}={value!r} cannot be combined with step_in_backward, because {reason}"
            )
    if optimizer._engine.in_backward is not None:
        raise ValueError(
            "this optimizer steps in backward already; call remove() on its handle first"
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            "step_in_backward sees gradients before they are averaged over processes; call step() instead"
        )
    params = (
        model_or_params.parameters() if isinstance(model_or_params, nn.Module) else model_or_params
    )
    return StepInBackward(
        [param for param in params if param.requires_grad], optimizer, bucket_bytes
    )


class StepInBackward:
    """What `step_in_backward` returns."""

    def __init__(self, params: list[Tensor], optimizer: FusedAdam, bucket_bytes: int) -> None:
        known = set(map(id, optimizer._params()))
        for number, param in enumerate(params):
            if id(param) not in known:
                raise ValueError(
                    f"parameter {number} of model_or_params is not one of the optimizer's"
                )
        self._optimizer, self._bucket_bytes = optimizer, bucket_bytes
        # Parameters whose gradients wait, per stream: what one stream has written, launches on it
        # may read.
        self._waiting: dict[object, list[Tensor]] = {}
        self._waiting_bytes: dict[object, int] = {}
        self._stepped: set[Tensor] = set()
        self._accumulating = self._called_back = False
        self._lock = threading.RLock()  # autograd has a thread per device
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for param in dict.fromkeys(params)
        ]
        optimizer._engine.in_backward = self

    def remove(self) -> None:
        """End it: gradients stay for `optimizer.step()`, as without."""
        self.end_round()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._optimizer._engine.in_backward is self:
            self._optimizer._engine.in_backward = None

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, backward adds gradients up and steps nothing; the next backward outside steps
        with the sum.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def end_round(self) -> None:
        """Step what still waits, and expect each parameter once more. `optimizer.step()` does so."""
        with self._lock:
            self._step_waiting()
            self._stepped.clear()
            self._called_back = (
                False  # also after a backward that raised, whose callback never came
            )

    def drop_failed_backward(self) -> None:
        """After a backward that raised, forget what waits: its gradients are gone.
        `optimizer.zero_grad()` does so.

        Parameters that were updated before the error stay updated.
        """
        with self._lock:
            if self._called_back:
                self._waiting.clear()
                self._waiting_bytes.clear()
                self._stepped.clear()
                self._called_back = False

    def _arrived(self, param: Tensor) -> None:
        if not self._accumulating:
            with self._lock, torch.no_grad():
                self._take(param)

    def _take(self, param: Tensor) -> None:
        if param in self._stepped:
            if not any(param is member for member in self._optimizer._params()):
                return  # it has left the optimizer
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} got a second gradient before optimizer.step(). After "
                "several calls of backward: call step() after each, or run all but the last under `with "
                "handle.accumulate():`. Within one backward, as tied weights do under reentrant checkpointing: "
                "checkpoint with use_reentrant=False, or leave the parameter out (`step_in_backward(params, "
                "optimizer)` with the others), so that step() takes it"
            )
        self._stepped.add(param)
        if not self._called_back:
            # At the end of this backward, when autograd has joined its streams.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            self._called_back = True
        on_host = param.device.type == "cpu"
        stream = (
            None if on_host else torch.get_device_module(param.device).current_stream(param.device)
        )
        # Nothing here may take longer with more parameters: it runs once for each.
        self._waiting.setdefault(stream, []).append(param)
        held = self._waiting_bytes.get(stream, 0) + (0 if param.grad is None else param.grad.nbytes)
        self._waiting_bytes[stream] = held
        if held >= self._bucket_bytes:
            self._step(stream)

    def _end_backward(self) -> None:
        with self._lock, torch.no_grad():
            self._called_back = False
            self._step_waiting()

    def _step_waiting(self) -> None:
        while self._waiting:
            self._step(next(iter(self._waiting)))

    def _step(self, stream: object) -> None:
        """Step what waits for a launch on this stream."""
        waiting = self._waiting.pop(stream)
        del self._waiting_bytes[stream]
        # Groups are the user's to edit: gradients of parameters that left are not ours to free.
        members = set(map(id, self._optimizer._params()))
        ready = [param for param in waiting if param.grad is not None and id(param) in members]
        if ready:
            self._optimizer._step_only(ready)
        for param in ready:
            param.grad = None
