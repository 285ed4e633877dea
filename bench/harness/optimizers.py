"""The optimizers that are compared: how each is made, and why one cannot take part."""

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
Make = Callable[[list[Tensor], Options], Optimizer]
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
    """One optimizer, before it has parameters.

    make: parameters and options -> the optimizer. What it raises is the reason for its absence.
    limits: a case -> why it is not served, or None.
    quantised: its state or weights are lossy beyond rounding: the parity check compares the
        direction of its steps, not rounding errors.
    clips: its step clips by itself; otherwise `clip_grad_norm_` runs before it.
    averages: its step averages weights by itself; otherwise torch's AveragedModel does after it.
    scratch: memory the step takes for a moment, in copies of the parameters.
    slow: compiles for long, so it takes part only where it is named.
    backend: of ours.
    captures: made with `capturable=True`, its step counts on inside a CUDA graph; others would
        repeat one step.
    """

    name: str
    family: str
    make: Make
    limits: Callable[[Case], str | None] = lambda case: None
    quantised: bool = False
    clips: bool = False
    averages: bool = False
    scratch: float = 0.0
    slow: bool = False
    backend: str | None = None
    captures: bool = False


def adamw_arguments(options: Options) -> dict[str, Any]:
    """Keyword arguments as every AdamW takes them."""
    names = ("lr", "betas", "eps", "weight_decay")
    return {name: getattr(options, name) for name in names}


def torch_arguments(options: Options) -> dict[str, Any]:
    """As above, with what only torch's own signature has."""
    more = {"amsgrad": options.amsgrad, "capturable": options.capturable}
    return {**adamw_arguments(options), **more}


# Ours.


def ours(backend: str, flatten: bool, precision: str | None = None) -> OptimizerSpec:
    """FusedAdamW on one backend."""
    extra: dict[str, Any] = {"backend": backend, "flatten": flatten}
    if precision is not None:
        extra["precision"] = precision

    def make(params: list[Tensor], options: Options) -> Optimizer:
        own = {"max_grad_norm": options.clip, "ema_decay": options.ema_decay}
        arguments = {**torch_arguments(options), **own, **extra}
        return FusedAdamW(params, **arguments)

    def limits(case: Case) -> str | None:
        if backend == "compiled" and precision is not None:
            return NO_COMPILED_RECIPES
        allowed = dtypes_of(precision)
        if case.dtype in allowed:
            return None
        *names, dtype = [str(dtype).removeprefix("torch.") for dtype in (*allowed, case.dtype)]
        return (
            f"precision {precision!r} is for {' or '.join(names)} parameters, not {dtype} "
            "(see --dtype)"
        )

    words = ["FusedAdamW", backend if backend != "auto" else "", "flatten" if flatten else ""]
    name = " ".join(filter(None, [*words, precision]))
    lossy = precision is not None
    return OptimizerSpec(
        name,
        OURS,
        make,
        limits,
        quantised=lossy,
        clips=True,
        averages=True,
        backend=backend,
        captures=True,
    )


def dtypes_of(precision: str | None) -> Sequence[torch.dtype]:
    """The parameters that a recipe serves. Raises ValueError, naming the option, if it is none."""
    try:
        weights = parse(precision).weights
    except ValueError as error:
        raise ValueError(f"--precision: {error}") from None
    return DTYPES if weights is None else WEIGHTS[weights][0]


def recipes_of(precision: Sequence[str]) -> list[str | None]:
    """What was asked for with `--precision`: "none" is no recipe."""
    return [None if name == "none" else name for name in precision]


def common_dtype(precision: Sequence[str]) -> torch.dtype:
    """The first of DTYPES that all these recipes serve. Raises ValueError as `dtypes_of` does.

    There is one: every recipe serves bfloat16.
    """
    served = [dtypes_of(recipe) for recipe in recipes_of(precision)]
    return next(dtype for dtype in DTYPES if all(dtype in dtypes for dtypes in served))


def variants(
    device: torch.device, backend: str | None, flatten: bool | None, precision: Sequence[str] = ()
) -> list[OptimizerSpec]:
    """Ours, once per recipe, backend and `flatten`; None: each that is of use on this device.

    Args:
        precision: names of recipes; "none" is no recipe. Where no backend is named, the compiled
            one takes part without a recipe alone, because it has none.

    Raises ValueError for a precision that is not known, or that the backend named does not have.
    """
    recipes = recipes_of(precision) or [None]
    for recipe in recipes:
        dtypes_of(recipe)
    if backend == "compiled" and None not in recipes:
        raise ValueError(
            f"--precision {','.join(precision)} cannot be combined with --backend compiled, "
            f"because {NO_COMPILED_RECIPES}; allowed: auto, triton, reference"
        )
    flattens = [False, True] if flatten is None else [flatten]
    specs = []
    for recipe in recipes:
        backends = [backend or "auto"]
        if backend is None and recipe is None and device.type == "cpu":
            backends.append("compiled")
        specs += [ours(name, flat, recipe) for name in backends for flat in flattens]
    return specs


# torch's own paths.


def torch_spec(name: str, scratch: float = 0.0, **flags: bool) -> OptimizerSpec:
    """One of torch.optim.AdamW's paths."""

    def make(params: list[Tensor], options: Options) -> Optimizer:
        arguments: dict[str, Any] = {**torch_arguments(options), **flags}
        return torch.optim.AdamW(params, **arguments)

    return OptimizerSpec(name, TORCH, make, same_grad_dtype, scratch=scratch, captures=True)


def same_grad_dtype(case: Case) -> str | None:
    """The limit of optimizers that want gradients of the parameter's dtype."""
    same = case.grad_dtype == case.dtype
    return None if same else "gradients must have the parameter's dtype"


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


def from_module(path: str, package: str, **extra: Any) -> Make:
    """Make `module.Class`; raises ImportError that says how to get it."""
    module, _, name = path.rpartition(".")

    def make(params: list[Tensor], options: Options) -> Optimizer:
        try:
            optimizer_class = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != module.split(".")[0]:
                raise
            raise ImportError(f"not installed: {package}") from None
        except AttributeError:
            raise ImportError(f"{module} has no {name}: {package}") from None
        optimizer: Optimizer = optimizer_class(params, **adamw_arguments(options), **extra)
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
    on_cpu = params[0].device.type == "cpu"
    name = "DeepSpeedCPUAdam" if on_cpu else "FusedAdam"
    mode = {"adamw_mode" if on_cpu else "adam_w_mode": True}
    return from_module(f"deepspeed.ops.adam.{name}", "pip install deepspeed", **mode)(
        params, options
    )


OPTIMI = from_module("optimi.AdamW", "pip install torch-optimi")
FLASHOPTIM = from_module("flashoptim.FlashAdamW", "pip install flashoptim")
TORCHAO = from_module("torchao.optim.AdamW8bit", "pip install torchao")
BNB_32 = from_module("bitsandbytes.optim.AdamW32bit", "pip install bitsandbytes")
BNB_8 = from_module("bitsandbytes.optim.AdamW8bit", "pip install bitsandbytes")
APEX = from_module(
    "apex.optimizers.FusedAdam", "build NVIDIA/apex from source with nvcc", adam_w_mode=True
)
TRANSFORMER_ENGINE = from_module(
    "transformer_engine.pytorch.optimizers.FusedAdam",
    "pip install transformer-engine[pytorch]",
    adam_w_mode=True,
)


@functools.cache
def peers() -> dict[str, OptimizerSpec]:
    """Every optimizer that is not ours, by its name on the command line, in the tables' order."""
    specs = [
        torch_spec(BASELINE, fused=True),
        torch_spec(TORCH_DEFAULT, scratch=3.0, foreach=True),
        torch_spec("torch single", foreach=False, fused=False),
        OptimizerSpec("torch compile", TORCH, make_compiled, same_grad_dtype, slow=True),
        OptimizerSpec("optimi", OTHER, OPTIMI, no_amsgrad),
        OptimizerSpec("flashoptim", OTHER, FLASHOPTIM, gpu_only, quantised=True),
        OptimizerSpec("torchao 8-bit", OTHER, TORCHAO, no_amsgrad, quantised=True, slow=True),
        OptimizerSpec("bitsandbytes 32-bit", OTHER, BNB_32, no_amsgrad),
        OptimizerSpec("bitsandbytes 8-bit", OTHER, BNB_8, no_amsgrad, quantised=True),
        OptimizerSpec("apex", OTHER, APEX, gpu_only),
        OptimizerSpec("transformer-engine", OTHER, TRANSFORMER_ENGINE, gpu_only),
        OptimizerSpec("deepspeed", OTHER, make_deepspeed, no_amsgrad, slow=True),
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
        expected = isinstance(error, (ImportError, RuntimeError))
        # Ours must not fail, unless a backend cannot run here or a recipe lacks this dtype.
        if spec.family == OURS and not spec.quantised and not isinstance(error, RuntimeError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        return text if expected else f"{type(error).__name__}: {text}"


def step_of(
    spec: OptimizerSpec, optimizer: Optimizer, params: list[Tensor], options: Options
) -> Callable[[], object]:
    """One whole step, with clipping wherever it happens."""
    if options.clip is None or spec.clips:
        return optimizer.step
    max_norm = options.clip

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()

    return clip_and_step
