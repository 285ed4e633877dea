"""Flat state: segments, the slots in them, and each parameter's views. No arithmetic on moments
here.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..distributed import group_elements, local, local_as_stored, to_dtensor, to_local
from ..precision import ENTRIES, GROUP, GROUPED
from .memory import Slot, as_flat, as_real, dense_layout, segments

Entries = dict[
    str, tuple[torch.dtype, torch.Size]
]  # of one parameter's state, by name: dtype and shape
State = MutableMapping[Any, Any]  # `optimizer.state`: parameter -> its entry, a dict

# AMSGrad and precision may be switched on later: the maximum begins at 0, the weight as a copy of
# its parameter.
BEGINS_LATER = ("max_exp_avg_sq", "master_weight", "remainder")


def _copies(value: Tensor, dtype: torch.dtype, param: Tensor) -> bool:
    """Whether the tensor's values can be copied into state of this dtype: before anything is
    written.
    """
    plain = (
        value.layout == torch.strided
        and not value.is_quantized
        and (param.is_meta or not value.is_meta)
    )
    return plain and (dtype.is_complex or not value.is_complex())


def reads_cost_nothing(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


class StateRef(weakref.ref[Tensor]):
    """A tensor that stands in `optimizer.state`, not kept alive: when its last holder lets go of
    it, so does its slot.

    Frameworks move state to the host by replacing entry after entry (`entry[key] =
    entry[key].to("cpu")`). The memory it leaves has to be free at once, not at the next step.
    """

    __slots__ = ("key", "param_state")

    def __new__(cls, tensor: Tensor, param_state: ParamState, key: str) -> StateRef:
        return super().__new__(cls, tensor, _let_slot_go)

    def __init__(self, tensor: Tensor, param_state: ParamState, key: str) -> None:
        super().__init__(tensor, _let_slot_go)  # type: ignore[call-arg]
        self.param_state, self.key = weakref.ref(param_state), key


def _let_slot_go(ref: Any) -> None:
    param_state = ref.param_state()
    if param_state is not None and param_state.refs.get(ref.key) is ref:
        del param_state.refs[ref.key]
        param_state.slots.pop(ref.key, None)


@dataclass(slots=True, eq=False)
class Counters:
    """Step counters of one device: float32, shape (C,).

    Ours are one buffer for many parameters: entries of `state` are views, so they share its
    version. A counter that the user put into `state` is a buffer of one.
    """

    steps: Tensor
    version: int = -1  # of `steps`, after our own last write
    ours: bool = True
    values: Tensor | None = None  # on the CPU, what our own last write left there

    def unchanged(self) -> bool:
        """Whether nobody else has written to them since `note`, as far as one can tell without
        waiting.
        """
        # `step.data` and arrays over the memory count no version. On the CPU the values tell, in 2
        # us.
        return self.steps._version == self.version and (
            self.values is None or torch.equal(self.steps, self.values)
        )

    def note(self) -> None:
        """Take the counts as they are now for our own work."""
        self.version = self.steps._version
        if reads_cost_nothing(self.steps):
            self.values = (
                self.steps.clone() if self.values is None else self.values.copy_(self.steps)
            )


@dataclass(slots=True, eq=False, weakref_slot=True)
class ParamState:
    """Where one parameter's state lives: its slots, the tensors that stand in `state`, its step
    counter.

    A slot is in an arena's segment, or is a whole tensor that the user put into `state`.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    refs: dict[str, StateRef] = field(default_factory=dict)
    counters: Counters | None = None
    counter: int = 0
    stored: Collection[str] = ()  # the names of what the last step stored, besides the step counter
    layout: object = None  # the device that the slots are on, and the order of elements they are in
    # Counters of equal age have equal values: the value itself, or a token given to those that
    # moved on together.
    step_key: object = 0.0

    def view(self, key: str) -> Tensor | None:
        """The tensor that was put into `state`, if anybody still has it."""
        ref = self.refs.get(key)
        return None if ref is None else ref()

    def put(self, key: str, view: Tensor) -> None:
        self.refs[key] = StateRef(view, self, key)

    def holds(self, key: str, value: Any, dtype: torch.dtype) -> bool:
        """Whether `value` is the tensor that we step on, still over the same memory and of the
        dtype wanted.
        """
        view = self.view(key)
        if view is None or value is not view or view.dtype != dtype:
            return False
        return local(view).data_ptr() == self.slots[key].address

    def fill(self, key: str, value: Tensor) -> None:
        """Copy what is here of a value into the entry's memory."""
        view = self.view(key)
        assert view is not None
        part = local(view)
        if key in GROUPED:
            part = part.view(-1)[: len(value)]
        part.copy_(value)

    def holds_step(self, value: Any, device: torch.device) -> bool:
        """The same for the step counter."""
        view = self.view("step")
        if self.counters is None or view is None or value is not view:
            return False
        return view.device == device and view.data_ptr() == self.step_address

    @property
    def step_address(self) -> int:
        assert self.counters is not None
        return self.counters.steps.data_ptr() + 4 * self.counter


def _lies_as_stored(param: Tensor, key: str, value: Any, dtype: torch.dtype) -> Tensor | None:
    """What is here of a state tensor, if it can be stepped on where it is: dtype, device and layout
    as we make them.
    """
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


def _is_writable(value: object) -> bool:
    """Whether kernels and plain torch may write to the tensor's memory in place."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided  # type: ignore[attr-defined]
        and not (value.is_conj() or value.is_neg() or value.is_inference())  # type: ignore[attr-defined]
    )


def _put_in_order(entry: dict[str, Any], wanted: Entries) -> None:
    """Give an entry torch's order: the step first, then as listed. Some read state by position."""
    first = {key: entry[key] for key in ("step", *wanted)}
    if list(entry)[: len(first)] != list(first):
        others = {key: value for key, value in entry.items() if key not in first}
        entry.clear()
        entry.update(first | others)


class Arena:
    """The flat state of one optimizer.

    Holds the memory that it made, as long as an entry of `state` uses it. What the user put into
    `state` is stepped on where it is, if that is how we would have stored it; anything else is
    copied into memory of ours.
    """

    def __init__(self) -> None:
        self.param_states: dict[Tensor, ParamState] = {}
        self.counters: list[Counters] = []  # ours
        self.state_moves = (
            0  # how often state that was here has moved: tables made before are stale
        )
        # Whether what stands in `state` was just unpickled: nobody put it there, so it moves into
        # segments.
        self.unpickled = False

    def keep(self, params: Sequence[Tensor]) -> None:
        """Let go of parameters that the optimizer no longer has."""
        known = set(map(id, params))
        self.param_states = {
            param: param_state
            for param, param_state in self.param_states.items()
            if id(param) in known
        }

    def check(
        self,
        param: Tensor,
        name: str,
        entry: Mapping[str, Any],
        wanted: Entries,
        stored: Collection[str] = (),
    ) -> None:
        """Raise ValueError if the entry is not the whole state of this parameter, stored as
        `wanted`.

        What can begin later may be missing, if it is not among the names that are `stored` already.
        """
        if not entry:
            return  # made at the first step
        foreign = [
            key for key in ENTRIES if key in entry and key not in wanted and key != "max_exp_avg_sq"
        ]
        if foreign:
            raise ValueError(
                f"state of {name} has {foreign[0]!r}, which its precision does not store: a recipe is chosen before "
                "training; to change it, load the state_dict into an optimizer that has the other one"
            )
        lacks = [
            key
            for key in ("step", *wanted)
            if entry.get(key) is None and (key in stored or key not in BEGINS_LATER)
        ]
        if lacks:
            raise ValueError(
                f"state of {name} has {', '.join(map(repr, entry))}, but lacks {', '.join(map(repr, lacks))}: it is "
                "not the whole state of an Adam; an entry that is deleted or empty starts anew"
            )
        for key, (dtype, shape) in wanted.items():
            value = entry.get(key)
            if isinstance(value, Tensor):
                value = to_local(param, key, value)
            if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
                got = (
                    f"shape {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else f"{type(value).__name__}"
                )
                raise ValueError(
                    f"state {key!r} of {name} has {got}, but must be a tensor of shape {tuple(shape)}"
                )
            if value is not None and not _copies(value, dtype, param):
                got = f"a {value.layout} tensor of {value.dtype} on {value.device}"
                raise ValueError(
                    f"state {key!r} of {name} is {got}, but must be a dense tensor with values of {dtype}"
                )
            if (
                value is not None
                and value.dtype != dtype
                and not (dtype.is_floating_point or dtype.is_complex)
            ):
                # Codes and remainders are bits, which no conversion keeps.
                raise ValueError(
                    f"state {key!r} of {name} has dtype {value.dtype}, but its precision stores {dtype}"
                )
        step = entry["step"]
        if isinstance(step, Tensor):
            number = step.numel() == 1 and _copies(step, torch.float32, param)
        else:
            number = isinstance(step, Real)
        if not number:
            raise ValueError(
                f"state 'step' of {name} is {step!r}, but must be one real number, as a tensor or plain"
            )
        param_state = self.param_states.get(param)
        if param_state and param_state.holds_step(step, local(param).device):
            step = (
                param_state.step_key if isinstance(param_state.step_key, float) else 0
            )  # ours: read when somebody else has written to it
        # Reading a counter of another device would wait for it.
        if not (isinstance(step, Tensor) and step.device.type != "cpu") and not 0 <= float(
            step
        ) < float("inf"):
            raise ValueError(
                f"state 'step' of {name} is {float(step)}, but must be a finite number >= 0"
            )

    def adopt(self, state: State, wanted: Mapping[Tensor, Entries], in_place: bool = True) -> None:
        """Give every parameter its state: zeros where there is none; what stands there is used or
        copied.

        A master weight begins as a copy of its parameter.

        Args:
            state: the optimizer's state; entries are created, or get our views in place of what
                cannot be used.
            wanted: parameters of any device and dtype; for each the names of its entries, besides
                `step`.
            in_place: whether what stands there may be used where it is.

        Call `check` first. Only memory may run out then: entries that were empty are so again, and
        others whole.
        """
        empty = [param for param in wanted if not state.get(param)]
        try:
            self._adopt(state, wanted, in_place)
        except BaseException:
            for param in empty:
                state.pop(param, None)
            raise

    def _adopt(self, state: State, wanted: Mapping[Tensor, Entries], in_place: bool) -> None:
        missing: dict[tuple[str, torch.dtype, torch.device], list[Tensor]] = {}
        steps: dict[torch.device, list[Tensor]] = {}
        usable = self._usable(state, wanted) if in_place else {}
        redistributed = False
        dicts: set[int] = set()
        for param, entries in wanted.items():
            entry = state.setdefault(param, {})
            if (
                id(entry) in dicts
            ):  # one dict for several parameters, as `dict.fromkeys(params, {})` makes
                entry = state[param] = {**entry}
            dicts.add(id(entry))
            param_state = self.param_states.setdefault(param, ParamState())
            param_state.stored = entries.keys()
            device = local(param).device
            layout = (device, dense_layout(local(param))[1])
            if (
                param_state.layout != layout
            ):  # the parameter moved, or has another memory format: by value into other slots
                param_state.layout = layout
                param_state.refs = {
                    key: ref for key, ref in param_state.refs.items() if key == "step"
                }
            for key, (dtype, _) in entries.items():
                if param_state.holds(key, entry.get(key), dtype):
                    continue
                redistributed = redistributed or param_state.counters is not None
                part = usable.get((param, key))
                if part is None:
                    missing.setdefault((key, dtype, device), []).append(param)
                else:
                    param_state.slots[key] = Slot(
                        as_flat(as_real(part)), 0, part.numel() * (2 if part.is_complex() else 1)
                    )
                    param_state.put(key, entry[key])
            if not param_state.holds_step(entry.get("step"), device):
                redistributed = redistributed or param_state.counters is not None
                counter = usable.get((param, "step"))
                if counter is None:
                    steps.setdefault(device, []).append(param)
                else:
                    # Others may write to it, unseen: so no other parameter is known to have the
                    # same count.
                    param_state.counters, param_state.counter, param_state.step_key = (
                        Counters(as_flat(counter), ours=False),
                        0,
                        object(),
                    )
                    param_state.put("step", entry["step"])
        self.state_moves += redistributed
        for device, owners in steps.items():
            self._make_counters(state, owners, device)
        for (key, dtype, device), owners in missing.items():
            numels = [
                group_elements(param) if key in GROUPED else as_real(local(param)).numel()
                for param in owners
            ]
            group = GROUP if key in GROUPED else 1
            slots = (
                slot
                for segment in segments(numels, dtype.to_real(), device, group)
                for slot in segment
            )
            for param, slot in zip(owners, slots, strict=True):
                self._move_in(state[param], param, key, slot)
        for param in {param for owners in [*missing.values(), *steps.values()] for param in owners}:
            _put_in_order(state[param], wanted[param])
        used = {id(param_state.counters) for param_state in self.param_states.values()}
        self.counters = [c for c in self.counters if id(c) in used]
        self.unpickled = False

    def _usable(
        self, state: State, wanted: Mapping[Tensor, Entries]
    ) -> dict[tuple[Tensor, str], Tensor]:
        """What the user put into `state` and can be stepped on where it is: what is here of it."""
        candidates: dict[tuple[Tensor, str], Tensor] = {}
        ranges: list[
            tuple[int, int, tuple[Tensor, str] | None]
        ] = []  # of addresses; of what is ours, without a name
        for param, entries in wanted.items():
            entry, param_state = state.get(param, {}), self.param_states.get(param, ParamState())
            for key, dtype in [
                ("step", torch.float32),
                *((key, dtype) for key, (dtype, _) in entries.items()),
            ]:
                value = entry.get(key)
                if not isinstance(value, Tensor):
                    continue
                name = None
                if (
                    param_state.holds_step(value, value.device)
                    if key == "step"
                    else param_state.holds(key, value, dtype)
                ):
                    part: Tensor | None = local(value)
                elif self.unpickled and not local(value).is_shared():  # type: ignore[no-untyped-call]
                    part = None
                else:
                    part, name = _lies_as_stored(param, key, value, dtype), (param, key)
                if part is None:
                    continue
                if name:
                    candidates[name] = part
                ranges.append(
                    (part.data_ptr(), part.data_ptr() + part.numel() * part.itemsize, name)
                )
        # Two entries over the same memory would race: what is ours stays, else the first, and
        # others are copied.
        end, holder = 0, None
        for first, last, name in sorted(ranges, key=lambda span: span[:2]) if candidates else ():
            if first < end and name:
                del candidates[name]
                continue
            if first < end and holder:
                del candidates[holder]
            end, holder = last, name
        return candidates

    def _make_counters(self, state: State, params: Sequence[Tensor], device: torch.device) -> None:
        entries = [state[param] for param in params]
        # Reading a counter waits for its device: so only those that were loaded or set by the user,
        # once.
        step_keys = [float(entry.get("step", 0)) for entry in entries]
        counters = Counters(torch.zeros(len(step_keys), dtype=torch.float32, device=device))
        if any(step_keys):
            counters.steps.copy_(torch.tensor(step_keys, dtype=torch.float32, device="cpu"))
        self.counters.append(counters)
        for i, (param, entry, step_key) in enumerate(zip(params, entries, step_keys, strict=True)):
            view, param_state = counters.steps[i], self.param_states[param]
            param_state.counters, param_state.counter, param_state.step_key = counters, i, step_key
            param_state.put("step", view)
            entry["step"] = view
        counters.note()

    def _move_in(self, entry: dict[str, Any], param: Tensor, key: str, slot: Slot) -> None:
        param_state, part = self.param_states[param], local(param).detach()
        view = to_dtensor(param, key, slot.flat() if key in GROUPED else slot.view(part))
        param_state.slots[key] = slot
        param_state.put(key, view)
        if entry.get(key) is not None:
            param_state.fill(key, to_local(param, key, entry[key]))
        elif key == "master_weight":
            param_state.fill(key, part)
        entry[key] = view

    def counters_unchanged(self) -> bool:
        """Whether nobody but us has written to a step counter since the last step."""
        return all(c.unchanged() for c in self.counters)

    def read_counters(self) -> None:
        """Learn the values of counters that somebody else has written to. Waits for their device."""
        values = {id(c): c.steps.tolist() for c in self.counters if not c.unchanged()}
        for param_state in self.param_states.values():
            if id(param_state.counters) in values:
                param_state.step_key = values[id(param_state.counters)][param_state.counter]
        self.note_counters()

    def note_counters(self) -> None:
        """Take the counters as they are now for our own work."""
        for c in self.counters:
            c.note()


def advance_step_keys(param_states: Iterable[ParamState]) -> None:
    """Note that the counters of these parameters moved on together, by a number of steps only the
    device may know.
    """
    tokens: dict[object, object] = {}
    for param_state in param_states:
        param_state.step_key = tokens.setdefault(param_state.step_key, object())
