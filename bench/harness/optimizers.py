"""The registry of optimizers: how each is made, and why one cannot take part. Measures nothing."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_adam import FusedAdamW
from fused_adam.precision import WEIGHTS, parse

from .oracle import Options

Optimizer = torch.optim.Optimizer
OURS, TORCH, OTHER = "ours", "torch", "other"
BASELINE, TORCH_DEFAULT = "torch fused", "torch foreach"
# What is measured in by default, in this order: the first that every recipe serves.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_COMPILED_RECIPES = "the compiled backend knows no precision recipes"


@dataclass(frozen=True)
class Case:
    """What is measured, whoever the optimizer."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype = torch.float32
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer.

    make: parameters and options -> the optimizer; what it raises is the reason for its absence.
    limits: a case -> why it is not served, or None.
    quantised: its state or weights are lossy beyond rounding: judged by direction, not by rounding
        errors.
    clips: its step clips by itself; else `clip_grad_norm_` goes before it.
    scratch: memory the step takes for the moment, in copies of the parameters.
    slow: compiles for long, so it takes part only where it is named. backend: of ours.
    captures: made with `capturable=True`, its step counts on inside a CUDA graph; others would
        repeat one step.
    """

    name: str
    family: str
    make: Callable[[list[Tensor], Options], Optimizer]
    limits: Callable[[Case], str | None] = lambda case: None
    quantised: bool = False
    clips: bool = False
    scratch: float = 0.0
    slow: bool = False
    backend: str | None = None
    captures: bool = False


def adamw_arguments(options: Options) -> dict[str, Any]:
    """Keyword arguments as torch.optim.AdamW takes them."""
    return {
        "lr": options.lr,
        "betas": options.betas,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
    }


def torch_arguments(options: Options) -> dict[str, Any]:
    """As above, with what only torch's own signature has."""
    return {
        **adamw_arguments(options),
        "amsgrad": options.amsgrad,
        "capturable": options.capturable,
    }


# Ours.


def ours(backend: str, flatten: bool, precision: str | None = None) -> OptimizerSpec:
    """FusedAdamW on one backend."""
    extra: dict[str, Any] = {"backend": backend, "flatten": flatten}
    if precision is not None:
        extra["precision"] = precision

    def make(params: list[Tensor], options: Options) -> Optimizer:
        arguments = {**torch_arguments(options), "max_grad_norm": options.clip, **extra}
        return FusedAdamW(params, **arguments)

    words = [
        "FusedAdamW",
        *([] if backend == "auto" else [backend]),
        *(["flatten"] if flatten else []),
    ]
    name = " ".join([*words, *([] if precision is None else [precision])])

    def limits(case: Case) -> str | None:
        if backend == "compiled" and precision is not None:
            return NO_COMPILED_RECIPES
        allowed = dtypes_of(precision)
        if case.dtype in allowed:
            return None
        names = [str(dtype).removeprefix("torch.") for dtype in (*allowed, case.dtype)]
        return f"precision {precision!r} is for {' or '.join(names[:-1])} parameters, not {names[-1]} (see --dtype)"

    return OptimizerSpec(
        name,
        OURS,
        make,
        limits,
        quantised=precision is not None,
        clips=True,
        backend=backend,
        captures=True,
    )


def dtypes_of(precision: str | None) -> Sequence[torch.dtype]:
    """The parameters that a recipe serves. Raises ValueError, naming the option, if there is no
    such recipe.
    """
    try:
        weights = parse(precision).weights
    except ValueError as error:
        raise ValueError(f"--precision: {error}") from None
    return DTYPES if weights is None else WEIGHTS[weights][0]


def recipes_of(precision: Sequence[str]) -> list[str | None]:
    """What was asked for with `--precision`: "none" is no recipe."""
    return [None if name == "none" else name for name in precision]


def common_dtype(precision: Sequence[str]) -> torch.dtype:
    """The first of float32, bfloat16 and float16 that all these recipes serve. Raises ValueError as
    `dtypes_of` does.

    There is one: every recipe serves bfloat16.
    """
    served = [dtypes_of(recipe) for recipe in recipes_of(precision)]
    return next(dtype for dtype in DTYPES if all(dtype in dtypes for dtypes in served))


def all_of_ours(
    device: torch.device, backend: str | None, flatten: bool | None, precision: Sequence[str] = ()
) -> list[OptimizerSpec]:
    """Every variant of ours that was asked for; None: each that is of use on this device. "none" is
    no recipe.

    Raises ValueError if a precision is asked for that is none, or that none of the backends has.
    """
    backends = [backend] if backend else ["auto", "compiled"] if device.type == "cpu" else ["auto"]
    flattens = [flatten] if flatten is not None else [False, True]
    recipes = recipes_of(precision) or [None]
    for recipe in recipes:
        dtypes_of(recipe)
    if backend == "compiled" and None not in recipes:
        raise ValueError(
            f"--precision {','.join(precision)} cannot be combined with --backend compiled, because "
            f"{NO_COMPILED_RECIPES}; allowed: auto, triton, reference"
        )
    return [
        ours(name, flat, recipe) for recipe in recipes for name in backends for flat in flattens
    ]


# torch's own paths.


def torch_spec(name: str, scratch: float = 0.0, **flags: bool) -> OptimizerSpec:
    """One of torch.optim.AdamW's paths."""

    def make(params: list[Tensor], options: Options) -> Optimizer:
        arguments: dict[str, Any] = {**torch_arguments(options), **flags}
        return torch.optim.AdamW(params, **arguments)

    return OptimizerSpec(name, TORCH, make, limits=same_grad_dtype, scratch=scratch, captures=True)


def same_grad_dtype(case: Case) -> str | None:
    """The limit of optimizers that want gradients of the parameter's dtype."""
    if case.grad_dtype != case.dtype:
        return "gradients must have the parameter's dtype"
    return None


class Compiled(torch.optim.AdamW):
    """torch.optim.AdamW whose step went through torch.compile, as torch's tutorial has it."""

    def __init__(self, params: list[Tensor], **arguments: Any) -> None:
        if params[0].device.type != "cpu":
            # A tensor: a number would be compiled in, and another one compiled anew. On a CPU torch
            # takes none.
            arguments |= {"lr": torch.tensor(arguments["lr"]), "capturable": True}
        super().__init__(params, foreach=True, **arguments)
        self._compiled = torch.compile(super().step, fullgraph=False)

    def step(self, closure: Any = None) -> Any:
        return self._compiled()


def make_compiled(params: list[Tensor], options: Options) -> Optimizer:
    """torch.optim.AdamW through torch.compile."""
    return Compiled(params, **adamw_arguments(options), amsgrad=options.amsgrad)


# Everybody else. Each module is imported only when its optimizer is made.


def from_module(
    module: str, name: str, package: str, **extra: Any
) -> Callable[[list[Tensor], Options], Optimizer]:
    """Make `module.name`; raises ImportError that says how to get it."""

    def make(params: list[Tensor], options: Options) -> Optimizer:
        try:
            found = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != module.split(".")[0]:
                raise
            raise ImportError(f"not installed: {package}") from None
        except AttributeError:
            raise ImportError(f"{module} has no {name}: {package}") from None
        optimizer: Optimizer = found(params, **adamw_arguments(options), **extra)
        return optimizer

    return make


def no_amsgrad(case: Case) -> str | None:
    """The limit of optimizers without AMSGrad."""
    return "no AMSGrad" if case.options.amsgrad else None


def gpu_only(case: Case) -> str | None:
    """The limit of CUDA kernels."""
    return "runs on CUDA only" if case.device.type != "cuda" else no_amsgrad(case)


def make_deepspeed(params: list[Tensor], options: Options) -> Optimizer:
    """DeepSpeed has one class per device; both compile themselves when they are first made."""
    if params[0].device.type == "cpu":
        make = from_module(
            "deepspeed.ops.adam", "DeepSpeedCPUAdam", "pip install deepspeed", adamw_mode=True
        )
    else:
        make = from_module(
            "deepspeed.ops.adam", "FusedAdam", "pip install deepspeed", adam_w_mode=True
        )
    return make(params, options)


@functools.cache
def peers() -> dict[str, OptimizerSpec]:
    """Every optimizer that is not ours, by name, in the order of the tables."""
    compile_ = OptimizerSpec(
        "torch compile", TORCH, make_compiled, limits=same_grad_dtype, slow=True
    )
    pypi = "pip install"
    others = [
        OptimizerSpec(
            "optimi",
            OTHER,
            from_module("optimi", "AdamW", f"{pypi} torch-optimi"),
            limits=no_amsgrad,
        ),
        OptimizerSpec(
            "flashoptim",
            OTHER,
            from_module("flashoptim", "FlashAdamW", f"{pypi} flashoptim"),
            limits=gpu_only,
            quantised=True,
        ),
        OptimizerSpec(
            "torchao 8-bit",
            OTHER,
            from_module("torchao.optim", "AdamW8bit", f"{pypi} torchao"),
            limits=no_amsgrad,
            quantised=True,
            slow=True,
        ),
        OptimizerSpec(
            "bitsandbytes 32-bit",
            OTHER,
            from_module("bitsandbytes.optim", "AdamW32bit", f"{pypi} bitsandbytes"),
            limits=gpu_only,
        ),
        OptimizerSpec(
            "bitsandbytes 8-bit",
            OTHER,
            from_module("bitsandbytes.optim", "AdamW8bit", f"{pypi} bitsandbytes"),
            limits=gpu_only,
            quantised=True,
        ),
        OptimizerSpec(
            "apex",
            OTHER,
            from_module(
                "apex.optimizers",
                "FusedAdam",
                "build NVIDIA/apex from source with nvcc",
                adam_w_mode=True,
            ),
            limits=gpu_only,
        ),
        OptimizerSpec(
            "transformer-engine",
            OTHER,
            from_module(
                "transformer_engine.pytorch.optimizers",
                "FusedAdam",
                f"{pypi} transformer-engine[pytorch]",
                adam_w_mode=True,
            ),
            limits=gpu_only,
        ),
        OptimizerSpec("deepspeed", OTHER, make_deepspeed, limits=no_amsgrad, slow=True),
    ]
    specs = [
        torch_spec(BASELINE, fused=True),
        torch_spec(TORCH_DEFAULT, scratch=3.0, foreach=True),
        torch_spec("torch single", foreach=False, fused=False),
        compile_,
        *others,
    ]
    return {spec.name.replace(" ", "-"): spec for spec in specs}


def make(spec: OptimizerSpec, params: list[Tensor], case: Case) -> Optimizer | str:
    """The optimizer, or the reason for its absence in one line."""
    reason = spec.limits(case)
    if reason:
        return reason
    try:
        return spec.make(params, case.options)
    # Whatever another project's constructor raises is a reason, not our failure.
    except Exception as error:
        # Ours must not fail, but for a backend that cannot run here, or a recipe that this dtype
        # does not have.
        if spec.family == OURS and not spec.quantised and not isinstance(error, RuntimeError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        return (
            text
            if isinstance(error, (ImportError, RuntimeError))
            else f"{type(error).__name__}: {text}"
        )


def step_of(
    spec: OptimizerSpec, optimizer: Optimizer, params: list[Tensor], options: Options
) -> Callable[[], object]:
    """One whole step: with clipping wherever it happens."""
    if options.clip is None or spec.clips:
        return optimizer.step
    max_norm = options.clip

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()

    return clip_and_step
