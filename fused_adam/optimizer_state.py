"""Methods of FusedAdam that save, load, export, offload and copy the state of a whole optimizer.

They are in a base class of their own. What a state_dict looks like, and how one precision becomes
another, is in state/.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import arguments
from .backends import choose as backends
from .engine import Engine, outside_inference_mode
from .state import checkpoint
from .state import offload as offloading
from .torch_private import disable_dynamo

Self = TypeVar("Self", bound="OptimizerState")


class OptimizerState(torch.optim.Adam):
    """The methods of FusedAdam and FusedAdamW that concern their whole state."""

    # The arguments besides torch's. Copies and pickles keep what is declared here, and no more:
    # everything else is made from it.
    _backend: str
    _cautious: bool = False  # pickles of 0.1.0 lack it
    _flatten: bool
    _grad_attribute: str
    _max_grad_norm: float | None
    _precision: str | None
    _seed: int
    _skip_grad_norm: float | Tensor | None = None  # pickles of 0.1.0 lack it
    _skip_nonfinite: bool
    _state_device: str | None = None  # pickles of 0.1.0 lack it
    _stream_bytes: int = arguments.STREAM_BYTES  # pickles of 0.1.0 lack it

    def _make_engine(self) -> None:
        """Make what is derived from the arguments; also after pickle and deepcopy."""
        self._engine = Engine(
            self._backend,
            self._max_grad_norm,
            self._skip_nonfinite,
            self._skip_grad_norm,
            self._grad_attribute,
            self._state_device,
            self._stream_bytes,
        )

    # A property, so that nobody reads what a step is still copying to the host.
    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by parameter, as in torch: a dict of dicts.

        With `state_device="cpu"`, reading this waits for what the last step copies to the host.
        Tensors that were taken from here before that step are read after another look here.
        """
        engine = self.__dict__.get("_engine")  # torch's constructor comes before it
        if engine is not None:
            engine.finish_copies()
        return self._state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = value

    @property
    def _state(self) -> defaultdict[Tensor, Any]:
        """The same without a wait: for a step, which reads no values."""
        # Lightning's wrapper is a subclass with an empty `__dict__`, and gets what is no attribute
        # of its own from the optimizer within.
        if "state" not in self.__dict__:
            raise AttributeError("state")
        state: defaultdict[Tensor, Any] = self.__dict__["state"]
        return state

    def init_state(self) -> None:
        """Make the state of every parameter that requires gradients, with step count 0.

        Use it with tools that read state before the first step. torch's `get_optimizer_state_dict`
        otherwise takes a dummy step, which stays counted. Existing state is kept.

        Raises:
            ValueError: existing state is not the whole state of its parameter. Nothing has changed
                then.
            RuntimeError: with `differentiable=True`, or while state is offloaded.
        """
        if self.defaults["differentiable"]:
            raise RuntimeError(
                "init_state() cannot be combined with differentiable=True, because torch makes "
                "that state"
            )
        self._check_not_offloaded()
        self._engine.init_state(self.param_groups, self.state, self._check_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Give the group the optimizer's own options, and raise if it cannot be stepped."""
        # By identity: `list.index` would compare tensors, which have no single truth value.
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        names = checkpoint.names_of(group)
        arguments.complete_group(
            group, number, names, self._precision, self._seed, self._cautious, self._backend
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state in torch's form.

        torch.optim.Adam and AdamW load it, unless a `precision` stores something else than moments;
        see `export_fp32` for those. Moments are not copied, step counters are.

        The tensors may be sent to other processes. For that, those on a GPU are views of flat
        segments. To save a single one, take it from `optimizer.state` or clone it, or the file will
        have the whole segment.
        """
        return checkpoint.exported(super().state_dict(), self._engine.arena)

    @disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this class or of torch.optim.Adam(W), in any precision.

        Values are copied, and converted to this optimizer's precision. `state_dict` is never
        changed, and no tensor of it is kept.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            ValueError: it is no optimizer's state_dict, or its groups or shapes do not match this
                optimizer. Nothing has changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        with outside_inference_mode():
            groups = checkpoint.load(
                self.param_groups,
                self._engine.arena,
                self.state,
                state_dict,
                always_decoupled=isinstance(self, torch.optim.AdamW),
            )
            if self._engine.origins is not None:  # loading made new state on the device
                offloading.to_host(self._engine.arena, self.state, self._engine.origins)
        self.__setstate__({"state": self.state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def export_fp32(self) -> dict[str, Any]:
        """Return copies of weights and moments as float32, whatever the precision.

        Also works before the first step.

        Returns:
            `{"params": ..., "state": ...}`, with tensors on the parameters' devices, or on the host
            with `state_device="cpu"`. "params" has the weights by name, or by position where
            parameters have no names of their own; where a recipe stores more bits than the
            parameter has, these are in. "state" is a `state_dict` that torch.optim.Adam(W) over
            float32 parameters loads.

        Example:
            >>> weights = optimizer.export_fp32()["params"]
            >>> torch.save(weights, "weights.pt")
        """
        return checkpoint.export_fp32(self.param_groups, super().state_dict(), self._engine.arena)

    @disable_dynamo
    def offload(self) -> None:
        """Move moments and all other state to pinned host memory, until `reload()`.

        For phases that need the device's memory for something else, such as generation in RL, or
        evaluation. A step raises until `reload()`; saving, loading and `add_param_group()` work.
        Calling it again does nothing.

        Freed memory goes to torch's allocator; `torch.cuda.empty_cache()` returns it to the device.
        There is one copy per segment (up to 1 GiB), not one per parameter. Parameters and step
        counters (4 bytes per parameter) stay on the device, and state of CPU parameters where it
        is. A deepcopy or unpickled copy is not offloaded: its first step moves state to the device.
        With `state_device="cpu"` state is on the host anyway: what is freed are the buffers that it
        is streamed through, and a step makes them anew, without `reload()`.

        CUDA graphs that were captured before have addresses of the old memory. Never replay them
        again: capture new ones after `reload()` and a step.

        Raises:
            RuntimeError: during the capture of a CUDA graph, or with `differentiable=True`.

        Example:
            >>> optimizer.offload()
            >>> rollouts = generate(model)
            >>> optimizer.reload()
        """
        self._check_may_move("offload")
        if self._engine.arena.on_host:
            self._engine.drop_plans()  # frees the rings
            return
        origins: offloading.Origins = self._engine.origins or {}
        with outside_inference_mode():
            offloading.to_host(self._engine.arena, self.state, origins)
        self._engine.origins = origins
        # Plans and captured graphs would keep the device's memory alive.
        self._engine.drop_plans()
        self._engine.captured.clear()

    @disable_dynamo
    def reload(self) -> None:
        """Move state back to its device after `offload()`; results are as if it had never left.

        The copies are ordered before whatever is launched next on the current stream, and are not
        waited for. Does nothing if state is not offloaded.

        Raises:
            RuntimeError: during the capture of a CUDA graph, or with `differentiable=True`.
        """
        self._check_may_move("reload")
        if self._engine.origins is not None:
            with outside_inference_mode():
                offloading.to_devices(self._engine.arena, self.state, self._engine.origins)
            self._engine.origins = None

    def _check_may_move(self, name: str) -> None:
        if backends.is_capturing():
            raise RuntimeError(
                f"{name}() cannot be captured in a CUDA graph: call it before or after the capture"
            )
        if self.defaults["differentiable"]:
            raise RuntimeError(
                f"{name}() cannot be combined with differentiable=True, because that state is part "
                "of autograd's graph"
            )

    def _check_not_offloaded(self) -> None:
        if self._engine.origins is not None:
            raise RuntimeError(
                "this optimizer's state is offloaded to the host: call reload() before a step"
            )

    def __getstate__(self) -> dict[str, Any]:
        arguments_kept = {name: getattr(self, name) for name in OptimizerState.__annotations__}
        reduce_norm = arguments.ReduceNorm(self._engine.reduce_norm)
        return {**super().__getstate__(), **arguments_kept, "_reduce_norm": reduce_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_backend" in state:  # unpickled or deep-copied, not loaded from a state_dict
            self._make_engine()
            self._engine.reduce_norm = self.__dict__.pop("_reduce_norm").function
            self._engine.arena.unpickled = True

    def __copy__(self: Self) -> Self:
        """Return a shallow copy, which shares groups and state as torch's do, and the engine."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        twin._engine = self._engine
        return twin
