"""Steps inside backward: each parameter is updated as soon as its gradient is complete.

The gradient is freed at once, so that gradients never exist all at the same time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .arguments import refuse
from .optimizer import FusedAdam
from .torch_private import at_end_of_backward

BUCKET_BYTES = 32 << 20


def step_in_backward(
    model_or_params: nn.Module | Iterable[Tensor],
    optimizer: FusedAdam,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> StepInBackward:
    """Update parameters while backward runs, so that their gradients never exist all at once.

    The training loop does not change. Each gradient is used and freed inside `loss.backward()`,
    with the learning rate of that moment, and results have the same bits. `optimizer.step()` then
    updates the parameters that are not in `model_or_params`. Backward may also run in a closure.

    Args:
        model_or_params: a module, or some of the optimizer's parameters. Frozen ones are left out.
        optimizer: a FusedAdam or FusedAdamW that has all of them.
        bucket_bytes: small parameters wait for each other until their gradients have this many
            bytes, so that there are few launches. At most this and one gradient exist at a time.

    Returns:
        A handle. `handle.remove()` ends it. `with handle.accumulate():` lets several backward calls
        add up gradients.

    Raises:
        TypeError, ValueError: an argument is not what it must be, or the optimizer has an option
            that needs all gradients before the first update (max_grad_norm, skip_nonfinite,
            skip_grad_norm), or has gradients that do not come and go in `grad` (flatten,
            grad_attribute, differentiable).
        RuntimeError: training runs in several processes, which have not averaged their gradients
            at that time. Later, from backward: a parameter got a second gradient before
            `optimizer.step()`. From `step()`: a GradScaler was used, which sees overflows too late.

    Example:
        >>> handle = step_in_backward(model, optimizer)
        >>> loss_fn(model(x), y).backward()  # updates the parameters
        >>> optimizer.step()
    """
    _check(optimizer, bucket_bytes)
    if isinstance(model_or_params, nn.Module):
        model_or_params = model_or_params.parameters()
    params = [param for param in model_or_params if param.requires_grad]
    return StepInBackward(params, optimizer, bucket_bytes)


def _check(optimizer: FusedAdam, bucket_bytes: int) -> None:
    """Raise unless this optimizer, here and now, can step inside backward."""
    if not isinstance(optimizer, FusedAdam):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, but must be a FusedAdam or FusedAdamW"
        )
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes={bucket_bytes!r} must be a whole number of bytes above 0")
    other_attribute = optimizer._grad_attribute != "grad" and optimizer._grad_attribute
    differentiable = optimizer.defaults["differentiable"]
    all_first = "needs all gradients before the first update"
    for name, value, reason in (
        ("max_grad_norm", optimizer._max_grad_norm, f"the norm {all_first}"),
        ("skip_nonfinite", optimizer._skip_nonfinite, f"it {all_first}"),
        ("skip_grad_norm", optimizer._skip_grad_norm, f"the norm {all_first}"),
        ("flatten", optimizer._flatten, "its gradients stay where they are"),
        ("grad_attribute", other_attribute, "backward tells when `grad` is whole"),
        ("differentiable", differentiable, "autograd would need the gradients again"),
    ):
        # By identity: a limit may be a tensor of value 0, which is on the device.
        if value is not None and value is not False:
            refuse(name, value, "step_in_backward", reason)
    if optimizer._engine.in_backward is not None:
        raise ValueError(
            "this optimizer steps in backward already; call remove() on its handle first"
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            "step_in_backward sees gradients before they are averaged over processes; call step() "
            "instead"
        )


class StepInBackward:
    """The handle that `step_in_backward` returns.

    A hook on every parameter collects it when its gradient is complete. Buckets are stepped when
    they are full, and at the end of each backward.
    """

    def __init__(self, params: list[Tensor], optimizer: FusedAdam, bucket_bytes: int) -> None:
        known = set(map(id, optimizer._params()))
        for number, param in enumerate(params):
            if id(param) not in known:
                raise ValueError(
                    f"parameter {number} of model_or_params is not one of the optimizer's"
                )
        self._optimizer, self._bucket_bytes = optimizer, bucket_bytes
        # Parameters that wait for their bucket to fill, per stream: launches may read gradients
        # that their own stream has written, without waiting for another one.
        self._waiting: dict[object, list[Tensor]] = {}
        self._waiting_bytes: dict[object, int] = {}
        self._seen: set[Tensor] = set()  # since the last `optimizer.step()`
        self._accumulating = False
        self._end_is_queued = False  # whether `_end_backward` will be called
        self._lock = threading.RLock()  # autograd has a thread per device
        # A parameter that is given twice gets one hook: another would report a second gradient.
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._on_grad)  # type: ignore[no-untyped-call]
            for param in dict.fromkeys(params)
        ]
        optimizer._engine.in_backward = self

    def remove(self) -> None:
        """Let `optimizer.step()` do all updates again. What waits is stepped first."""
        self.end_round()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._optimizer._engine.in_backward is self:
            self._optimizer._engine.in_backward = None

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let backward add up gradients without a step, as long as this context lasts.

        The next backward outside of it steps with the sum.

        Example:
            >>> with handle.accumulate():
            ...     loss_fn(model(first), y).backward()
            >>> loss_fn(model(second), y).backward()  # updates the parameters
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def end_round(self) -> None:
        """Step what still waits, and allow each parameter one more gradient.

        `optimizer.step()` calls it.
        """
        with self._lock:
            self._step_waiting()
            self._seen.clear()
            # A backward that raised never called `_end_backward`.
            self._end_is_queued = False

    def drop_failed_backward(self) -> None:
        """Forget what waits after a backward that raised.

        `optimizer.zero_grad()` calls it. Parameters that were updated before the error stay
        updated.
        """
        with self._lock:
            if self._end_is_queued:
                self._waiting.clear()
                self._waiting_bytes.clear()
                self._seen.clear()
                self._end_is_queued = False

    def _on_grad(self, param: Tensor) -> None:
        if not self._accumulating:
            with self._lock, torch.no_grad():
                self._take(param)

    def _take(self, param: Tensor) -> None:
        """Add the parameter to its stream's bucket, and step the bucket if it is full.

        Runs once per parameter and backward, so nothing in here may take longer with more
        parameters.
        """
        if param in self._seen:
            self._refuse_second_gradient(param)
            return
        self._seen.add(param)
        if not self._end_is_queued:
            # At the end of this backward, when autograd has joined its streams.
            at_end_of_backward(self._end_backward)
            self._end_is_queued = True
        stream = None
        if param.device.type != "cpu":
            stream = torch.get_device_module(param.device).current_stream(param.device)
        self._waiting.setdefault(stream, []).append(param)
        # A hook that ran before ours may have taken the gradient away.
        held = self._waiting_bytes.get(stream, 0) + (0 if param.grad is None else param.grad.nbytes)
        self._waiting_bytes[stream] = held
        if held >= self._bucket_bytes:
            self._step(stream)

    def _refuse_second_gradient(self, param: Tensor) -> None:
        if not any(param is member for member in self._optimizer._params()):
            return  # it has left the optimizer
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} got a second gradient before "
            "optimizer.step(). After several calls of backward: call step() after each, or run all "
            "but the last under `with handle.accumulate():`. Within one backward, as tied weights "
            "do under reentrant checkpointing: checkpoint with use_reentrant=False, or leave the "
            "parameter out (`step_in_backward(params, optimizer)` with the others), so that step() "
            "takes it"
        )

    def _end_backward(self) -> None:
        with self._lock, torch.no_grad():
            self._end_is_queued = False
            self._step_waiting()

    def _step_waiting(self) -> None:
        while self._waiting:
            self._step(next(iter(self._waiting)))

    def _step(self, stream: object) -> None:
        """Step the bucket of this stream, and free its gradients."""
        waiting = self._waiting.pop(stream)
        del self._waiting_bytes[stream]
        # Users may edit groups: gradients of parameters that left are not ours to free.
        members = set(map(id, self._optimizer._params()))
        ready = [param for param in waiting if param.grad is not None and id(param) in members]
        if ready:
            self._optimizer._step_only(ready)
        for param in ready:
            param.grad = None
