"""state_dict in torch's form and back. Knows the optimizer's public attributes and its arena, no
kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

from torch import Tensor

from ..distributed import local, to_dtensor
from ..numerics import codecs
from ..numerics.scalars import is_number
from ..precision import ENTRIES, WEIGHTS, as_seed, parse
from . import shapes
from .arena import Arena, Entries, Slot, State, with_own_storage
from .convert import convert, decode, parts_of_entry, same_storage, widened


def exported(state_dict: dict[str, Any], arena: Arena) -> dict[str, Any]:
    """A state_dict that may leave: step tensors of its own, and moments that can be sent to another
    process.

    Steps are on the CPU unless their group is fused or capturable (torch's rule). Ours are views of
    one flat buffer on
    the device: torch.optim would advance a shared one once per parameter, and wait for the device
        as often.
    """
    stays = {
        index: group.get("fused") or group.get("capturable")
        for group in state_dict["param_groups"]
        for index in group["params"]
    }
    places = {
        id(param_state.view(key)): slot
        for param_state in arena.param_states.values()
        for key, slot in param_state.slots.items()
    }
    counts = {
        id(param_state.view("step")): param_state
        for param_state in arena.param_states.values()
        if param_state.counters and param_state.counters.ours
    }
    on_host: dict[int, Tensor] = {}  # one copy for all counters of a buffer
    state = {}
    for index, entry in state_dict["state"].items():
        if isinstance(entry, dict) and isinstance(entry.get("step"), Tensor):
            step = entry["step"]
            param_state = counts.get(id(step))
            if step.device.type == "cpu" or stays.get(index):
                step = step.clone()
            elif param_state and param_state.counters:
                steps = param_state.counters.steps
                if id(steps) not in on_host:
                    on_host[id(steps)] = steps.cpu()
                step = on_host[id(steps)][param_state.counter].clone()
            else:
                step = step.cpu()
            sent = {key: _sendable(entry[key], places) for key in entry if key in ENTRIES}
            entry = {**entry, **sent, "step": step}
        state[index] = entry
    return {**state_dict, "state": state}


def _sendable(value: Any, places: Mapping[int, Slot]) -> Any:
    """The same memory, as torch.multiprocessing can send it.

    On the CPU it moves the storage of what is sent into shared memory, when it gets there: so never
    a storage that we step on. On a GPU it sends whole allocations alone: so the segment, of which
    the value is a view.
    """
    if not _may_be_ours(value):
        return value
    if value.device.type == "cpu":
        return with_own_storage(value)
    slot = places.get(id(value))
    return value if slot is None else slot.view_within(value)


def _may_be_ours(value: object) -> bool:
    """Not what a differentiable step or a user made that a capsule cannot hold."""
    return type(value) is Tensor and not (
        value.requires_grad or value.is_meta or value.is_conj() or value.is_neg()
    )


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError unless this can be an optimizer's state_dict: a model's, or a whole file's,
    lacks the keys.
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


def _two_numbers(value: Any) -> bool:
    """Whether it unpacks into two numbers: a list, a tuple, a tensor or an array."""
    if not (isinstance(value, (list, tuple)) or len(getattr(value, "shape", ())) > 0):
        return False
    return len(value) == 2 and all(map(is_number, value))


def _check_group(index: int, group: object) -> None:
    """Raise ValueError unless a saved param group has what a step needs and torch fills in nowhere."""
    name = f"param_groups[{index}] of the state_dict"
    if not isinstance(group, Mapping):
        raise ValueError(f"{name} is {type(group).__name__}, but must be a dict")
    for key in ("params", "lr", "betas", "eps", "weight_decay"):
        if key not in group:
            raise ValueError(f"{name} has no {key!r}")
    if not isinstance(group["params"], (list, tuple)) or any(
        isinstance(x, (list, dict)) for x in group["params"]
    ):
        raise ValueError(
            f"'params' in {name} must be a list of numbers or names, but is {group['params']!r}"
        )
    betas = group["betas"]
    if not _two_numbers(betas):
        raise ValueError(f"'betas' in {name} must be two numbers, but is {betas!r}")
    for key in ("lr", "eps", "weight_decay"):
        if not is_number(group[key]):
            raise ValueError(f"{key!r} in {name} must be a number, but is {group[key]!r}")


def match(
    groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> dict[Any, Tensor]:
    """Saved parameter number -> our parameter, by position.

    Raises ValueError if the groups differ in number or size (torch's texts), or lack what a step
    needs.
    """
    if len(groups) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
    for index, group in enumerate(saved):
        _check_group(index, group)
    if any(
        len(group["params"]) != len(other["params"])
        for group, other in zip(groups, saved, strict=True)
    ):
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
        groups: the optimizer's param groups, not changed. Their precision stays, and what was saved
            in another one is converted; the seed is the checkpoint's.
        arena, state: the optimizer's; state of parameters that the checkpoint lacks is dropped.
        state_dict: torch's form, in any precision; never aliased and never changed.

    Raises ValueError before anything is written if groups or shapes do not match, or it is no
    optimizer's state_dict.
    """
    shapes.refuse("load_state_dict()", [param for group in groups for param in group["params"]])
    _check_form(state_dict)
    saved_groups = deepcopy(state_dict["param_groups"])
    params = match(groups, saved_groups)
    recipes = {
        param: (parse(new.get("precision")), parse(old.get("precision")))
        for old, new in zip(groups, saved_groups, strict=True)
        for param in old["params"]
    }
    entries: dict[Tensor, dict[str, Any]] = {}
    others: dict[Any, Any] = {}
    in_norm: list[dict[str, Any]] = []  # groups whose step count becomes that of each parameter
    group_of = {number: group for group in saved_groups for number in group["params"]}
    for number, entry in state_dict["state"].items():
        if number in params:
            param = params[number]
            if not isinstance(entry, Mapping):
                raise ValueError(
                    f"state of parameter {number} is {type(entry).__name__}, but must be a dict"
                )
            if entry and "step" not in entry and "step" in group_of[number]:
                # apex's and TransformerEngine's FusedAdam count steps per group.
                entry = {"step": group_of[number]["step"], **entry}
                in_norm.append(group_of[number])
            source = recipes[param][0]
            # What a recipe stores does not depend on which of its dtypes a parameter has.
            dtype = param.dtype if source.weights is None else WEIGHTS[source.weights][0][0]
            wanted = source.state(dtype, local(param).shape, amsgrad=True)
            arena.check(param, f"parameter {number}", dict(entry), wanted)
            # Here, where nothing is written yet: a user's own entry may refuse to be copied.
            copied = {k: v if isinstance(v, Tensor) else deepcopy(v) for k, v in entry.items()}
            entries[param] = parts_of_entry(copied, param)
        else:
            others[number] = deepcopy(entry)

    for group in in_norm:  # where nothing would advance it: a wrong count in the next checkpoint
        group.pop("step", None)
    merged = [_merged(old, new) for old, new in zip(groups, saved_groups, strict=True)]

    # The memory that is there is filled: it lives as long as something holds its tensors.
    before = [dict(entry) for entry in state.values() if isinstance(entry, dict)]
    state.clear()
    state.update(others)
    wanted_entries: dict[Tensor, Entries] = {}
    for param, entry in entries.items():
        source, target = recipes[param]
        part = local(param).detach()
        wanted = target.state(part.dtype, part.shape, amsgrad="max_exp_avg_sq" in entry)
        if not same_storage(source, target, part, entry):
            entry = convert(entry, part, target)
        _settle(arena, state, param, entry, wanted)
        if entry:
            wanted_entries[param] = wanted
    arena.adopt(state, wanted_entries, in_place=False)
    del before
    return merged


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    seed = as_seed(new.get("seed", 0))
    kept = (
        {"param_names": old["param_names"]}
        if "param_names" in old and "param_names" not in new
        else {}
    )
    new = {key: value for key, value in new.items() if key not in ("precision", "seed")} | (
        {key: old[key] for key in ("precision", "seed") if key in old}
        | ({"seed": seed} if "seed" in old and "seed" in new else {})
    )
    return {**new, **kept, "params": old["params"]}


def names_of(group: Mapping[str, Any]) -> Sequence[Any]:
    """The names of a group's parameters, or their positions: also where somebody has edited the
    parameters alone.
    """
    names = group.get("param_names", ())
    return names if len(names) == len(group["params"]) else range(len(group["params"]))


def export_fp32(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Weights by name or position, and a state_dict in torch's form, all float32 copies."""
    weights: dict[Any, Tensor] = {}
    state: dict[Any, Any] = {}
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    names = [name for group in groups for name in names_of(group)]
    params = [param for group in groups for param in group["params"]]
    for number, name, param in zip(numbers, names, params, strict=True):
        # Offloaded state is on the host.
        entry = {
            key: value.to(param.device) if key in ENTRIES else value
            for key, value in parts_of_entry(state_dict["state"].get(number, {}), param).items()
        }
        part = local(param).detach()
        values = decode(entry, part)
        weight = values.pop("master_weight", None)
        if weight is None:
            weight = widened(part)
        elif "master_weight" in entry:  # as the next step will see it
            weight = codecs.load_weight("master32", part, weight)
        weights[name if isinstance(name, str) else number] = to_dtensor(
            param, "param", weight.clone()
        )
        if entry:
            kept = {key: value for key, value in entry.items() if key not in ENTRIES}
            state[number] = {
                **kept,
                **{key: to_dtensor(param, key, value.clone()) for key, value in values.items()},
            }
    groups_of_torch = [
        {key: value for key, value in group.items() if key not in ("precision", "seed")}
        for group in state_dict["param_groups"]
    ]
    return {
        "params": weights,
        "state": exported({"state": state, "param_groups": groups_of_torch}, Arena()),
    }


def _settle(
    arena: Arena, state: State, param: Tensor, entry: dict[str, Any], wanted: Entries
) -> None:
    """Make the parameter's entry of what was saved: copied into our memory where we have some, else
    adopted later.
    """
    param_state = arena.param_states.get(param)
    own: dict[str, Any] = {}
    for key, value in entry.items():
        # One object per name, as before the first checkpoint: so the next one has the same bytes,
        # which pickle makes of references to it.
        key = sys.intern(key) if type(key) is str else key
        view = param_state.view(key) if param_state else None
        if key == "step":
            number = float(value)  # waits for its device, if it has one
            if (
                param_state
                and view is not None
                and param_state.holds_step(view, local(param).device)
            ):
                value = view.fill_(number)
            else:
                value = number
            own[key] = value
        elif key in wanted:
            if param_state and view is not None and param_state.holds(key, view, wanted[key][0]):
                param_state.fill(key, value)
                value = view
            own[key] = value
        else:  # not ours: kept as torch keeps it, but never aliased
            own[key] = (
                value.to(device=param.device, copy=True) if isinstance(value, Tensor) else value
            )
    state[param] = own
