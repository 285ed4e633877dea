"""Methods of FusedAdam that save, load, export, offload and copy the state of a whole optimizer.

They are in a base class of their own. What a state_dict looks like, and how one precision becomes
another, is in state/.
"""

from __future__ import annotations

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

    def _make_engine(self) -> None:
        """Make what is derived from the arguments; also after pickle and deepcopy."""
        self._engine = Engine(
            self._backend,
            self._max_grad_norm,
            self._skip_nonfinite,
            self._skip_grad_norm,
            self._grad_attribute,
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
            `{"params": ..., "state": ...}`, with tensors on the parameters' devices. "params" has
            the weights by name, or by position where parameters have no names of their own;
            where a recipe stores more bits than the parameter has, these are in. "state" is a
            `state_dict` that torch.optim.Adam(W) over float32 parameters loads.

        Example:
            >>> weights = optimizer.export_fp32()["params"]
            >>> torch.save(weights, "weights.pt")
        """
        return checkpoint.export_fp32(self.param_groups, super().state_dict())

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
