"""Optimizer state to host memory and back, segment by segment. Not when that is allowed; no
arithmetic, no kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..distributed import local, to_dtensor
from ..precision import ENTRIES
from .arena import Arena, ParamState, State
from .memory import Slot

Origins = dict[
    Tensor, torch.device
]  # segments that are on the host now -> the devices they came from


def host_memory(tensor: Tensor) -> Tensor | None:
    """Pinned memory for the tensor's values; None where they are on the host already, and stay."""
    if tensor.device.type == "cpu":
        return None
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def to_host(arena: Arena, state: State, origins: Origins) -> None:
    """Move all state but the step counters to the host, with one copy per segment, and wait for it.

    Args:
        arena, state: the optimizer's. Views that stand in `state` are replaced; tensors of others,
            which the next step would copy into the arena, are replaced one by one, and that step
            takes them from the host.
        origins: what was moved before, not moved again; what is moved now is added.

    Nothing is changed if memory runs out.
    """
    copies = {segment: _copied(segment) for segment in _segments(arena) if segment not in origins}
    redistributed = {segment: copy for segment, copy in copies.items() if copy is not None}
    strangers = [(entry, key, _copied(entry[key])) for entry, key in _strangers(arena, state)]
    origins |= {copy: segment.device for segment, copy in redistributed.items()}
    _replace(arena, state, redistributed)
    for entry, key, copy in strangers:
        if copy is not None:
            entry[key] = copy


def to_devices(arena: Arena, state: State, origins: Origins) -> None:
    """Move state back to where it came from, with one copy per segment, in the order of the current
    stream.

    Nothing is changed if memory runs out.
    """
    redistributed = {
        # Does not wait: torch's allocator keeps pinned memory until the copy from it is done.
        segment: torch.empty_like(segment, device=origins[segment]).copy_(
            segment, non_blocking=True
        )
        for segment in _segments(arena)
        if segment in origins
    }
    _replace(arena, state, redistributed)


def _copied(tensor: Tensor) -> Tensor | None:
    memory = host_memory(tensor)
    return None if memory is None else memory.copy_(tensor)


def _segments(arena: Arena) -> list[Tensor]:
    """Each segment once."""
    return list(
        dict.fromkeys(
            slot.segment
            for param_state in arena.param_states.values()
            for slot in param_state.slots.values()
        )
    )


def _strangers(arena: Arena, state: State) -> Iterator[tuple[dict[str, Any], str]]:
    """Entries and names of tensors that are state but not ours: set by the user, or just unpickled."""
    for param, entry in state.items():
        param_state = (
            arena.param_states.get(param, ParamState())
            if isinstance(param, Tensor)
            else ParamState()
        )
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if key in ENTRIES and isinstance(value, Tensor) and value is not param_state.view(key):
                yield entry, key


def _replace(arena: Arena, state: State, redistributed: dict[Tensor, Tensor]) -> None:
    """Let every slot of these segments be the same one of the segment's copy."""
    for param, param_state in arena.param_states.items():
        entry = state.get(param, {})
        for key, slot in list(param_state.slots.items()):
            if slot.segment in redistributed:
                _put(
                    param,
                    entry,
                    param_state,
                    key,
                    Slot(redistributed[slot.segment], slot.start, slot.numel),
                )
    arena.state_moves += bool(redistributed)


def _put(
    param: Tensor, entry: dict[str, Any], param_state: ParamState, key: str, slot: Slot
) -> None:
    """Give the parameter this slot; what somebody else has put into its entry stays."""
    before = param_state.view(key)
    if before is None:
        return
    # Shaped as before, not as the parameter is now: whether its layout has changed is for the next
    # step to see.
    view = to_dtensor(param, key, slot.view(local(before)))
    if entry.get(key) is before:
        param_state.slots[key] = slot
        param_state.put(key, view)
        entry[key] = view
