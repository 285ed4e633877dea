"""What a step can use: checks of parameters, gradients, state entries and state_dicts.

All of them run before anything is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..distributed import local, to_local
from ..numerics.scalars import is_number
from ..precision import COMPANDED, ENTRIES, EntrySpec
from .arena import Entries
from .memory import is_lazy
from .param_state import ParamState

# What parameters and gradients may store, or the complex dtype of it.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# AMSGrad, averages and a recipe's weights may be switched on later: the maximum begins at 0, the
# average and the master weight as a copy of their parameter.
BEGINS_LATER = ("max_exp_avg_sq", "ema", "master_weight", "remainder")
# What a param group needs for a step, and what torch does not fill in when it loads.
GROUP_KEYS = ("params", "lr", "betas", "eps", "weight_decay")


def check_pair(param: Tensor, grad: Tensor, name: str) -> None:
    """Raise unless a step can update this parameter with this gradient.

    Args:
        param, grad: what is here of them, if the parameter is a DTensor.
        name: what texts call the parameter, such as "parameter 3 (group 0)".

    Raises RuntimeError, TypeError or ValueError, in the words of torch.optim where it has some.
    """
    if grad.is_sparse:
        raise RuntimeError(
            "Adam does not support sparse gradients, please consider SparseAdam instead"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(f"the gradient of {name} has layout {grad.layout}, but must be strided")
    for what, tensor in ((name, param), (f"the gradient of {name}", grad)):
        if tensor.dtype.to_real() not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(
                f"{what} has dtype {tensor.dtype}, "
                f"but must be one of {allowed} (or complex of these)"
            )
    same_place = grad.shape == param.shape and grad.device == param.device
    if not same_place or grad.is_complex() != param.is_complex():
        raise ValueError(
            f"the gradient of {name} is {grad.dtype} of shape {tuple(grad.shape)} "
            f"on {grad.device}, but must match the parameter: "
            f"{param.dtype} of shape {tuple(param.shape)} on {param.device}"
        )
    if is_lazy(param):
        raise RuntimeError(
            f"{name} is a conjugate or negative view, which cannot be written; use .resolve_conj()"
        )
    # A kernel would write several values to one place. torch's operations refuse that as well, but
    # in the middle of a step and without the parameter's name.
    layout = zip(param.shape, param.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in layout):
        raise RuntimeError(
            f"{name} is expanded: several of its elements share one place in memory; use .clone()"
        )


def check_entry(
    param: Tensor, name: str, entry: object, wanted: Entries, param_state: ParamState | None = None
) -> None:
    """Raise ValueError unless the entry is empty, or the whole state of its parameter.

    Args:
        param, name: the parameter, and what the error calls it.
        entry: what stands in `optimizer.state` or in a checkpoint. An empty one begins at the next
            step.
        wanted: what the parameter's recipe stores. Values of other float dtypes are converted
            later, so they pass.
        param_state: what the last step stored, if there was one. Without it, entries that can begin
            later may be missing.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"state of {name} is {type(entry).__name__}, but must be a dict")
    if not entry:
        return
    _check_keys(name, entry, wanted, param_state.stored if param_state else ())
    for key, spec in wanted.items():
        if entry.get(key) is not None:
            _check_value(param, name, key, entry[key], spec)
    _check_step(param, name, entry["step"], param_state)


def _check_keys(
    name: str, entry: Mapping[str, Any], wanted: Entries, stored: Collection[str]
) -> None:
    companded = [key for key in COMPANDED if key in entry]
    if companded:
        raise ValueError(
            f"state of {name} has {companded[0]!r}: 8-bit moments of an earlier fused-adam, whose "
            "codes have another meaning now; load the checkpoint with that version, and save "
            "optimizer.export_fp32()['state'], which loads into any precision"
        )
    # A maximum stays when AMSGrad is switched off, as in torch, and so does an average.
    allowed = {"max_exp_avg_sq", "ema", *wanted}
    foreign = [key for key in ENTRIES if key in entry and key not in allowed]
    if foreign:
        raise ValueError(
            f"state of {name} has {foreign[0]!r}, which its precision does not store: a recipe is "
            "chosen before training; to change it, load the state_dict into an optimizer that has "
            "the other one"
        )
    needed = [key for key in wanted if key in stored or key not in BEGINS_LATER]
    missing = [key for key in ("step", *needed) if entry.get(key) is None]
    if missing:
        raise ValueError(
            f"state of {name} has {', '.join(map(repr, entry))}, but lacks "
            f"{', '.join(map(repr, missing))}: it is not the whole state of an Adam; an entry that "
            "is deleted or empty starts anew"
        )


def _check_value(param: Tensor, name: str, key: str, value: object, spec: EntrySpec) -> None:
    what = f"state {key!r} of {name}"
    # A tensor that is not of this parameter comes back as it is, and has the wrong shape.
    if isinstance(value, Tensor):
        value = to_local(param, key, value)
    if not isinstance(value, Tensor) or value.shape != spec.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} has {got}, but must be a tensor of shape {tuple(spec.shape)}")
    if not _has_values_of(value, spec.dtype, param):
        raise ValueError(
            f"{what} is a {value.layout} tensor of {value.dtype} on {value.device}, but must be a "
            f"dense tensor with values of {spec.dtype}"
        )
    # Codes and remainders are bits, which no conversion keeps.
    is_bits = not (spec.dtype.is_floating_point or spec.dtype.is_complex)
    if is_bits and value.dtype != spec.dtype:
        raise ValueError(f"{what} has dtype {value.dtype}, but its precision stores {spec.dtype}")


def _check_step(param: Tensor, name: str, step: Any, param_state: ParamState | None) -> None:
    if isinstance(step, Tensor):
        number = step.numel() == 1 and _has_values_of(step, torch.float32, param)
    else:
        number = isinstance(step, Real)
    if not number:
        raise ValueError(
            f"state 'step' of {name} is {step!r}, but must be one real number, as a tensor or plain"
        )
    if param_state and param_state.holds_step(step, local(param).device):
        # Our own counter is known to be valid: it is read when somebody else has written to it.
        step = param_state.step_key if isinstance(param_state.step_key, float) else 0
    # Reading a counter on a GPU would wait for it.
    if isinstance(step, Tensor) and step.device.type != "cpu":
        return
    if not 0 <= float(step) < float("inf"):
        raise ValueError(
            f"state 'step' of {name} is {float(step)}, but must be a finite number >= 0"
        )


def _has_values_of(value: Tensor, dtype: torch.dtype, param: Tensor) -> bool:
    """Whether `param`'s state of this dtype can be a copy of the tensor."""
    return (
        value.layout == torch.strided
        and not value.is_quantized
        # Values on meta do not exist, which is right only for a parameter that has none either.
        and (param.is_meta or not value.is_meta)
        and (dtype.is_complex or not value.is_complex())
    )


def check_state_dict(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError unless this is the state_dict of an optimizer with these param groups.

    What loads instead by mistake is a model's state_dict, or a whole file with several of them.
    Groups have to be as many and as large as ours; texts of torch.optim where it has one.
    """
    for key, kind, name in (
        ("param_groups", (list, tuple), "a list of dicts"),
        ("state", Mapping, "a dict"),
    ):
        if key not in state_dict:
            keys = ", ".join(map(repr, list(state_dict)[:5])) or "none"
            raise ValueError(
                f"state_dict has no {key!r}, as an optimizer's has (its first keys: {keys})"
            )
        if not isinstance(state_dict[key], kind):
            raise ValueError(
                f"state_dict[{key!r}] is {type(state_dict[key]).__name__}, but must be {name}"
            )
    saved = state_dict["param_groups"]
    if len(groups) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
    for index, group in enumerate(saved):
        _check_group(f"param_groups[{index}] of the state_dict", group)
    # Only now, when every saved group is known to have a list of parameters.
    if any(len(x["params"]) != len(y["params"]) for x, y in zip(groups, saved, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of "
            "optimizer's group"
        )


def _check_group(name: str, group: object) -> None:
    if not isinstance(group, Mapping):
        raise ValueError(f"{name} is {type(group).__name__}, but must be a dict")
    for key in GROUP_KEYS:
        if key not in group:
            raise ValueError(f"{name} has no {key!r}")
    params, betas = group["params"], group["betas"]
    # The numbers of parameters are looked up in a dict, so they have to be hashable.
    if not isinstance(params, (list, tuple)) or any(isinstance(x, (list, dict)) for x in params):
        raise ValueError(
            f"'params' in {name} must be a list of numbers or names, but is {params!r}"
        )
    if not _two_numbers(betas):
        raise ValueError(f"'betas' in {name} must be two numbers, but is {betas!r}")
    for key in ("lr", "eps", "weight_decay"):
        if not is_number(group[key]):
            raise ValueError(f"{key!r} in {name} must be a number, but is {group[key]!r}")


def _two_numbers(value: Any) -> bool:
    """Whether it unpacks into two numbers: a list, a tuple, a tensor or an array."""
    if not (isinstance(value, (list, tuple)) or len(getattr(value, "shape", ())) > 0):
        return False
    return len(value) == 2 and all(map(is_number, value))
