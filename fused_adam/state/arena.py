"""Every parameter's state entries, as views of its slots. Neither arithmetic nor checks here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import group_elements, local, local_as_stored, to_dtensor, to_local
from ..numerics.codecs import load_weight, weights_of
from ..precision import GROUP, GROUPED, EntrySpec
from .memory import (
    Slot,
    align,
    as_flat,
    as_real,
    dense_layout,
    is_apart,
    pinned_zeros,
    segments,
)
from .param_state import Counters, ParamState

Entries = dict[str, EntrySpec]  # what one parameter's state consists of, besides the step counter
State = MutableMapping[Any, Any]  # `optimizer.state`: parameter -> its entry, a dict
Groups = Sequence[dict[str, Any]]  # `optimizer.param_groups`
Params = Sequence[Tensor]  # parameters of one optimizer, in its order

HOST = torch.device("cpu")


Owner = tuple[Tensor, str]  # a parameter, and the name of one of its entries


class _MemoryRange(NamedTuple):
    """Addresses of one tensor's memory; `owner` is None where the memory is ours already."""

    start: int
    end: int
    owner: Owner | None


class Arena:
    """The flat state of one optimizer.

    The arena gives parameters memory and remembers which tensor of `state` lies where. Segments
    live as long as an entry of `state` uses them. A tensor that the user put into `state` is
    stepped on where it is, if we would have stored it alike; else its values are copied into memory
    of ours.

    Args:
        on_host: whether all state but the step counters lies in pinned memory of the host. Then
            everything that the user puts into `state` is copied, because only segments of ours can
            be streamed to the device in large copies.
    """

    def __init__(self, on_host: bool = False) -> None:
        self.on_host = on_host
        self.param_states: dict[Tensor, ParamState] = {}
        self.counters: list[Counters] = []  # ours
        # How often state has moved after it was first stored: older plans have stale addresses.
        self.state_moves = 0
        # Whether the entries of `state` were just unpickled. Nobody holds such tensors, so they are
        # copied into segments instead of being stepped on one by one.
        self.unpickled = False

    def keep(self, params: Params) -> None:
        """Forget parameters that the optimizer no longer has."""
        known = set(map(id, params))
        for param in [param for param in self.param_states if id(param) not in known]:
            del self.param_states[param]

    def is_streamed(self, device: torch.device) -> bool:
        """Whether state of parameters on this device lies on the host."""
        return self.on_host and is_apart(device)

    def adopt(self, state: State, wanted: Mapping[Tensor, Entries], in_place: bool = True) -> None:
        """Give every parameter its state.

        What stands in `state` is used or copied. What is missing begins as zeros, a master weight
        as a copy of its parameter. Averages are filled by `begin_averages`.

        Args:
            state: the optimizer's state; entries are created, or get our views in place of what
                cannot be used.
            wanted: parameters of any device and dtype, and what each one stores.
            in_place: whether tensors that stand in `state` may be used where they are.

        Call `validate.check_entry` first, so that only memory can run out here. If it does, entries
        that were empty are empty again, and others are whole.
        """
        empty = [param for param in wanted if not state.get(param)]
        try:
            self._adopt(state, wanted, in_place)
        except BaseException:
            for param in empty:
                state.pop(param, None)
            raise

    def _adopt(self, state: State, wanted: Mapping[Tensor, Entries], in_place: bool) -> None:
        usable = self._usable(state, wanted) if in_place else {}
        missing: dict[tuple[str, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        steps: dict[torch.device, list[Tensor]] = defaultdict(list)
        state_moved = False
        dicts: set[int] = set()
        for param, entries in wanted.items():
            entry = state.setdefault(param, {})
            # One dict for several parameters, as `dict.fromkeys(params, {})` makes: part them.
            if id(entry) in dicts:
                entry = state[param] = {**entry}
            dicts.add(id(entry))
            param_state = self.param_states.setdefault(param, ParamState())
            param_state.stored = entries.keys()
            self._note_layout(param, param_state)
            device = local(param).device
            had_state = param_state.counters is not None
            for key, spec in entries.items():
                if param_state.holds(key, entry.get(key), spec.dtype):
                    continue
                state_moved = state_moved or had_state
                part = usable.get((param, key))
                if part is None:
                    missing[key, spec.dtype, device].append(param)
                else:
                    flat = as_flat(as_real(part))
                    param_state.slots[key] = Slot(flat, 0, flat.numel())
                    param_state.put(key, entry[key])
            if not param_state.holds_step(entry.get("step"), device):
                state_moved = state_moved or had_state
                counter = usable.get((param, "step"))
                if counter is None:
                    steps[device].append(param)
                else:
                    param_state.counters = Counters(as_flat(counter), ours=False)
                    # Others may write to it unseen, so no other parameter has an equal key.
                    param_state.counter, param_state.step_key = 0, object()
                    param_state.put("step", entry["step"])
        self.state_moves += state_moved
        for device, params in steps.items():
            self._make_counters(state, params, device)
        asked = sum(
            sum(map(align, _numels(params, key))) // _share(key) * dtype.to_real().itemsize
            for (key, dtype, device), params in missing.items()
            if self.is_streamed(device)
        )
        for (key, dtype, device), params in missing.items():
            zeros: Callable[..., Tensor] = torch.zeros
            if self.is_streamed(device):
                device, zeros = HOST, partial(pinned_zeros, asked=asked)
            self._make_slots(state, params, key, dtype, device, zeros)
        for param in {param for params in [*missing.values(), *steps.values()] for param in params}:
            _put_in_order(state[param], wanted[param])
        used = {id(param_state.counters) for param_state in self.param_states.values()}
        self.counters = [c for c in self.counters if id(c) in used]
        self.unpickled = False

    @staticmethod
    def _note_layout(param: Tensor, param_state: ParamState) -> None:
        """Forget the slots of a parameter that was moved, or got another memory format.

        Its entries are then copied by value into other slots. Step counters have no layout.
        """
        layout = (local(param).device, dense_layout(local(param))[1])
        if param_state.layout != layout:
            param_state.layout = layout
            param_state.refs = {key: ref for key, ref in param_state.refs.items() if key == "step"}

    def _usable(self, state: State, wanted: Mapping[Tensor, Entries]) -> dict[Owner, Tensor]:
        """Local tensors that the user put into `state` and that can be stepped on in place."""
        candidates: dict[Owner, Tensor] = {}
        ranges: list[_MemoryRange] = []
        for param, entries in wanted.items():
            entry, param_state = state.get(param, {}), self.param_states.get(param, ParamState())
            dtypes = {"step": torch.float32} | {key: spec.dtype for key, spec in entries.items()}
            for key, dtype in dtypes.items():
                value = entry.get(key)
                if not isinstance(value, Tensor):
                    continue
                if key == "step":
                    is_ours = param_state.holds_step(value, value.device)
                else:
                    is_ours = param_state.holds(key, value, dtype)
                # Of unpickled tensors, only those in shared memory have another holder.
                if is_ours:
                    part: Tensor | None = local(value)
                elif key != "step" and self.is_streamed(local(param).device):
                    part = None
                elif self.unpickled and not local(value).is_shared():  # type: ignore[no-untyped-call]
                    part = None
                else:
                    part = _usable_in_place(param, key, value, dtype)
                if part is not None:
                    owner = None if is_ours else (param, key)
                    if owner:
                        candidates[owner] = part
                    start = part.data_ptr()
                    ranges.append(_MemoryRange(start, start + part.numel() * part.itemsize, owner))
        if candidates:
            for owner in _overlapping(ranges):
                del candidates[owner]
        return candidates

    def _make_counters(self, state: State, params: Params, device: torch.device) -> None:
        """One buffer of step counters for these parameters, with the counts of their entries."""
        entries = [state[param] for param in params]
        # Reading a counter waits for its device. It happens once, and only for counters that were
        # loaded or set by the user.
        counts = [float(entry.get("step", 0)) for entry in entries]
        counters = Counters(torch.zeros(len(counts), dtype=torch.float32, device=device))
        if any(counts):
            counters.steps.copy_(torch.tensor(counts, dtype=torch.float32, device="cpu"))
        self.counters.append(counters)
        for i, (param, entry, count) in enumerate(zip(params, entries, counts, strict=True)):
            view, param_state = counters.steps[i], self.param_states[param]
            param_state.counters, param_state.counter, param_state.step_key = counters, i, count
            param_state.put("step", view)
            entry["step"] = view
        counters.note()

    def _make_slots(
        self,
        state: State,
        params: Params,
        key: str,
        dtype: torch.dtype,
        device: torch.device,
        zeros: Callable[..., Tensor],
    ) -> None:
        """Slots for one entry of these parameters, with the values of that entry."""
        owners = iter(params)
        numels = _numels(params, key)
        for slots in segments(numels, dtype.to_real(), device, _share(key), zeros):
            for slot in slots:
                self._move_in(state, next(owners), key, slot)

    def _move_in(self, state: State, param: Tensor, key: str, slot: Slot) -> None:
        param_state, part, entry = self.param_states[param], local(param).detach(), state[param]
        view = to_dtensor(param, key, slot.flat() if key in GROUPED else slot.view(part))
        param_state.slots[key] = slot
        param_state.put(key, view)
        if entry.get(key) is not None:
            param_state.fill(key, to_local(param, key, entry[key]))
        elif key == "master_weight":
            param_state.fill(key, part)
        elif key == "ema":
            param_state.refs[key].fresh_version = local(view)._version
        entry[key] = view

    def begin_averages(self, state: State, params: Iterable[Tensor], stepped: bool) -> None:
        """Copy weights into the averages that nobody has used or written to since they were made.

        Args:
            stepped: whether a step follows. Until then weights may be loaded, so the first step
                copies once more what `init_state()` has copied.
        """
        for param in params:
            param_state = self.param_states[param]
            ref = param_state.refs.get("ema")
            view = None if ref is None else ref()
            if ref is None or view is None or ref.fresh_version is None:
                continue
            if local(view)._version == ref.fresh_version:
                param_state.fill("ema", _unrounded_weight(param, state[param]))
            ref.fresh_version = None if stepped else local(view)._version

    def counters_unchanged(self) -> bool:
        """Whether nobody but us has written to a step counter since the last step."""
        return all(c.unchanged() for c in self.counters)

    def read_counters(self) -> None:
        """Learn the values of counters that somebody else wrote to. Waits for their device."""
        values = {id(c): c.steps.tolist() for c in self.counters if not c.unchanged()}
        for param_state in self.param_states.values():
            if id(param_state.counters) in values:
                param_state.step_key = values[id(param_state.counters)][param_state.counter]
        self.note_counters()

    def note_counters(self) -> None:
        """Take the counters as they are now for our own work."""
        for c in self.counters:
            c.note()


def _share(key: str) -> int:
    """How many elements of a parameter have one element of the entry in common."""
    return GROUP if key in GROUPED else 1


def _numels(params: Params, key: str) -> list[int]:
    """How many elements of each parameter an entry is for."""
    if key in GROUPED:
        return [group_elements(param) for param in params]
    return [as_real(local(param)).numel() for param in params]


def _usable_in_place(param: Tensor, key: str, value: Tensor, dtype: torch.dtype) -> Tensor | None:
    """This rank's part of a state entry if its dtype, device and layout are as ours; else None."""
    part = local_as_stored(param, key, value)
    mine = local(param)
    if part is None or not _is_writable(part) or part.dtype != dtype or part.device != mine.device:
        return None
    if key == "step":
        fits = part.numel() == 1
    elif key in GROUPED:
        fits = part.is_contiguous() and part.numel() == -(-group_elements(param) // GROUP)
    else:
        fits = part.shape == mine.shape and part.stride() == dense_layout(mine)[1]
    return part if fits else None


def _is_writable(value: Tensor) -> bool:
    """Whether kernels and plain torch may write to the tensor's memory in place."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_conj() or value.is_neg() or value.is_inference())
    )


def _overlapping(ranges: Iterable[_MemoryRange]) -> Iterable[Owner]:
    """Owners whose memory overlaps another entry's: both would race if stepped on in place.

    What is ours stays, else the first of them.
    """
    end, holder = 0, None
    for memory in sorted(ranges, key=lambda memory: (memory.start, memory.end)):
        if memory.start < end and memory.owner:
            yield memory.owner
            continue
        if memory.start < end and holder:
            yield holder
        end, holder = memory.end, memory.owner


def _unrounded_weight(param: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """This rank's part of the weight, with what a recipe stores of it next to the parameter."""
    part = local(param).detach()
    for key in ("master_weight", "remainder"):
        if entry.get(key) is not None:
            extra = to_local(param, key, entry[key]).to(part.device)
            return load_weight(weights_of(extra), part, extra)
    return part


def _put_in_order(entry: dict[str, Any], wanted: Entries) -> None:
    """Give an entry torch's order: the step first, then as listed. Some read state by position."""
    first = {key: entry[key] for key in ("step", *wanted)}
    if list(entry)[: len(first)] != list(first):
        others = {key: value for key, value in entry.items() if key not in first}
        entry.clear()
        entry.update(first | others)
