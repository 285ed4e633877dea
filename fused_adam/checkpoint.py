"""state_dict in torch's form and back. Knows the optimizer's public attributes and its arena, no kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import codecs
from .arena import Arena, Entries, State, apart, dense_layout, is_dense, padded
from .distributed import like, local, part_of
from .precision import ENTRIES, GROUP, WEIGHTS, Recipe, check_seed, parse


def export_steps(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Give every entry a step tensor of its own, on the CPU unless its group is fused or capturable (torch's rule).

    Ours are views of one flat buffer on the device: torch.optim would advance a shared one once per parameter,
    and wait for the device once per parameter. The rest are other tensors over the same memory: torch.multiprocessing
    moves the storages of what is sent to another process, when it gets there.
    """
    stays = {
        index: group.get("fused") or group.get("capturable")
        for group in state_dict["param_groups"]
        for index in group["params"]
    }
    copies: dict[torch.Tensor, Tensor] = {}
    state = {}
    for index, entry in state_dict["state"].items():
        if isinstance(entry, dict) and isinstance(entry.get("step"), Tensor):
            step = entry["step"]
            if step.device.type == "cpu" or stays.get(index):
                step = step.clone()
            else:  # one copy to the host for all counters of one buffer
                base = step._base if step._base is not None else step
                if base not in copies:
                    copies[base] = base.cpu()
                step = copies[base].view(-1)[step.storage_offset()].clone()
            sent = {key: apart(value) for key, value in entry.items() if key in ENTRIES and _may_be_ours(value)}
            entry = {**entry, **sent, "step": step}
        state[index] = entry
    return {**state_dict, "state": state}


def _may_be_ours(value: object) -> bool:
    """Not what a differentiable step or a user made that a capsule cannot hold."""
    return type(value) is Tensor and not (value.requires_grad or value.is_meta or value.is_conj() or value.is_neg())


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError unless this can be an optimizer's state_dict: a model's, or a whole file's, lacks the keys."""
    for key, kind, name in (("param_groups", (list, tuple), "a list of dicts"), ("state", Mapping, "a dict")):
        if key not in state_dict:
            keys = ", ".join(map(repr, list(state_dict)[:5])) or "none"
            raise ValueError(f"state_dict has no {key!r}, as an optimizer's has (its first keys: {keys})")
        if not isinstance(state_dict[key], kind):
            raise ValueError(f"state_dict[{key!r}] is {type(state_dict[key]).__name__}, but must be {name}")


def _number(value: object) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def _check_group(index: int, group: object) -> None:
    """Raise ValueError unless a saved param group has what a step needs and torch fills in nowhere."""
    name = f"param_groups[{index}] of the state_dict"
    if not isinstance(group, Mapping):
        raise ValueError(f"{name} is {type(group).__name__}, but must be a dict")
    for key in ("params", "lr", "betas", "eps", "weight_decay"):
        if key not in group:
            raise ValueError(f"{name} has no {key!r}")
    if not isinstance(group["params"], (list, tuple)) or any(isinstance(x, (list, dict)) for x in group["params"]):
        raise ValueError(f"'params' in {name} must be a list of numbers or names, but is {group['params']!r}")
    betas = group["betas"]
    if not (isinstance(betas, (list, tuple)) and len(betas) == 2 and all(map(_number, betas))):
        raise ValueError(f"'betas' in {name} must be two numbers, but is {betas!r}")
    for key in ("lr", "eps", "weight_decay"):
        if not _number(group[key]):
            raise ValueError(f"{key!r} in {name} must be a number, but is {group[key]!r}")


def match(groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> dict[Any, Tensor]:
    """Saved parameter number -> our parameter, by position.

    Raises ValueError if the groups differ in number or size (torch's texts), or lack what a step needs.
    """
    if len(groups) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
    for index, group in enumerate(saved):
        _check_group(index, group)
    if any(len(group["params"]) != len(other["params"]) for group, other in zip(groups, saved, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
    numbers = chain.from_iterable(group["params"] for group in saved)
    return dict(zip(numbers, chain.from_iterable(group["params"] for group in groups), strict=True))


def load(
    groups: Sequence[dict[str, Any]], arena: Arena, state: State, state_dict: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Copy a checkpoint into the arena, tensor by tensor, and return the new param groups.

    Args:
        groups: the optimizer's param groups, not changed. Their precision stays, and what was saved in another one is
            converted; the seed is the checkpoint's.
        arena, state: the optimizer's; state of parameters that the checkpoint lacks is dropped.
        state_dict: torch's form, in any precision; never aliased and never changed.

    Raises ValueError before anything is written if groups or shapes do not match, or it is no optimizer's state_dict.
    """
    _check_form(state_dict)
    saved_groups = deepcopy(state_dict["param_groups"])
    params = match(groups, saved_groups)
    merged = [_merged(old, new) for old, new in zip(groups, saved_groups, strict=True)]
    recipes = {
        param: (parse(new.get("precision")), parse(old.get("precision")))
        for old, new in zip(groups, saved_groups, strict=True)
        for param in old["params"]
    }
    entries: dict[Tensor, dict[str, Any]] = {}
    others: dict[Any, Any] = {}
    for number, entry in state_dict["state"].items():
        if number in params:
            param = params[number]
            if not isinstance(entry, Mapping):
                raise ValueError(f"state of parameter {number} is {type(entry).__name__}, but must be a dict")
            source = recipes[param][0]
            # What is there must fit; half an entry is filled up at the next step, as it always was.
            # What a recipe stores does not depend on which of its dtypes a parameter has.
            dtype = param.dtype if source.weights is None else WEIGHTS[source.weights][0][0]
            wanted = source.state(dtype, local(param).shape, amsgrad=True)
            arena.check(param, f"parameter {number}", dict(entry), wanted)
            # Here, where nothing is written yet: a user's own entry may refuse to be copied.
            entries[param] = _parts({k: v if isinstance(v, Tensor) else deepcopy(v) for k, v in entry.items()}, param)
        else:
            others[number] = deepcopy(entry)

    dict.clear(state)
    for key, value in others.items():
        dict.__setitem__(state, key, value)
    wanted_entries: dict[Tensor, Entries] = {}
    for param, entry in entries.items():
        source, target = recipes[param]
        part = local(param).detach()
        wanted = target.state(part.dtype, part.shape, amsgrad="max_exp_avg_sq" in entry)
        if not _same_storage(source, target, part, entry):
            entry = convert(entry, part, target)
        _settle(arena, state, param, entry, wanted)
        if entry:
            wanted_entries[param] = {key: kind for key, kind in wanted.items() if key in entry}
    arena.adopt(state, wanted_entries)
    return merged


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    check_seed(new.get("seed", 0))
    kept = {"param_names": old["param_names"]} if "param_names" in old and "param_names" not in new else {}
    new = {key: value for key, value in new.items() if key not in ("precision", "seed")} | (
        {key: old[key] for key in ("precision", "seed") if key in old}
        | ({"seed": new["seed"]} if "seed" in old and "seed" in new else {})
    )
    return {**new, **kept, "params": old["params"]}


def _parts(entry: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """The entry with what is here of its tensors, where the parameter is a DTensor."""
    return {
        key: part_of(param, key, value) if key in ENTRIES and isinstance(value, Tensor) else value
        for key, value in entry.items()
    }


def _same_storage(source: Recipe, target: Recipe, param: Tensor, entry: Mapping[str, Any]) -> bool:
    """Whether what was saved can be copied as it is: also the order of its elements, where groups rest on it."""
    code = entry.get("exp_avg_code")
    return source == target and (code is None or code.stride() == dense_layout(param)[1])


def reorder(entry: dict[str, Any], param: Tensor, recipe: Recipe) -> None:
    """Encode 8-bit moments anew if the parameter's elements lie in another order than they do."""
    part = local(param).detach()
    if "exp_avg_code" in entry and not _same_storage(recipe, recipe, part, _parts(entry, param)):
        moments = {key: value for key, value in entry.items() if key.endswith(("_code", "_scale"))}
        entry.update(convert(_parts(moments, param), part, recipe))


def _flat(value: Tensor, param: Tensor) -> Tensor:
    """The elements in the order in which the parameter's state holds them."""
    return (
        torch.empty(dense_layout(param)[0], dtype=value.dtype, device=value.device)
        .as_strided(*dense_layout(param))
        .copy_(value)
        .as_strided((value.numel(),), (1,))
    )


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)


def decode(entry: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """The float32 (or complex64) moments of an entry in any precision, and its master weight if it has one."""
    found = {key: _widened(entry[key]) for key in ("exp_avg", "exp_avg_sq") if key in entry}
    for key, decoder in (("exp_avg", codecs.decode_m), ("exp_avg_sq", codecs.decode_v)):
        if f"{key}_code" in entry:
            code = entry[f"{key}_code"]
            flat = code.as_strided((code.numel(),), (1,)) if is_dense(code) else code.reshape(-1)
            whole = torch.nn.functional.pad(flat, (0, -code.numel() % GROUP))
            values = decoder(whole, entry[f"{key}_scale"])[: code.numel()]
            found[key] = values.as_strided(code.shape, code.stride()) if is_dense(code) else values.view(code.shape)
    if "max_exp_avg_sq" in entry:  # last, as in torch
        found["max_exp_avg_sq"] = _widened(entry["max_exp_avg_sq"])
    if "master_weight" in entry:
        found["master_weight"] = entry["master_weight"].float()
    elif "remainder" in entry:
        visible, remainder = param.detach(), entry["remainder"].to(param.device)
        weights = "split32" if remainder.dtype == torch.int16 else "split24"
        found["master_weight"] = codecs.load_weight(weights, visible.contiguous(), remainder.contiguous())
    return found


def convert(entry: Mapping[str, Any], param: Tensor, target: Recipe) -> dict[str, Any]:
    """What was saved in one precision as it is stored in another, rounded to nearest.

    Remainders are of the weights as they are in the model: load those first.
    """
    if not any(key in entry for key in ENTRIES):
        return dict(entry)
    values = decode(entry, param)
    out = {key: value for key, value in entry.items() if key not in ENTRIES}
    # Half of what is rounded away: 16 bits of a second moment's chance, 8 of a weight.
    half = torch.full((padded(param.numel()),), 0x80000080 - (1 << 32), dtype=torch.int32)
    for key in ("exp_avg", "exp_avg_sq"):
        if key in values and target.states == "int8":
            flat = torch.nn.functional.pad(_flat(values[key], param), (0, -param.numel() % GROUP))
            noise = codecs.state_noise(half[: flat.numel()]).to(flat.device)
            code, scale = codecs.encode_m(flat) if key == "exp_avg" else codecs.encode_v(flat, noise)
            out[f"{key}_code"] = code[: param.numel()].as_strided(*dense_layout(param))
            out[f"{key}_scale"] = scale
        elif key in values:
            out[key] = values[key]
    if "max_exp_avg_sq" in values:
        out["max_exp_avg_sq"] = values["max_exp_avg_sq"]
    weight = values.get("master_weight")
    if weight is not None and target.weights == "master32":
        out["master_weight"] = weight
    elif weight is not None and target.weights in ("split32", "split24"):
        words = half[: param.numel()].view(param.shape).to(weight.device)
        out["remainder"] = codecs.store_weight(target.weights, weight, words)[1]
    return out


def export_fp32(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Weights by name or position, and a state_dict in torch's form, all float32 copies."""
    weights: dict[Any, Tensor] = {}
    state: dict[Any, Any] = {}
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    params = [param for group in groups for param in group["params"]]
    for number, name, param in zip(numbers, names, params, strict=True):
        # Offloaded state is on the host.
        entry = {
            key: value.to(param.device) if key in ENTRIES else value
            for key, value in _parts(state_dict["state"].get(number, {}), param).items()
        }
        part = local(param).detach()
        values = decode(entry, part)
        weight = values.pop("master_weight", None)
        if weight is None:
            weight = _widened(part)
        elif "master_weight" in entry:  # as the next step will see it
            weight = codecs.load_weight("master32", part, weight)
        weights[name if isinstance(name, str) else number] = like(param, "param", weight.clone())
        if entry:
            kept = {key: value for key, value in entry.items() if key not in ENTRIES}
            state[number] = {**kept, **{key: like(param, key, value.clone()) for key, value in values.items()}}
    exported = [
        {key: value for key, value in group.items() if key not in ("precision", "seed")}
        for group in state_dict["param_groups"]
    ]
    return {"params": weights, "state": export_steps({"state": state, "param_groups": exported})}


def _settle(arena: Arena, state: State, param: Tensor, entry: dict[str, Any], wanted: Entries) -> None:
    """Make the parameter's entry of what was saved: copied into our memory where we have some, else adopted later."""
    home = arena.homes.get(param)
    own: dict[str, Any] = {}
    for key, value in entry.items():
        view = home.views.get(key) if home else None
        if key == "step":
            own[key] = value
        elif key in wanted:
            if home and view is not None and home.holds(key, view, wanted[key][0]):
                home.fill(key, value)
                value = view
            own[key] = value
        else:  # not ours: kept as torch keeps it, but never aliased
            own[key] = value.to(device=param.device, copy=True) if isinstance(value, Tensor) else value
    dict.__setitem__(state, param, own)
