"""Methods of FusedAdam that save, load, export, offload and copy the state of a whole optimizer.

They are in a base class of their own. What a state_dict looks like, and how one precision becomes
another, is in state/.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import arguments, ema
from .backends import choose as backends
from .engine import Engine, outside_inference_mode, params_of
from .state import checkpoint, shapes
from .state import offload as offloading
from .torch_private import disable_dynamo

Self = TypeVar("Self", bound="OptimizerState")


class OptimizerState(torch.optim.Adam):
    """The methods of FusedAdam and FusedAdamW that concern their whole state."""

    # The arguments besides torch's. Copies and pickles keep what is declared here, and no more:
    # everything else is made from it.
    _backend: str
    _cautious: bool = False  # pickles of 0.1.0 lack it
    _ema_decay: float | Tensor | None = None  # pickles of 0.1.0 lack it
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

    def _check_group(self, group: dict[str, Any]) -> None:
        """Give the group the optimizer's own options, and raise if it cannot be stepped."""
        # By identity: `list.index` would compare tensors, which have no single truth value.
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        names = checkpoint.names_of(group)
        arguments.complete_group(
            group,
            number,
            names,
            self._precision,
            self._seed,
            self._cautious,
            self._ema_decay,
            self._backend,
        )

    def init_state(self) -> None:
        """Make the state of every parameter that requires gradients, with step count 0.

        Use it with tools that read state before the first step. torch's `get_optimizer_state_dict`
        otherwise takes a dummy step, which stays counted. Existing state is kept.

        Raises:
            ValueError: existing state is not the whole state of its parameter. Nothing has changed
                then.
            RuntimeError: with `differentiable=True`, while state is offloaded, or within
                `swap_ema()`.
        """
        if self.defaults["differentiable"]:
            raise RuntimeError(
                "init_state() cannot be combined with differentiable=True, because torch makes "
                "that state"
            )
        self._check_state_is_here("init_state()")
        self._engine.init_state(self.param_groups, self.state, self._check_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state in torch's form.

        torch.optim.Adam and AdamW load it, unless a `precision` stores something else than moments;
        see `export_fp32` for those. Moments are not copied, step counters are.

        The tensors may be sent to other processes. For that, those on a GPU are views of flat
        segments. To save a single one, take it from `optimizer.state` or clone it, or the file will
        have the whole segment.

        Raises:
            RuntimeError: within `swap_ema()`: the weights of that moment do not belong to it.
        """
        self._check_not_swapped("state_dict()")
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
            RuntimeError: within `swap_ema()`.
        """
        self._check_not_swapped("load_state_dict()")
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
            float32 parameters loads; averages of `ema_decay` are in it, which torch's keep and
            never change.

        Raises:
            RuntimeError: within `swap_ema()`.

        Example:
            >>> weights = optimizer.export_fp32()["params"]
            >>> torch.save(weights, "weights.pt")
        """
        self._check_not_swapped("export_fp32()")
        return checkpoint.export_fp32(self.param_groups, super().state_dict(), self._engine.arena)

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Have the averages of `ema_decay` in the model, for evaluation or to save it.

        Averages are rounded to the parameter's dtype. When the block ends, also by an exception,
        every parameter has its exact bits back, whatever was written to it meanwhile. Parameters
        without an average stay as they are: those of groups without `ema_decay`, and those that
        have had no step yet.

        The exact parameters are copied meanwhile: 2 bytes per averaged bfloat16 parameter, 4 in
        float32. Averages, moments, master weights and remainders stay where they are, also on the
        host after `offload()`. `ema_state_dict()` and `offload()` work within the block. What would
        mix averages with the state of other weights raises there: a step, saving, loading,
        exporting and copying the optimizer. Do not replay a captured step there.

        Raises:
            RuntimeError: no param group has an `ema_decay`; within another `swap_ema()`; during the
                capture of a CUDA graph; or parameters are fake.

        Example:
            >>> with optimizer.swap_ema():
            ...     validate(model)
            ...     torch.save(model.state_dict(), "averaged.pt")
        """
        self._check_averages("swap_ema()")
        self._check_not_swapped("another swap_ema()")
        self._engine.swapped = True
        try:
            with ema.swapped(self.param_groups, self.state):
                yield
        finally:
            self._engine.swapped = False

    @disable_dynamo
    def ema_state_dict(self) -> dict[str | int, Tensor]:
        """Return copies of the averages of `ema_decay`, by name, unrounded.

        Returns:
            Averages by name where the optimizer was made with named parameters, else by position,
            as in a `state_dict`. A parameter whose name another one has, too, has its position. One
            without an average is absent. float32, or float64 of float64 parameters, in the
            parameter's shape and on its device, or on the host with `state_device="cpu"`. Of a
            DTensor it is a DTensor, as in the model's `state_dict`, so the model can load it;
            `full_tensor()` gathers one.

        Raises:
            RuntimeError: no param group has an `ema_decay`; during the capture of a CUDA graph; or
                parameters are fake.

        Example:
            >>> torch.save(optimizer.ema_state_dict(), "averages.pt")
        """
        self._check_averages("ema_state_dict()")
        with outside_inference_mode():
            return ema.by_name(self.param_groups, self.state, self._engine.arena)

    def _check_averages(self, name: str) -> None:
        """Raise RuntimeError where no averages can be read."""
        ema.check_averages(self.param_groups, name)
        if backends.is_capturing():
            raise RuntimeError(
                f"{name} cannot be captured in a CUDA graph: call it before or after the capture"
            )
        shapes.refuse(name, params_of(self.param_groups))

    def _check_not_swapped(self, name: str) -> None:
        if self._engine.swapped:
            raise RuntimeError(
                f"{name} cannot be used within swap_ema(), because parameters hold averages there: "
                "leave its `with` block first"
            )

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

    def _check_state_is_here(self, name: str) -> None:
        """Raise RuntimeError while state or parameters are elsewhere.

        Args:
            name: what needs them.
        """
        self._check_not_swapped(name)
        if self._engine.origins is not None:
            raise RuntimeError(
                "this optimizer's state is offloaded to the host: call reload() before a step"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_swapped("a copy or pickle of the optimizer")
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
