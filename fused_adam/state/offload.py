"""Optimizer state to host memory and back, one copy per segment. No arithmetic, no kernels.

When that is allowed is for the optimizer to decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import local, to_dtensor
from ..precision import ENTRIES
from .arena import Arena, State
from .memory import Slot
from .param_state import ParamState

# Segments that are on the host now -> the devices they came from.
Origins = dict[Tensor, torch.device]


class _HostCopy(NamedTuple):
    """A state tensor that is not ours, and its copy on the host."""

    entry: dict[str, Any]
    key: str
    copy: Tensor


def host_memory(tensor: Tensor) -> Tensor | None:
    """Pinned memory for the tensor's values; None if they are on the host already, and stay."""
    if tensor.device.type == "cpu":
        return None
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def to_host(arena: Arena, state: State, origins: Origins) -> None:
    """Move all state but the step counters to the host, and wait for it.

    Args:
        arena, state: the optimizer's. Views that stand in `state` are replaced. Tensors of others
            are replaced one by one; the next step on the device copies them into the arena.
        origins: segments that are on the host already, and are not moved again; those moved now are
            added.

    Nothing is changed if memory runs out.
    """
    copies = {
        segment: copy
        for segment in _segments(arena)
        if segment not in origins and (copy := _host_copy(segment)) is not None
    }
    foreign = list(_foreign_copies(arena, state))
    # Everything is copied: from here on, nothing can run out of memory.
    origins |= {copy: segment.device for segment, copy in copies.items()}
    _replace(arena, state, copies)
    for entry, key, copy in foreign:
        entry[key] = copy


def to_devices(arena: Arena, state: State, origins: Origins) -> None:
    """Move state back to where it came from, in the order of the current stream.

    Nothing is changed if memory runs out.
    """
    copies = {}
    for segment in _segments(arena):
        if segment in origins:
            memory = torch.empty_like(segment, device=origins[segment])
            # Does not wait: torch's allocator keeps pinned memory until the copy from it is done.
            copies[segment] = memory.copy_(segment, non_blocking=True)
    _replace(arena, state, copies)


def _host_copy(tensor: Tensor) -> Tensor | None:
    memory = host_memory(tensor)
    return None if memory is None else memory.copy_(tensor)


def _segments(arena: Arena) -> list[Tensor]:
    """Each segment once."""
    param_states = arena.param_states.values()
    return list(dict.fromkeys(slot.segment for s in param_states for slot in s.slots.values()))


def _foreign_copies(arena: Arena, state: State) -> Iterator[_HostCopy]:
    """Copies of state tensors that are not ours: set by the user, or just unpickled."""
    for param, entry in state.items():
        if not isinstance(entry, dict):
            continue
        # `state` may have keys that are no parameters: a user's own, or those of a checkpoint.
        known = arena.param_states.get(param) if isinstance(param, Tensor) else None
        param_state = known or ParamState()
        for key, value in entry.items():
            if key in ENTRIES and isinstance(value, Tensor) and value is not param_state.view(key):
                copy = _host_copy(value)
                if copy is not None:
                    yield _HostCopy(entry, key, copy)


def _replace(arena: Arena, state: State, copies: dict[Tensor, Tensor]) -> None:
    """Let every slot of these segments be the same slot of the segment's copy.

    Except where somebody else has put another tensor into the parameter's entry.
    """
    for param, param_state in arena.param_states.items():
        entry = state.get(param, {})
        for key, slot in list(param_state.slots.items()):
            before = param_state.view(key)
            if slot.segment in copies and before is not None and entry.get(key) is before:
                copy = Slot(copies[slot.segment], slot.start, slot.numel)
                # Shaped as before, not as the parameter is now: whether its layout has changed is
                # for the next step to see.
                view = to_dtensor(param, key, copy.view(local(before)))
                param_state.slots[key] = copy
                param_state.put(key, view)
                entry[key] = view
    arena.state_moves += bool(copies)
