"""FusedAdam and FusedAdamW: arguments, param groups, step(). No arithmetic on moments, no memory
layout here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _device_dtype_check_for_fused
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_adam_kernels import table

from . import arguments, distributed
from .backends import choose as backends
from .engine import Engine, outside_inference_mode
from .numerics.scalars import GradTransform
from .precision import as_seed, parse
from .state import checkpoint, shapes
from .state import offload as offloading
from .state.flatten import FlatBuffers

# What copies and pickles keep besides torch's.
_PICKLED = (
    *("_backend", "_flatten", "_grad_attribute", "_max_grad_norm"),
    *("_precision", "_seed", "_skip_nonfinite"),
)


class FusedAdam(torch.optim.Adam):
    """Adam with the whole step fused into one kernel; a drop-in for `torch.optim.Adam`.

        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        p_t = p_{t-1} - lr * (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)

    Kingma & Ba 2015, algorithm 1; amsgrad: Reddi et al. 2018. docs/numerics.md has the exact order
    of operations, which is the same on CPU and GPU.

    Example:
        >>> optimizer = FusedAdam(model.parameters(), lr=1e-3)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    State per parameter is `step`, `exp_avg`, `exp_avg_sq` and, with amsgrad, `max_exp_avg_sq`, as
    in torch. Checkpoints load into `torch.optim.Adam` and back. `state` is an ordinary dict: the
    next step starts from what you write into it.

    Args:
        params: tensors, (name, tensor) pairs, or dicts that define param groups. float32, bfloat16,
            float16, float64 and their complex dtypes, on any devices, may be mixed in one group. Of
            a DTensor (FSDP2, tensor parallelism) each rank updates its shard.
        lr: learning rate. A number, or a tensor of one element. Default: 1e-3.
        betas: decay rates of the first and the second moment. Default: (0.9, 0.999).
        eps: added to the square root, so that the division is safe. Default: 1e-8.
        weight_decay: L2 penalty: `weight_decay * p` is added to the gradient. Default: 0.
        amsgrad: divide by the largest second moment so far, not by the current one. Default: False.
        foreach: accepted for compatibility. There is one implementation, so it chooses nothing.
        maximize: follow the gradient uphill. Default: False.
        capturable: allow the step to be captured in a CUDA graph, after one step outside the graph.
            A replay reads lr, betas, eps and weight_decay anew if they are tensors on the GPU, and
            otherwise uses their values at capture. Default: False.
        differentiable: let autograd differentiate through the step. It is then torch's own step and
            cannot be combined with this class's own arguments, except `backend` and `seed`.
            Default: False.
        fused: accepted for compatibility. With True, a GradScaler leaves unscaling and the overflow
            check to the step.
        decoupled_weight_decay: decay as AdamW does. Default: False.
        precision: name of a recipe that stores weights and moments in fewer bytes, such as
            "split32-bf16"; docs/precision.md lists them. A param group may have its own. Default:
            None, everything in the parameter's dtype.
        max_grad_norm: clip the global L2 norm of the gradients to this value inside the step, as
            `torch.nn.utils.clip_grad_norm_` would before it. Read the norm from `grad_norm`. inf
            measures the norm and clips nothing. Default: None, no clipping.
        skip_nonfinite: skip a step whose gradients contain NaN or Inf, without waiting for the GPU.
            Count such steps with `skipped_steps`. Default: False.
        flatten: move parameters and gradients into flat buffers. Faster for models with many small
            tensors. After `zero_grad()`, gradients are views of zeros instead of None. Default:
            False.
        grad_attribute: where to read gradients: "grad", "main_grad" (Megatron) or "decoupled_grad"
            (TransformerEngine, Megatron-FSDP). Default: "grad".
        backend: "triton", "reference" (plain PyTorch), "compiled" (the reference through
            torch.compile, on CPUs) or "auto" (triton on GPUs, reference on CPUs). All give the same
            bits. Default: "auto".
        seed: seed of the stochastic rounding that some recipes use. torch's random generators are
            not touched. Give each of several optimizers its own. Default: 0.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message says what is allowed. For
            torch's arguments the message is torch's.
        RuntimeError: the backend cannot run here; the message says why and what to do.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        precision: str | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        flatten: bool = False,
        grad_attribute: str = "grad",
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        backends.check_name(backend)
        flatten = arguments.as_flag("flatten", flatten)
        skip_nonfinite = arguments.as_flag("skip_nonfinite", skip_nonfinite)
        max_grad_norm = arguments.as_max_grad_norm(max_grad_norm)
        arguments.check_flatten(flatten, differentiable)
        arguments.check_guards(max_grad_norm, skip_nonfinite, differentiable)
        arguments.check_grad_attribute(grad_attribute, flatten, differentiable)
        parse(precision)
        self._backend, self._flatten = backend, flatten
        self._precision, self._seed, self._grad_attribute = precision, as_seed(seed), grad_attribute
        self._max_grad_norm, self._skip_nonfinite = max_grad_norm, skip_nonfinite
        # Named, not super(): in FusedAdamW the next class is torch's AdamW, which has another
        # signature.
        torch.optim.Adam.__init__(
            self,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        for device in {param.device for param in self._params()} - {torch.device("meta")}:
            backends.choose(backend, device)
        self._set_up()
        self._move_to_buffers()

    def __repr__(self) -> str:
        """torch's text, and below it this class's own arguments where they are set.

        `precision` and `seed` stand in the param groups, which may have their own.
        """
        own = {
            "max_grad_norm": (self._max_grad_norm, None),
            "skip_nonfinite": (self._skip_nonfinite, False),
            "flatten": (self._flatten, False),
            "grad_attribute": (self._grad_attribute, "grad"),
            "backend": (self._backend, "auto"),
        }
        lines = [f"{name}: {value}\n" for name, (value, default) in own.items() if value != default]
        return super().__repr__().removesuffix(")") + "".join(lines) + ")"

    def _set_up(self) -> None:
        """What is derived, and made anew after pickle and deepcopy."""
        self._engine = Engine(
            self._backend, self._max_grad_norm, self._skip_nonfinite, self._grad_attribute
        )

    def _move_to_buffers(self) -> None:
        # A copy does so at its first use: while it is unpickled, its storages have the unpickler
        # for an owner.
        if self._flatten and self._engine.flat is None and not shapes.are_all(self._params()):
            with outside_inference_mode():
                self._engine.flat = FlatBuffers(self._params())

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable([group["params"] for group in self.param_groups]))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and the overflow decision to `step`, without waiting
        for the device.

        As in torch, with `fused=True`; and with `max_grad_norm` or `skip_nonfinite`; and with a
        `grad_attribute` whose gradients it would not unscale, so that the step can say so. Derived,
        so that it survives pickle, deepcopy and loaded checkpoints. Not always True, because
        Lightning refuses its own clipping for optimizers that carry it.
        """
        if self._engine.needs_norm or self._grad_attribute != "grad":
            return True
        return bool(self.defaults["fused"]) or any(group["fused"] for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructor assigns True under `fused=True`, from which it is derived."""

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch; with `flatten=True` its parameters stay where they are.

        A group may have a `precision` of its own.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._precision is not None or "precision" in group:
            # In a copy: what we add must not go on to another optimizer that the user gives this
            # dict to.
            group = self.param_groups[-1] = {**group}
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Give the group its precision, if it has one, and raise if its parameters cannot be
        stepped so.
        """
        if self._precision is not None:
            group.setdefault("precision", self._precision)
        recipe = parse(group.get("precision"))
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        for name, param in zip(checkpoint.names_of(group), group["params"], strict=True):
            if is_traceable_wrapper_subclass(param) and not distributed.is_sharded(param):
                raise TypeError(
                    f"a parameter is a {type(param).__name__}, but must be a plain tensor or a DTensor"
                )
            distributed.check(param)
            recipe.check(param.dtype, f"parameter {name!r} of param group {number}")
        if recipe.weights is None:
            return
        group["seed"] = as_seed(group.get("seed", self._seed))
        for name, value, other, reason in (
            ("backend", self._backend, "compiled", "compiled steps know no recipes"),
            ("differentiable", group["differentiable"], True, "that step is torch's"),
        ):
            if value == other:
                raise ValueError(
                    f"precision={group['precision']!r} cannot be combined with {name}={value!r}, because {reason}"
                )

    def _check_before_step(self, group: dict[str, Any]) -> None:
        """The same for a group that somebody may have edited since it was added."""
        self._check_group(group)
        for param in group["params"] if group["fused"] else ():
            if param.is_meta and param.grad is not None:  # torch asks the parameters that it steps
                _device_dtype_check_for_fused(param)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Parameters without a gradient are skipped: neither they nor their state nor their step
        counter change.

        Raises RuntimeError, TypeError or ValueError for what cannot be stepped, before anything is
        changed.
        """
        if self.defaults["differentiable"]:
            function: Any = torch.optim.Adam.step
            # Without torch's hook wrapper, which this method already has.
            result: float | None = (
                function.__wrapped__ if getattr(function, "hooked", False) else function
            )(self, closure)
            return result
        self._accelerator_graph_capture_health_check()
        self._check_not_offloaded()
        if self._engine.in_backward is not None:
            self._refuse_scaler()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # After the closure: Lightning runs backward in one, or passes one that does nothing.
        if self._engine.in_backward is not None:
            self._engine.in_backward.end_round()
        with torch.no_grad():
            self._move_to_buffers()
            self._engine.step(self.param_groups, self.state, self._guard(), self._check_before_step)
        return loss

    def _refuse_scaler(self) -> None:
        """Of steps inside backward: a scaler comes too late."""
        guard = self._guard()
        if guard.found_inf is not None or guard.grad_scale is not None:
            raise RuntimeError(
                "a GradScaler cannot be combined with step_in_backward, because parameters were updated before it "
                "could unscale gradients or see an overflow; train in bfloat16 without one"
            )

    def _step_only(self, params: Sequence[Tensor]) -> None:
        """Step these parameters alone: each has a gradient."""
        self._check_not_offloaded()
        self._engine.step(
            self.param_groups, self.state, GradTransform(), self._check_before_step, params
        )

    def _check_not_offloaded(self) -> None:
        if self._engine.origins is not None:
            raise RuntimeError(
                "this optimizer's state is offloaded to the host: call reload() before a step"
            )

    def _guard(self) -> GradTransform:
        guard = GradTransform(getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        if self._grad_attribute != "grad" and (
            guard.found_inf is not None or guard.grad_scale is not None
        ):
            raise RuntimeError(
                f"a GradScaler cannot be combined with grad_attribute={self._grad_attribute!r}, because it looks for "
                "overflows in `grad` alone: unscale gradients yourself, and skip steps with skip_nonfinite=True"
            )
        return guard

    @property
    def grad_norm(self) -> Tensor | None:
        """L2 norm of the last step's gradients before clipping (unscaled under a GradScaler):
        float32, shape ().

        On the device of the first parameters; reading its value waits for it. None before the first
        step, and without `max_grad_norm` and `skip_nonfinite`.
        """
        return None if self._engine.stats is None else self._engine.stats[table.GRAD_NORM].float()

    @property
    def reduce_norm(self) -> Callable[[Tensor], Tensor] | None:
        """Adds up what no mesh shows: pipeline stages, or experts that are not DTensors.

        A function from the sum of squares of all gradients, over all ranks of the parameters'
        meshes, to the sum over
        all that are clipped together: float64, shape (1,), on the device of the first parameters,
        as it returns it. It is called in every step, on every rank, and must give the same value
        there:
        `lambda total: all_reduce(total, group=pipeline) or total`. None: nothing is added.

        Copies of the optimizer keep it. A pickle needs one that can be pickled: a function at the
        top level of a module, not a lambda. A `state_dict` never contains it.

        Raises TypeError if it cannot be called, ValueError without max_grad_norm and
        skip_nonfinite; so does a step, before anything is changed, if it returns another kind of
        tensor.
        """
        return self._engine.reduce_norm

    @reduce_norm.setter
    def reduce_norm(self, function: Callable[[Tensor], Tensor] | None) -> None:
        arguments.check_reduce_norm(function, self._engine.needs_norm)
        self._engine.reduce_norm = function

    @property
    def skipped_steps(self) -> Tensor | None:
        """How many steps were skipped for non-finite gradients or a GradScaler's overflow: int64,
        shape ().

        Where and when as `grad_norm`.
        """
        return (
            None if self._engine.stats is None else self._engine.stats[table.SKIPPED_STEPS].long()
        )

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients.

        With `flatten=True` views of the zeroed buffers take the place of None. Until something
        writes to them the parameter has no gradient for a step. `set_to_none=False` leaves
        gradients of zeros, as in torch.

        With a `grad_attribute`, its gradients too: "decoupled_grad" as `set_to_none` says,
        "main_grad" always to zero and in place, because it is a view of a buffer that backward adds
        to.
        """
        self._move_to_buffers()
        if self._engine.in_backward is not None:
            self._engine.in_backward.drop_failed_backward()
        if self._engine.flat is None:
            super().zero_grad(set_to_none)
        else:
            with torch.autograd.profiler.record_function(
                self._zero_grad_profile_name
            ):  # as torch's own
                self._zero_buffers(self._engine.flat, set_to_none)
        if self._grad_attribute != "grad":
            self._zero_elsewhere(set_to_none and self._grad_attribute != "main_grad")

    def _zero_buffers(self, flat: FlatBuffers, set_to_none: bool) -> None:
        flat.keep(self._params())
        flat.uncounted = flat.uncounted or backends.is_capturing()  # replays zero gradients
        for param in flat.zero_grad(set_to_none):
            grad = param.grad
            if set_to_none or grad is None:
                param.grad = None
            else:  # as torch does
                if grad.grad_fn is not None:
                    grad.detach_()
                else:
                    grad.requires_grad_(False)
                grad.zero_()

    def _zero_elsewhere(self, set_to_none: bool) -> None:
        params = self._params()
        found = [
            (param, grad)
            for param, grad in zip(params, self._engine.read_attribute(params), strict=True)
            if grad is not None
        ]
        if set_to_none:
            for param, _ in found:
                setattr(param, self._grad_attribute, None)
        elif found:
            torch._foreach_zero_([grad for _, grad in found])

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def offload(self) -> None:
        """Move moments, master weights, remainders, codes and scales to pinned host memory, until
        `reload()`.

        For phases that need the device's memory for something else: generation in RL, evaluation.
        One copy per segment (up to 1 GiB, or one parameter that is larger), not one per parameter;
        afterwards the memory is torch's allocator's to give (`torch.cuda.empty_cache()` gives it to
        other processes). Step counters (4 bytes per parameter) and parameters stay. Entries of
        `state` are host tensors then, so `state_dict()`, `export_fp32()`, `load_state_dict()` and
        `add_param_group()` work; a step raises. Copies of the optimizer (deepcopy, pickle) are
        not offloaded: their first step takes state to the device. State of parameters on the CPU
            stays where it is.

        Does nothing for state that is offloaded already. CUDA graphs that were captured before hold
        addresses of the
        old memory: capture them anew after `reload()` and a step, and never replay the old ones.

        Raises RuntimeError while a CUDA graph is being captured, and with `differentiable=True`.
        """
        self._check_may_move("offload")
        origins: offloading.Origins = self._engine.origins or {}
        with outside_inference_mode():
            offloading.to_host(self._engine.arena, self.state, origins)
        self._engine.origins = origins
        self._engine.drop_plans()  # plans hold on to the memory that they step
        self._engine.captured.clear()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def reload(self) -> None:
        """Move state back after `offload()`: steps have the bits that they would have had without.

        Copies do not wait for the device: they come before what is launched next on the current
        stream. Does nothing if state is not offloaded.

        Raises RuntimeError while a CUDA graph is being captured.
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
                f"{name}() cannot be combined with differentiable=True, whose state is part of autograd's graph"
            )

    def export_fp32(self) -> dict[str, Any]:
        """Weights and moments as float32, whatever the precision: a copy, on the parameters'
        devices.

        Returns `{"params": ..., "state": ...}`: weights by name (by position where there are no
        names; master weights where the recipe keeps some), and a `state_dict` in torch.optim's
        form, which torch.optim.Adam(W) over float32 parameters loads. Also before the first step.
        """
        return checkpoint.export_fp32(self.param_groups, super().state_dict())

    def state_dict(self) -> dict[str, Any]:
        """torch's form: loads into torch.optim.Adam(W) and back. Moments are not copied; steps are.

        Its tensors may be sent to other processes. On a GPU they are views of flat segments for
        that: to save one of them alone, take it from `optimizer.state`, or clone it.
        """
        return checkpoint.exported(super().state_dict(), self._engine.arena)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this class or of torch.optim.Adam(W), copied into our own memory.

        Raises ValueError, before anything is changed, if groups or shapes do not match or it is no
        optimizer's dict.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        with outside_inference_mode():
            groups = checkpoint.load(self.param_groups, self._engine.arena, self.state, state_dict)
            if self._engine.origins is not None:  # what was not there before was made on the device
                offloading.to_host(self._engine.arena, self.state, self._engine.origins)
        self.__setstate__({"state": self.state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def init_state(self) -> None:
        """Make the state of every parameter that requires gradients, with step 0, as the first step
        would.

        For tools that look at state before training: torch's `get_optimizer_state_dict` takes a
        dummy step where there is none, and leaves it counted. State that is there stays.

        Raises ValueError, before anything is changed, if what is there is not a parameter's whole
        state.
        """
        if self.defaults["differentiable"]:
            raise RuntimeError(
                "init_state() cannot be combined with differentiable=True, whose state torch makes"
            )
        self._check_not_offloaded()
        self._engine.init_state(self.param_groups, self.state, self._check_group)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in _PICKLED}
        return {
            **super().__getstate__(),
            **kept,
            "_reduce_norm": arguments.ReduceNorm(self._engine.reduce_norm),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_backend" in state:  # unpickled or deep-copied, not loaded from a state_dict
            self._set_up()
            self._engine.reduce_norm = self.__dict__.pop("_reduce_norm").function
            self._engine.arena.unpickled = True

    def __copy__(self) -> FusedAdam:
        """As torch's optimizers, a shallow copy shares groups and state; what steps them, too."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        twin._engine = self._engine
        return twin


class FusedAdamW(FusedAdam, torch.optim.AdamW):
    """AdamW with the whole step fused into one kernel; a drop-in for `torch.optim.AdamW`.

        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        p_t = p_{t-1} - lr * (weight_decay * p_{t-1}
                              + (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps))

    Loshchilov & Hutter 2019; amsgrad: Reddi et al. 2018. docs/numerics.md has the exact order of
    operations, which is the same on CPU and GPU.

    Example:
        >>> optimizer = FusedAdamW(model.parameters(), lr=3e-4, weight_decay=0.1, max_grad_norm=1.0)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    State per parameter is `step`, `exp_avg`, `exp_avg_sq` and, with amsgrad, `max_exp_avg_sq`, as
    in torch. Checkpoints load into `torch.optim.AdamW` and back. `state` is an ordinary dict: the
    next step starts from what you write into it.

    Args:
        params: tensors, (name, tensor) pairs, or dicts that define param groups. float32, bfloat16,
            float16, float64 and their complex dtypes, on any devices, may be mixed in one group. Of
            a DTensor (FSDP2, tensor parallelism) each rank updates its shard.
        lr: learning rate. A number, or a tensor of one element. Default: 1e-3.
        betas: decay rates of the first and the second moment. Default: (0.9, 0.999).
        eps: added to the square root, so that the division is safe. Default: 1e-8.
        weight_decay: decoupled decay: `lr * weight_decay * p` is subtracted from the parameter.
            Default: 1e-2.
        amsgrad: divide by the largest second moment so far, not by the current one. Default: False.
        maximize: follow the gradient uphill. Default: False.
        foreach: accepted for compatibility. There is one implementation, so it chooses nothing.
        capturable: allow the step to be captured in a CUDA graph, after one step outside the graph.
            A replay reads lr, betas, eps and weight_decay anew if they are tensors on the GPU, and
            otherwise uses their values at capture. Default: False.
        differentiable: let autograd differentiate through the step. It is then torch's own step and
            cannot be combined with this class's own arguments, except `backend` and `seed`.
            Default: False.
        fused: accepted for compatibility. With True, a GradScaler leaves unscaling and the overflow
            check to the step.
        precision: name of a recipe that stores weights and moments in fewer bytes, such as
            "split32-bf16"; docs/precision.md lists them. A param group may have its own. Default:
            None, everything in the parameter's dtype.
        max_grad_norm: clip the global L2 norm of the gradients to this value inside the step, as
            `torch.nn.utils.clip_grad_norm_` would before it. Read the norm from `grad_norm`. inf
            measures the norm and clips nothing. Default: None, no clipping.
        skip_nonfinite: skip a step whose gradients contain NaN or Inf, without waiting for the GPU.
            Count such steps with `skipped_steps`. Default: False.
        flatten: move parameters and gradients into flat buffers. Faster for models with many small
            tensors. After `zero_grad()`, gradients are views of zeros instead of None. Default:
            False.
        grad_attribute: where to read gradients: "grad", "main_grad" (Megatron) or "decoupled_grad"
            (TransformerEngine, Megatron-FSDP). Default: "grad".
        backend: "triton", "reference" (plain PyTorch), "compiled" (the reference through
            torch.compile, on CPUs) or "auto" (triton on GPUs, reference on CPUs). All give the same
            bits. Default: "auto".
        seed: seed of the stochastic rounding that some recipes use. torch's random generators are
            not touched. Give each of several optimizers its own. Default: 0.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message says what is allowed. For
            torch's arguments the message is torch's.
        RuntimeError: the backend cannot run here; the message says why and what to do.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        precision: str | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        flatten: bool = False,
        grad_attribute: str = "grad",
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            precision=precision,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            flatten=flatten,
            grad_attribute=grad_attribute,
            backend=backend,
            seed=seed,
        )
