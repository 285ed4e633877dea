"""FusedAdam: arguments, param groups, step and zero_grad.

Methods that save, load and move state are in optimizer_state.py. How a step runs is in engine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fused_adam_kernels import table

from . import arguments
from .arguments import STREAM_BYTES
from .backends import choose as backends
from .engine import outside_inference_mode, params_of
from .numerics.scalars import GradTransform
from .optimizer_state import OptimizerState
from .precision import as_seed, parse
from .state import checkpoint, shapes
from .state.flatten import FlatBuffers
from .torch_private import check_dtype_for_fused, disable_dynamo, foreach_zero_


class FusedAdam(OptimizerState):
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
            A replay reads lr, betas, eps, weight_decay and ema_decay anew if they are tensors on
            the GPU, and otherwise uses their values at capture. Default: False.
        differentiable: let autograd differentiate through the step. It is then torch's own step and
            cannot be combined with this class's own arguments, except `backend` and `seed`.
            Default: False.
        fused: accepted for compatibility. With True, a GradScaler leaves unscaling and the overflow
            check to the step.
        decoupled_weight_decay: decay as AdamW does. Default: False.
        precision: name of a recipe that stores weights and moments in fewer bytes, such as
            "split32-bf16"; docs/precision.md lists them. A param group may have its own. Default:
            None, everything in the parameter's dtype.
        cautious: decay a parameter only where the update moves it towards zero; docs/training.md
            has an example. Needs decoupled decay. A param group may have its own. Default: False.
        ema_decay: keep averages of the weights, `ema = ema + (1 - ema_decay) * (p - ema)` with the
            new weight before it is rounded, in `state` as float32. A number of at least 0 and below
            1, or a float tensor of shape () on the parameters' device, which may change at any
            time. A param group may have its own. Use them by `swap_ema()` and `ema_state_dict()`.
            Default: None, no averages.
        max_grad_norm: clip the global L2 norm of the gradients to this value inside the step, as
            `torch.nn.utils.clip_grad_norm_` would before it. Read the norm from `grad_norm`. inf
            measures the norm and clips nothing. Default: None, no clipping.
        skip_nonfinite: skip a step whose gradients contain NaN or Inf, without waiting for the GPU.
            Count such steps with `skipped_steps`. Default: False.
        skip_grad_norm: skip a step whose global gradient norm, unscaled and before clipping, is
            above this value or not finite, without waiting for the GPU. A number, or a float tensor
            of shape () on the parameters' device, which may change at any time: docs/training.md
            has rules for it. Count such steps with `skipped_steps`. Default: None, no skipping.
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
        state_device: "cpu" keeps moments, master weights and remainders in pinned host memory for
            good. A step streams them through the device: docs/training.md says how long it takes.
            Default: None, the parameters' device.
        stream_bytes: size of each of the three buffers on the device that state is streamed
            through, in bytes. Default: 268435456, 256 MiB.

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
        cautious: bool = False,
        ema_decay: float | Tensor | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_grad_norm: float | Tensor | None = None,
        flatten: bool = False,
        grad_attribute: str = "grad",
        backend: str = "auto",
        seed: int = 0,
        state_device: str | None = None,
        stream_bytes: int = STREAM_BYTES,
    ) -> None:
        backends.check_name(backend)
        flatten = arguments.as_flag("flatten", flatten)
        skip_nonfinite = arguments.as_flag("skip_nonfinite", skip_nonfinite)
        cautious = arguments.as_flag("cautious", cautious)
        ema_decay = arguments.as_ema_decay(ema_decay)
        max_grad_norm = arguments.as_max_grad_norm(max_grad_norm)
        skip_grad_norm = arguments.as_skip_grad_norm(skip_grad_norm)
        state_device = arguments.as_state_device(state_device)
        stream_bytes = arguments.as_stream_bytes(stream_bytes)
        arguments.check_combinations(
            flatten,
            max_grad_norm,
            skip_nonfinite,
            skip_grad_norm,
            grad_attribute,
            differentiable,
            cautious,
            ema_decay,
            state_device,
        )
        parse(precision)
        self._backend, self._flatten, self._cautious = backend, flatten, cautious
        self._precision, self._seed, self._grad_attribute = precision, as_seed(seed), grad_attribute
        self._max_grad_norm, self._skip_nonfinite = max_grad_norm, skip_nonfinite
        self._skip_grad_norm, self._ema_decay = skip_grad_norm, ema_decay
        self._state_device, self._stream_bytes = state_device, stream_bytes
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
        self._make_engine()
        # Refuse a backend that cannot run now, not at the first step. Parameters on meta get their
        # device later: the first step asks for those.
        for device in {param.device for param in self._params()} - {torch.device("meta")}:
            name = backends.choose(backend, device)
            if self._engine.arena.is_streamed(device):
                backends.check_streams(device, name)
        self._move_to_buffers()

    def __repr__(self) -> str:
        """torch's text, and below it this class's own arguments where they are set.

        Arguments that a param group may have of its own stand in the param groups.
        """
        own = {
            "max_grad_norm": (self._max_grad_norm, None),
            "skip_nonfinite": (self._skip_nonfinite, False),
            "skip_grad_norm": (self._skip_grad_norm, None),
            "flatten": (self._flatten, False),
            "grad_attribute": (self._grad_attribute, "grad"),
            "backend": (self._backend, "auto"),
            "state_device": (self._state_device, None),
            "stream_bytes": (self._stream_bytes, STREAM_BYTES),
        }
        lines = [f"{name}: {value}\n" for name, (value, default) in own.items() if value != default]
        return super().__repr__().removesuffix(")") + "".join(lines) + ")"

    def _move_to_buffers(self) -> None:
        """Move parameters into flat buffers, if that is asked for and not done yet.

        A copy does so at its first use: while it is unpickled, the unpickler still holds its
        storages, so they could not be moved.
        """
        if self._flatten and self._engine.flat is None and not shapes.are_all(self._params()):
            with outside_inference_mode():
                self._engine.flat = FlatBuffers(self._params())

    def _params(self) -> list[Tensor]:
        return params_of(self.param_groups)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and the overflow check to `step`, without a sync.

        As in torch with `fused=True`; also where the step needs the norm of all gradients. With a
        `grad_attribute` GradScaler would not unscale those gradients, so `step` has to say so.

        Derived, so that pickles, deep copies and loaded checkpoints have it right. Not always True,
        because Lightning refuses to clip for optimizers that say True.
        """
        if self._engine.needs_norm or self._grad_attribute != "grad":
            return True
        return bool(self.defaults["fused"]) or any(group["fused"] for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore torch's constructor, which assigns True with `fused=True`."""

    @disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch. `precision`, `cautious`, `ema_decay` may be its own.

        With `flatten=True`, parameters that are added later are not moved into flat buffers.

        Raises:
            TypeError, ValueError: a parameter cannot be stepped, or its dtype does not fit the
                precision. The group is not added then.
        """
        # torch first: it turns names and iterators into lists, and sets what the group leaves out.
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        ours = (self._precision, self._cautious or None, self._ema_decay)
        if any(option is not None for option in ours) or group.keys() & checkpoint.OWN_KEYS:
            # Users may give the same dict to another optimizer, which must not get our entries.
            group = self.param_groups[-1] = {**group}
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_before_step(self, group: dict[str, Any]) -> None:
        """Check a group that its user may have edited since it was added."""
        self._check_group(group)
        for param in group["params"] if group["fused"] else ():
            if param.is_meta and param.grad is not None:  # torch asks the parameters that it steps
                check_dtype_for_fused(param)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step.

        Parameters without a gradient are skipped: their weights, state and step counter stay.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.

        Raises:
            RuntimeError, TypeError, ValueError: something cannot be stepped. Nothing has changed
                then.
        """
        if self.defaults["differentiable"]:
            function: Any = torch.optim.Adam.step
            if getattr(function, "hooked", False):
                function = function.__wrapped__  # this method has torch's hooks already
            result: float | None = function(self, closure)
            return result
        # As torch's own steps begin: raises in a capture unless the groups are capturable.
        self._accelerator_graph_capture_health_check()
        self._check_state_is_here("step()")
        if self._engine.in_backward is not None:
            self._grad_transform()  # refuses a scaler before the closure's backward steps
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # After the closure: Lightning runs backward in one, or passes one that does nothing.
        if self._engine.in_backward is not None:
            self._engine.in_backward.end_round()
        with torch.no_grad():
            self._move_to_buffers()
            transform = self._grad_transform()
            self._engine.step(self.param_groups, self._state, transform, self._check_before_step)
        return loss

    def _step_only(self, params: Sequence[Tensor]) -> None:
        """Step only these parameters, each of which has a gradient."""
        self._check_state_is_here("step()")
        self._engine.step(
            self.param_groups, self._state, GradTransform(), self._check_before_step, params
        )

    def _grad_transform(self) -> GradTransform:
        """Return the scale and overflow flag that a GradScaler set; raise where none can work."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        scaled = found_inf is not None or grad_scale is not None
        if scaled and self._engine.in_backward is not None:
            raise RuntimeError(
                "a GradScaler cannot be combined with step_in_backward, because parameters were "
                "updated before it could unscale gradients or see an overflow; train in bfloat16 "
                "without one"
            )
        if scaled and self._grad_attribute != "grad":
            raise RuntimeError(
                f"a GradScaler cannot be combined with grad_attribute={self._grad_attribute!r}, "
                "because it looks for overflows in `grad` alone: unscale gradients yourself, and "
                "skip steps with skip_nonfinite=True"
            )
        return GradTransform(found_inf, grad_scale)

    @property
    def grad_norm(self) -> Tensor | None:
        """The L2 norm of the last step's gradients, before clipping and after unscaling.

        float32, shape (), on the device of the first parameter. Reading its value waits for that
        device. None before the first step, and without `max_grad_norm`, `skip_nonfinite` and
        `skip_grad_norm`.

        Example:
            >>> optimizer = FusedAdamW(model.parameters(), max_grad_norm=1.0)
            >>> optimizer.step()
            >>> optimizer.grad_norm.item()
        """
        return None if self._engine.stats is None else self._engine.stats[table.GRAD_NORM].float()

    @disable_dynamo
    def grad_norms(self) -> dict[str | int, Tensor]:
        """Return the L2 norm of each parameter's gradient in the last step, by name.

        As `grad_norm`: before clipping and after unscaling, and infinite or NaN if the gradient is.
        The squares of all norms add up to that of `grad_norm`, but for what `reduce_norm` adds. Of
        a DTensor it is the norm over all shards, so all ranks have to call this.

        Nothing is computed before the call. It adds up a few sums that the step has left, and does
        not wait for the device.

        Returns:
            Norms by name where the optimizer was made with named parameters, else by position, as
            in a `state_dict`. A parameter whose name another one has, too, has its position. A
            parameter that had no gradient is absent; before the first step all are. float32, shape
            (), on the parameter's device.

        Raises:
            RuntimeError: none of `max_grad_norm`, `skip_nonfinite` and `skip_grad_norm` is set;
                during the capture of a CUDA graph (call it after a replay); or parameters are fake.

        Example:
            >>> optimizer = FusedAdamW(model.named_parameters(), max_grad_norm=1.0)
            >>> optimizer.step()
            >>> norms = optimizer.grad_norms()
            >>> norms["0.weight"].item()
        """
        if not self._engine.needs_norm:
            raise RuntimeError(
                "grad_norms() needs max_grad_norm, skip_nonfinite or skip_grad_norm, and none is "
                "set: with max_grad_norm=math.inf norms are measured, and nothing is clipped"
            )
        if backends.is_capturing():
            raise RuntimeError(
                "grad_norms() cannot be captured in a CUDA graph: call it after a replay, and it "
                "returns the norms of that step"
            )
        shapes.refuse("grad_norms()", self._params())
        keys = checkpoint.keys_of(self.param_groups)
        norms = self._engine.grad_norms()
        # A parameter may have left the optimizer since the step.
        return {keys[param]: norm for param, norm in norms.items() if param in keys}

    @property
    def skipped_steps(self) -> Tensor | None:
        """The number of steps skipped: non-finite gradients, spikes, or a GradScaler's overflow.

        int64, shape (), on the device of the first parameter. None where `grad_norm` is None.
        """
        stats = self._engine.stats
        return None if stats is None else stats[table.SKIPPED_STEPS].long()

    @property
    def skip_grad_norm(self) -> float | Tensor | None:
        """The argument of that name.

        A tensor is the one that was given, to be changed in place. A deep or unpickled copy of the
        optimizer has a tensor of its own.
        """
        return self._skip_grad_norm

    @property
    def reduce_norm(self) -> Callable[[Tensor], Tensor] | None:
        """Combine gradient norms across ranks that share no device mesh, such as pipeline stages.

        Set it to a function that takes this rank's sum of squared gradients and returns the sum
        over all ranks that clip together. Sums over device meshes (FSDP2, tensor parallelism) are
        already included. None, the default, adds nothing.

        The function is called once per step, on every rank. Input and output are float64 tensors of
        shape (1,) on the device of the first parameter, and every rank must return the same value.
        Copies and pickles of the optimizer keep it, so pickling needs a function at the top level
        of a module. A `state_dict` never contains it.

        Raises:
            TypeError: it is set to something that cannot be called. In a step: it returned no
                tensor.
            ValueError: none of `max_grad_norm`, `skip_nonfinite` and `skip_grad_norm` is set. In a
                step: it returned another kind of tensor. Nothing has changed then.

        Example:
            >>> def over_pipeline(square_sum):
            ...     torch.distributed.all_reduce(square_sum, group=pipeline_group)
            ...     return square_sum
            >>> optimizer.reduce_norm = over_pipeline
        """
        return self._engine.reduce_norm

    @reduce_norm.setter
    def reduce_norm(self, function: Callable[[Tensor], Tensor] | None) -> None:
        arguments.check_reduce_norm(function, self._engine.needs_norm)
        self._engine.reduce_norm = function

    @disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients.

        With `flatten=True`, `grad` is then a zeroed view of a flat buffer instead of None. A step
        skips the parameter until something writes to that view.

        Gradients in a `grad_attribute` are reset, too. "main_grad" is always zeroed in place, never
        None, because it is a view of a buffer that backward adds to.

        Args:
            set_to_none: as in torch. False leaves gradients of zeros, which count in a step.
        """
        self._move_to_buffers()
        if self._engine.in_backward is not None:
            self._engine.in_backward.drop_failed_backward()
        if self._engine.flat is None:
            super().zero_grad(set_to_none)
        else:
            # The name that profiles of torch's own zero_grad have.
            with torch.autograd.profiler.record_function(self._zero_grad_profile_name):
                self._zero_buffers(self._engine.flat, set_to_none)
        if self._grad_attribute != "grad":
            self._zero_attribute(set_to_none and self._grad_attribute != "main_grad")

    def _zero_buffers(self, flat: FlatBuffers, set_to_none: bool) -> None:
        flat.keep(self._params())
        # A captured zero_grad zeroes gradients at every replay, which no version counts.
        flat.uncounted = flat.uncounted or backends.is_capturing()
        for param in flat.zero_grad(set_to_none):
            grad = param.grad
            if set_to_none or grad is None:
                param.grad = None
            else:  # as torch does: what backward with create_graph=True made has a history to cut
                if grad.grad_fn is not None:
                    grad.detach_()
                else:
                    grad.requires_grad_(False)
                grad.zero_()

    def _zero_attribute(self, set_to_none: bool) -> None:
        params = self._params()
        grads = self._engine.read_attribute(params)
        present = [(p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None]
        if set_to_none:
            for param, _ in present:
                setattr(param, self._grad_attribute, None)
        elif present:
            foreach_zero_([grad for _, grad in present])
