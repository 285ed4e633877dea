"""state_dict in torch's form and back. Knows the optimizer's public attributes and its arena, no kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .arena import Arena, State, real
from .plan import state_keys


def export_steps(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Give every entry a step tensor of its own, on the CPU unless its group is fused or capturable (torch's rule).

    Ours are views of one flat buffer on the device: torch.optim would advance a shared one once per parameter,
    and wait for the device once per parameter.
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
            entry = {**entry, "step": step}
        state[index] = entry
    return {**state_dict, "state": state}


def match(groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> dict[Any, Tensor]:
    """Saved parameter number -> our parameter, by position.

    Raises ValueError (torch's texts) if the groups differ in number or size.
    """
    if len(groups) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
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
        groups: the optimizer's param groups, not changed.
        arena, state: the optimizer's; state of parameters that the checkpoint lacks is dropped.
        state_dict: torch's form; never aliased and never changed.

    Raises ValueError before anything is written if groups or shapes do not match.
    """
    saved_groups = deepcopy(state_dict["param_groups"])
    params = match(groups, saved_groups)
    entries: dict[Tensor, dict[str, Any]] = {}
    others: dict[Any, Any] = {}
    for number, entry in state_dict["state"].items():
        if number in params:
            entries[params[number]] = dict(entry)
            arena.check(params[number], f"parameter {number}", entry, state_keys(amsgrad=True))
        else:
            others[number] = deepcopy(entry)

    dict.clear(state)
    for key, value in others.items():
        dict.__setitem__(state, key, value)
    for param, entry in entries.items():
        _settle(arena, state, param, entry)
    stateful = [param for param, entry in entries.items() if entry]
    arena.adopt(state, stateful, [[k for k in state_keys(True) if k in entries[param]] for param in stateful])

    def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        names = {"param_names": old["param_names"]} if "param_names" in old and "param_names" not in new else {}
        return {**new, **names, "params": old["params"]}

    return [merged(old, new) for old, new in zip(groups, saved_groups, strict=True)]


def _settle(arena: Arena, state: State, param: Tensor, entry: dict[str, Any]) -> None:
    """Make the parameter's entry of what was saved: copied into our memory where we have some, else adopted later."""
    home = arena.homes.get(param)
    own: dict[str, Any] = {}
    for key, value in entry.items():
        view = home.views.get(key) if home else None
        if key == "step":
            own[key] = value
        elif key in state_keys(amsgrad=True):
            if home and view is not None and home.holds(key, view, real(param).dtype):
                value = view.copy_(value)
            own[key] = value
        else:  # not ours: kept as torch keeps it, but never aliased
            own[key] = value.to(device=param.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
    dict.__setitem__(state, param, own)
