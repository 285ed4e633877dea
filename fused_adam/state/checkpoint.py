"""state_dict in torch's form and back.

Knows the optimizer's public attributes and its arena, no kernels.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from .. import arguments
from ..distributed import as_byte_pairs, local, to_dtensor
from ..numerics import codecs
from ..precision import ENTRIES, WEIGHTS, Recipe, as_seed, parse
from . import shapes
from .arena import HOST, Arena, Entries, Groups, State
from .convert import convert, decode, parts_of_entry, same_storage, widened
from .memory import Slot, is_lazy, with_own_storage
from .param_state import ParamState
from .validate import check_entry, check_state_dict

OWN_KEYS = ("precision", "seed", "cautious", "ema_decay")  # what we add to torch's param groups


def exported(state_dict: dict[str, Any], arena: Arena) -> dict[str, Any]:
    """The state_dict with steps of its own, and with moments that other processes can be sent.

    Steps are on the CPU unless their group is fused or capturable (torch's rule). They are copies,
    because ours are views of one flat buffer on the device: torch.optim would advance a shared
    buffer once per parameter, and wait for the device as often.
    """
    groups = state_dict["param_groups"]
    groups_on_device = [x for x in groups if x.get("fused") or x.get("capturable")]
    on_device = {index for group in groups_on_device for index in group["params"]}
    param_states = arena.param_states.values()
    slots = {id(s.view(key)): slot for s in param_states for key, slot in s.slots.items()}
    owners = {id(s.view("step")): s for s in param_states if s.counters and s.counters.ours}
    on_host: dict[int, Tensor] = {}  # one copy for all counters of a buffer
    state = {}
    for index, entry in state_dict["state"].items():
        if isinstance(entry, dict) and isinstance(entry.get("step"), Tensor):
            step = entry["step"]
            owner = owners.get(id(step))
            if step.device.type == "cpu" or index in on_device:
                step = step.clone()
            elif owner and owner.counters:
                steps = owner.counters.steps
                if id(steps) not in on_host:
                    on_host[id(steps)] = steps.cpu()
                step = on_host[id(steps)][owner.counter].clone()
            else:
                step = step.cpu()
            sent = {key: _sendable(entry[key], slots) for key in entry if key in ENTRIES}
            if isinstance(sent.get("remainder"), Tensor):
                sent["remainder"] = as_byte_pairs(sent["remainder"])
            entry = {**entry, **sent, "step": step}
        state[index] = entry
    return {**state_dict, "state": state}


def _sendable(value: Any, slots: Mapping[int, Slot]) -> Any:
    """The same memory, as torch.multiprocessing can send it.

    On the CPU, sending moves a tensor's storage into shared memory: so it gets a storage of its
    own, never one that we step on. On a GPU only whole allocations can be sent: so the value
    becomes a view of its segment.
    """
    # Not what a differentiable step or a user made: a capsule cannot hold that.
    if type(value) is not Tensor or value.requires_grad or value.is_meta or is_lazy(value):
        return value
    if value.device.type == "cpu":
        return with_own_storage(value)
    slot = slots.get(id(value))
    return value if slot is None else slot.view_within(value)


class _Saved(NamedTuple):
    """What one parameter number of a state_dict stands for."""

    param: Tensor  # ours
    group: dict[str, Any]  # its saved param group
    source: Recipe  # the checkpoint's
    target: Recipe  # the optimizer's


def _by_number(groups: Groups, saved_groups: Groups) -> dict[Any, _Saved]:
    """Match saved parameters with ours by position, as torch does."""
    numbers: dict[Any, _Saved] = {}
    for group, saved in zip(groups, saved_groups, strict=True):
        source, target = parse(saved.get("precision")), parse(group.get("precision"))
        for number, param in zip(saved["params"], group["params"], strict=True):
            numbers[number] = _Saved(param, saved, source, target)
    return numbers


def load(
    groups: Groups,
    arena: Arena,
    state: State,
    state_dict: Mapping[str, Any],
    always_decoupled: bool,
) -> list[dict[str, Any]]:
    """Copy a checkpoint into the arena, tensor by tensor, and return the new param groups.

    Args:
        groups: the optimizer's param groups, not changed. Their precision stays, and what was saved
            in another one is converted; seed, `cautious` and `ema_decay` are the checkpoint's, if
            it has them.
        arena, state: the optimizer's; state of parameters that the checkpoint lacks is dropped.
        state_dict: torch's form, in any precision; never aliased and never changed.
        always_decoupled: whether weight decay is decoupled whatever the checkpoint says.

    Raises ValueError before anything is written if this is not a state_dict of an optimizer with
    these groups and shapes.
    """
    shapes.refuse("load_state_dict()", [param for group in groups for param in group["params"]])
    check_state_dict(groups, state_dict)
    saved_groups = deepcopy(state_dict["param_groups"])
    numbers = _by_number(groups, saved_groups)
    entries: list[tuple[_Saved, dict[str, Any]]] = []
    others: dict[Any, Any] = {}
    counting_groups: list[dict[str, Any]] = []
    for number, entry in state_dict["state"].items():
        if number not in numbers:
            others[number] = deepcopy(entry)
            continue
        saved = numbers[number]
        if isinstance(entry, Mapping) and entry and "step" not in entry and "step" in saved.group:
            # apex's and TransformerEngine's FusedAdam count steps per group.
            entry = {"step": saved.group["step"], **entry}
            counting_groups.append(saved.group)
        entries.append((saved, _checked_copy(number, entry, saved)))
    # Each parameter counts now. Nothing would advance the group's count, so the next checkpoint
    # would have a wrong one.
    for group in counting_groups:
        group.pop("step", None)
    merged = [_merged(old, new) for old, new in zip(groups, saved_groups, strict=True)]
    for group in merged:
        arguments.check_cautious(group, always_decoupled or group.get("decoupled_weight_decay"))

    # Slots live as long as something holds their tensors: `before` does, until they are filled
    # again. So loading into a running optimizer needs no second copy of the state.
    before = [dict(entry) for entry in state.values() if isinstance(entry, dict)]
    state.clear()
    state.update(others)
    wanted_entries: dict[Tensor, Entries] = {}
    for saved, entry in entries:
        part = local(saved.param).detach()
        kept = {"amsgrad": "max_exp_avg_sq" in entry, "ema": "ema" in entry}
        wanted = saved.target.state(part.dtype, part.shape, **kept)
        if not same_storage(saved.source, saved.target, part, entry):
            if arena.is_streamed(part.device):
                # Before the first step nothing is filled in place, so all that is converted is
                # there at once: the device may have no room for it.
                part, entry = part.to(HOST), _on_host(entry)
            entry = convert(entry, part, saved.target)
        _settle(arena, state, saved.param, entry, wanted)
        if entry:
            wanted_entries[saved.param] = wanted
    arena.adopt(state, wanted_entries, in_place=False)
    del before
    for old, new in zip(merged, saved_groups, strict=True):
        if isinstance(old.get("ema_decay"), Tensor) and new.get("ema_decay") is not None:
            old["ema_decay"].fill_(new["ema_decay"])
    return merged


def _on_host(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with its tensors of ours on the host."""
    return {key: value.to(HOST) if key in ENTRIES else value for key, value in entry.items()}


def _checked_copy(number: object, entry: Any, saved: _Saved) -> dict[str, Any]:
    """This rank's part of a saved entry; only its tensors are not copied yet."""
    entry = dict(entry) if isinstance(entry, Mapping) else entry
    # What a recipe stores does not depend on which of its dtypes a parameter has, so a checkpoint
    # of a bfloat16 model loads into a float32 one.
    weights = saved.source.weights
    dtype = saved.param.dtype if weights is None else WEIGHTS[weights].params[0]
    wanted = saved.source.state(dtype, local(saved.param).shape, amsgrad=True, ema=True)
    check_entry(saved.param, f"parameter {number}", entry, wanted)
    # Copied here, where nothing is written yet: a user's own entry may refuse to be.
    copy = {key: v if isinstance(v, Tensor) else deepcopy(v) for key, v in entry.items()}
    return parts_of_entry(copy, saved.param)


def _without_own(group: Mapping[str, Any]) -> dict[str, Any]:
    """The param group as torch.optim has it."""
    return {key: value for key, value in group.items() if key not in OWN_KEYS}


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The saved group with our parameters, their names and precision.

    Seed, `cautious` and `ema_decay` are the saved ones, and ours if the checkpoint has none.
    """
    merged = _without_own(new)
    merged |= {key: old[key] for key in OWN_KEYS if key in old}
    seed = as_seed(new.get("seed", 0))
    merged |= {"seed": seed} if "seed" in old and "seed" in new else {}
    merged |= {"cautious": new["cautious"]} if "cautious" in new else {}
    if "ema_decay" in new:
        saved_decay = arguments.as_ema_decay(new["ema_decay"])
        # A tensor of ours stays, because its user goes on changing it: `load` writes into it.
        if saved_decay is None or not isinstance(old.get("ema_decay"), Tensor):
            merged["ema_decay"] = saved_decay
    if "param_names" in old:
        merged.setdefault("param_names", old["param_names"])
    return {**merged, "params": old["params"]}


def names_of(group: Mapping[str, Any]) -> Sequence[Any]:
    """The names of a group's parameters; their positions if names and parameters do not match.

    They do not where somebody has edited `group["params"]` alone.
    """
    names = group.get("param_names", ())
    return names if len(names) == len(group["params"]) else range(len(group["params"]))


def keys_of(groups: Groups) -> dict[Tensor, str | int]:
    """What each parameter is called: its name, or its position where it has none of its own.

    Two models in one optimizer may both have a "weight". Positions count over all groups, as the
    numbers of a state_dict do.
    """
    params = [param for group in groups for param in group["params"]]
    names = [name for group in groups for name in names_of(group)]
    name_of = dict(zip(params, names, strict=True))
    uses = Counter(name_of.values())
    keys: dict[Tensor, str | int] = {}
    for position, (param, name) in enumerate(zip(params, names, strict=True)):
        keys[param] = name if isinstance(name, str) and uses[name] == 1 else position
    return keys


def export_fp32(groups: Groups, state_dict: dict[str, Any], arena: Arena) -> dict[str, Any]:
    """Weights by name or position, and a state_dict in torch's form: all float32 copies.

    They are on the parameters' devices, or on the host if that is where `arena` has state: the
    device may have no room for all of it.

    Returns `{"params": {name: weight}, "state": state_dict}`.
    """
    weights: dict[Any, Tensor] = {}
    state: dict[Any, Any] = {}
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    keys = keys_of(groups)
    params = [param for group in groups for param in group["params"]]
    for number, param in zip(numbers, params, strict=True):
        parts = parts_of_entry(state_dict["state"].get(number, {}), param)
        part = local(param).detach()
        if arena.is_streamed(part.device):
            part = part.to(HOST)
        # Offloaded state is on the host.
        entry = {key: v.to(part.device) if key in ENTRIES else v for key, v in parts.items()}
        values = decode(entry, part)
        weight = values.pop("master_weight", None)
        if weight is None:
            weight = widened(part)
        elif "master_weight" in entry:  # as the next step will see it
            weight = codecs.load_weight("master32", part, weight)
        weights[keys[param]] = to_dtensor(param, "param", weight.clone())
        if entry:
            moments = {key: to_dtensor(param, key, v.clone()) for key, v in values.items()}
            others = {key: value for key, value in entry.items() if key not in ENTRIES}
            state[number] = {**others, **moments}
    groups_of_torch = [_without_own(group) for group in state_dict["param_groups"]]
    torch_state = {"state": state, "param_groups": groups_of_torch}
    return {"params": weights, "state": exported(torch_state, Arena())}


def _settle(
    arena: Arena, state: State, param: Tensor, entry: dict[str, Any], wanted: Entries
) -> None:
    """Put a saved entry into `state`, copied into our memory where the parameter has some.

    The rest is for `Arena.adopt`.
    """
    param_state = arena.param_states.get(param, ParamState())
    own: dict[str, Any] = {}
    for key, value in entry.items():
        # One object per name, as before the first checkpoint: so the next one has the same bytes,
        # which pickle makes of references to it.
        key = sys.intern(key) if type(key) is str else key
        view = param_state.view(key)
        if key == "step":
            value = float(value)  # waits for its device, if it has one
            if view is not None and param_state.holds_step(view, local(param).device):
                value = view.fill_(value)
        elif key in wanted:
            if view is not None and param_state.holds(key, view, wanted[key].dtype):
                param_state.fill(key, value)
                value = view
        elif isinstance(value, Tensor):  # not ours: on the parameter's device, as torch has it
            value = value.to(device=param.device, copy=True)
        own[key] = value
    state[param] = own
