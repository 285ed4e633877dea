"""FusedAdam and FusedAdamW: arguments, param groups, step and zero_grad.

Methods that save, load and move state are in optimizer_state.py. How a step runs is in engine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _device_dtype_check_for_fused

from fused_adam_kernels import table

from . import arguments, shapes
from .backends import choose as backends
from .engine import outside_inference_mode, params_of
from .numerics.scalars import GradTransform
from .optimizer_state import OptimizerState
from .precision import as_seed, parse
from .state import checkpoint
from .state.flatten import FlatBuffers


class FusedAdam(OptimizerState):
    """Adam whose whole step is one fused pass: a drop-in for `torch.optim.Adam`.

    All arithmetic is float32 (float64 for float64 parameters), each operation rounded once, in one
    documented order; the Triton kernel and the CPU reference give the same bits. Kingma & Ba 2015,
    algorithm 1; AMSGrad: Reddi et al. 2018; decoupled decay: Loshchilov & Hutter 2019.

    Args:
        params: parameters, named parameters or param groups, as for `torch.optim.Adam`. Dtypes
            float32, bfloat16, float16, float64 and complex ones of these; devices and dtypes may be
            mixed in one group. DTensors (FSDP2, tensor parallelism) are stepped shard by shard,
            with the bits of one process.
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in
        `torch.optim.Adam`.
        foreach, fused: accepted and checked as in torch; they choose no code path. With
            `fused=True` a GradScaler hands its scale and overflow flag over to the step, as in
            torch.
        capturable: the step may be captured in a CUDA graph, after one that ran outside it (GPU,
            triton). Values of lr, betas, eps and weight_decay that are tensors on the device are
            read at every replay; others, among them tensors on the CPU, are those of the capture.
        differentiable: the step runs through torch's own differentiable implementation.
        precision: how weights and moments are stored, as "<weights>-<states>"; None: as in torch,
            all in the parameter's dtype. Weights: "native", "master32", "split32", "split24", "sr";
            states: "fp32", "bf16", "int8"; see the README. A param group may have its own. The
            parameter itself counts: the next step starts from what somebody wrote into it (split
            weights: to within half of its last place; zeros stay zeros).
        seed: of the random bits that some recipes round with; torch's generators are not touched.
            Bits are keyed by seed, step, element and the parameter's position in this optimizer.
            Two optimizers with one seed draw the same bits for their first parameters, for their
            second ones and so on: with an optimizer per parameter or per layer, give each a seed of
            its own.
        flatten: move parameters into flat buffers at construction: those that are trained, dense,
            and the only owners of memory that torch allocated; others stay. From the first
            `zero_grad()` after its first gradient on, a parameter's gradient is a view of a flat
            buffer, which backward adds to. Nothing else changes: a view that nothing has written to
            is no gradient (the README lists what a GPU cannot tell), and the bits are the same. On
            a GPU flat parameters cannot be sent to other processes, because CUDA sends whole
            allocations.
        max_grad_norm: clip the gradients' global L2 norm, as `torch.nn.utils.clip_grad_norm_`
            before the step would, without writing them and without waiting for the device. The norm
            is `optimizer.grad_norm`; with inf it is measured, and finite gradients are left alone.
        skip_nonfinite: a step with a NaN or Inf in any gradient changes nothing, decided on the
            device; `optimizer.skipped_steps` counts them.
        grad_attribute: where a parameter's gradient is: "grad", "main_grad" (Megatron's gradient
            buffers) or "decoupled_grad" (TransformerEngine's and Megatron-FSDP's). With the latter
            two, steps, clipping and `skip_nonfinite` read that attribute, of any floating dtype,
            and not `grad`; None or no attribute is no gradient. Scale it yourself: torch's
            GradScaler looks at `grad` alone, and such a step raises.
        backend: "auto" (triton on GPUs, reference on CPU), "triton", "reference" or "compiled" (the
            reference through torch.compile: CPU only, needs a C++ compiler). All give the same
            bits.

    `state` is an ordinary dict of dicts, the user's to edit: what stands there at a step is stepped
    on, where it is if it is stored as we would, else copied into flat memory.

    State per parameter is torch's: `step`, `exp_avg`, `exp_avg_sq` and with amsgrad
    `max_exp_avg_sq`, in the parameter's dtype; checkpoints are exchanged with torch.optim.Adam(W)
    both ways. A precision stores what its name says instead; its checkpoints are as exact, those of
    any other precision are converted on loading, and `export_fp32` gives all of it to
    torch.optim.Adam(W).

    Raises:
        ValueError, TypeError: an argument is out of range, with torch's texts for torch's
            arguments.
        RuntimeError: the backend cannot run here; the text says why and what to do.
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
        arguments.check_combinations(
            flatten, max_grad_norm, skip_nonfinite, grad_attribute, differentiable
        )
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
        self._make_engine()
        self._move_to_buffers()

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

        As in torch with `fused=True`; also with `max_grad_norm` or `skip_nonfinite`. With a
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

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch. It may have a `precision` of its own.

        With `flatten=True`, parameters that are added later are not moved into flat buffers.

        Raises:
            TypeError, ValueError: a parameter cannot be stepped, or its dtype does not fit the
                precision. The group is not added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._precision is not None or "precision" in group:
            # Users may give the same dict to another optimizer, which must not get our entries.
            group = self.param_groups[-1] = {**group}
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Give the group the optimizer's precision, and raise if it cannot be stepped."""
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        names = checkpoint.names_of(group)
        arguments.complete_group(group, number, names, self._precision, self._seed, self._backend)

    def _check_before_step(self, group: dict[str, Any]) -> None:
        """Check a group that its user may have edited since it was added."""
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
        self._accelerator_graph_capture_health_check()
        self._check_not_offloaded()
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
            self._engine.step(self.param_groups, self.state, transform, self._check_before_step)
        return loss

    def _step_only(self, params: Sequence[Tensor]) -> None:
        """Step only these parameters, each of which has a gradient."""
        self._check_not_offloaded()
        self._engine.step(
            self.param_groups, self.state, GradTransform(), self._check_before_step, params
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
        device. None before the first step, and without `max_grad_norm` and `skip_nonfinite`.
        """
        return None if self._engine.stats is None else self._engine.stats[table.GRAD_NORM].float()

    @property
    def skipped_steps(self) -> Tensor | None:
        """The number of steps skipped because of non-finite gradients or a GradScaler's overflow.

        int64, shape (), on the device of the first parameter. None where `grad_norm` is None.
        """
        stats = self._engine.stats
        return None if stats is None else stats[table.SKIPPED_STEPS].long()

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
            ValueError: neither `max_grad_norm` nor `skip_nonfinite` is set. In a step: it returned
                another kind of tensor. Nothing has changed then.

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

    @torch._disable_dynamo  # type: ignore[attr-defined]
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
            else:  # as torch does
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
            torch._foreach_zero_([grad for _, grad in present])

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


class FusedAdamW(FusedAdam, torch.optim.AdamW):
    """AdamW whose whole step is one fused pass: a drop-in for `torch.optim.AdamW`.

    Arguments as in `torch.optim.AdamW`, and `FusedAdam`'s own. Loshchilov & Hutter 2019.
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
