"""Flat state: segments, the slots in them, and each parameter's views. No arithmetic on moments here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .distributed import group_elements, like, local, part_of
from .precision import ENTRIES, GROUP, GROUPED

Entries = dict[str, tuple[torch.dtype, torch.Size]]  # of one parameter's state, by name: dtype and shape

# Slots start on multiples of this many elements: a whole 128-byte line of float32, a whole 32-byte sector of any dtype,
# and the same distance in elements for all of them, so that neighbours in one buffer are neighbours in every buffer.
SLOT = 32
SEGMENT_BYTES = 1 << 30


def padded(numel: int) -> int:
    """Elements from one slot's start to the next one's."""
    return -(-numel // SLOT) * SLOT


def real(tensor: Tensor) -> Tensor:
    """The tensor itself, or for a complex one its real and imaginary parts as a last dimension of two."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()


def flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor, whatever the order of its dimensions, as one dimension."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def apart(tensor: Tensor) -> Tensor:
    """The same memory in a storage of its own."""
    # Through a capsule: `Tensor.__dlpack__` refuses a GPU that is not the current one.
    return torch.utils.dlpack.from_dlpack(torch._C._to_dlpack(tensor))


def dense_layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Size and strides `torch.zeros_like` would choose: the tensor's own if it is dense, else contiguous."""
    like = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return like.shape, like.stride()


def _copies(value: Tensor, dtype: torch.dtype, param: Tensor) -> bool:
    """Whether the tensor's values can be copied into state of this dtype: before anything is written."""
    plain = value.layout == torch.strided and not value.is_quantized and (param.is_meta or not value.is_meta)
    return plain and (dtype.is_complex or not value.is_complex())


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory without gaps or overlaps, in any order of dimensions."""
    return tensor.is_contiguous() or tensor.stride() == dense_layout(tensor)[1]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """`numel` elements of a flat `segment`, from `start` on."""

    segment: Tensor
    start: int
    numel: int

    @property
    def address(self) -> int:
        return self.segment.data_ptr() + self.start * self.segment.element_size() if self.numel else 0

    def flat(self) -> Tensor:
        """These elements as one dimension, in a storage of their own over the segment's memory.

        A plain view would make `torch.save` write the whole segment, and safetensors refuse it.
        """
        return apart(self.segment[self.start : self.start + self.numel])

    def view(self, like: Tensor) -> Tensor:
        """These elements in the shape and layout of `like` (complex if it is)."""
        elements = self.flat()
        if like.is_complex():
            elements = torch.view_as_complex(elements.view(-1, 2))
        return elements.as_strided(*dense_layout(like))


def segments(numels: Sequence[int], dtype: torch.dtype, device: torch.device, group: int = 1) -> Iterator[list[Slot]]:
    """Zeroed slots for `numels`, in order; each list shares one segment of at most SEGMENT_BYTES.

    A parameter larger than that has a segment of its own. Segments are allocated as the iterator advances.
    With `group`, a divisor of SLOT, a slot has one element for every `group` of the parameter's.
    """
    limit = SEGMENT_BYTES // dtype.itemsize * group
    starts: list[int] = []
    end = 0
    for i, numel in enumerate(numels):
        starts.append(end)
        end += padded(numel)
        if i + 1 == len(numels) or end + padded(numels[i + 1]) > limit:
            segment = torch.zeros(end // group, dtype=dtype, device=device)
            batch = numels[i + 1 - len(starts) : i + 1]
            yield [Slot(segment, start // group, -(-n // group)) for start, n in zip(starts, batch, strict=True)]
            starts, end = [], 0


class State(defaultdict[Any, Any]):
    """`optimizer.state`: parameter -> its entry, noting every access, so that a step scans nothing.

    Whoever holds the mapping may replace entries; the next step then verifies them once. The entries inside
    are plain dicts: another class there would make `torch.load(weights_only=True)` refuse the checkpoint.
    The optimizer itself reads it through `dict`'s own methods, which note nothing.
    """

    def __init__(self, entries: Any = ()) -> None:
        super().__init__(dict, entries)
        self.touched = True

    def __reduce__(self) -> Any:
        return State, (), None, None, iter(dict.items(self))


def _noting(name: str) -> Any:
    method = getattr(defaultdict, name)

    def noted(self: State, *args: Any, **kwargs: Any) -> Any:
        self.touched = True
        return method(self, *args, **kwargs)

    noted.__name__ = name
    return noted


for _name in (
    *("__getitem__", "__setitem__", "__delitem__", "__iter__", "__ior__", "get", "pop", "popitem"),
    *("setdefault", "update", "clear", "keys", "values", "items"),
):
    setattr(State, _name, _noting(_name))


@dataclass(slots=True)
class Counters:
    """Step counters of one device: float32, shape (C,). Entries of `state` are views, so they share its version."""

    steps: Tensor
    version: int = -1  # of `steps`, after our own last write


@dataclass(slots=True)
class Home:
    """Where one parameter's state lives: its slots, the tensors put into `state`, its step counter."""

    slots: dict[str, Slot] = field(default_factory=dict)
    views: dict[str, Tensor] = field(default_factory=dict)
    counters: Counters | None = None
    counter: int = 0
    layout: object = None  # the device that the slots are on, and the order of elements they are in
    # Counters of equal age have equal values: the value itself, or a token given to those that moved on together.
    age: object = 0.0

    def holds(self, key: str, value: Any, dtype: torch.dtype) -> bool:
        """Whether `value` is the tensor we put there, still over our memory and of the dtype wanted."""
        view = self.views.get(key)
        if view is None or value is not view or view.dtype != dtype:
            return False
        return local(view).data_ptr() == self.slots[key].address

    def fill(self, key: str, value: Tensor) -> None:
        """Copy what is here of a value into the entry's memory."""
        view = local(self.views[key])
        if key in GROUPED:
            view = view.view(-1)[: len(value)]
        view.copy_(value)

    def holds_step(self, value: Any, device: torch.device) -> bool:
        """The same for the step counter."""
        return (
            self.counters is not None
            and value is self.views["step"]
            and value.device == device
            and value.data_ptr() == self.step_address
        )

    @property
    def step_address(self) -> int:
        assert self.counters is not None
        return self.counters.steps.data_ptr() + 4 * self.counter


class Arena:
    """The flat state of one optimizer: what each parameter needs is made here, or adopted from its entry."""

    def __init__(self) -> None:
        self.homes: dict[Tensor, Home] = {}
        self.counters: list[Counters] = []
        self.moves = 0  # how often state that was here has moved: tables made before are stale

    def keep(self, params: Sequence[Tensor]) -> None:
        """Let go of parameters that the optimizer no longer has."""
        known = set(map(id, params))
        self.homes = {param: home for param, home in self.homes.items() if id(param) in known}

    def check(self, param: Tensor, name: str, entry: dict[str, Any], wanted: Entries) -> None:
        """Raise ValueError if the entry's tensors cannot be the state of this parameter."""
        for key, (dtype, shape) in wanted.items():
            value = entry.get(key)
            if isinstance(value, Tensor):
                value = part_of(param, key, value)
            if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
                raise ValueError(f"state {key!r} of {name} has {got}, but must be a tensor of shape {tuple(shape)}")
            if value is not None and not _copies(value, dtype, param):
                got = f"a {value.layout} tensor of {value.dtype} on {value.device}"
                raise ValueError(f"state {key!r} of {name} is {got}, but must be a dense tensor with values of {dtype}")
            if value is not None and value.dtype != dtype and not (dtype.is_floating_point or dtype.is_complex):
                # Codes and remainders are bits, which no conversion keeps.
                raise ValueError(f"state {key!r} of {name} has dtype {value.dtype}, but its precision stores {dtype}")
            if key in GROUPED and (value is None) != (entry.get(key.replace("scale", "code")) is None):
                raise ValueError(f"state {key!r} of {name} must be there if and only if its codes are")
        foreign = [key for key in ENTRIES if key in entry and key not in wanted and key != "max_exp_avg_sq"]
        if foreign:
            raise ValueError(
                f"state of {name} has {foreign[0]!r}, which its precision does not store: a recipe is chosen before "
                "training; to change it, load the state_dict into an optimizer that has the other one"
            )
        step = entry.get("step", 0)
        if isinstance(step, Tensor):
            number = step.numel() == 1 and _copies(step, torch.float32, param)
        else:
            number = isinstance(step, (int, float))
        if not number:
            raise ValueError(f"state 'step' of {name} is {step!r}, but must be one real number, as a tensor or plain")
        home = self.homes.get(param)
        if home and home.holds_step(step, param.device):
            step = home.age if isinstance(home.age, float) else 0  # ours: read when somebody else has written to it
        # Reading a counter of another device would wait for it.
        if not (isinstance(step, Tensor) and step.device.type != "cpu") and not 0 <= float(step) < float("inf"):
            raise ValueError(f"state 'step' of {name} is {float(step)}, but must be a finite number >= 0")

    def adopt(self, state: State, wanted: dict[Tensor, Entries]) -> None:
        """Give every parameter its state: zeros where there is none, a copy where another tensor stands.

        A master weight begins as a copy of its parameter.

        Args:
            state: the optimizer's state; entries are created or get our views in place of foreign tensors.
            wanted: parameters of any device and dtype; for each the names of its entries, besides `step`.

        Call `check` first: nothing here raises half-way.
        """
        missing: dict[tuple[str, torch.dtype, torch.device], list[Tensor]] = {}
        steps: dict[torch.device, list[Tensor]] = {}
        moved = False
        for param, entries in wanted.items():
            entry = dict.setdefault(state, param, {})
            home = self.homes.setdefault(param, Home())
            layout = (local(param).device, dense_layout(local(param))[1])
            if home.layout != layout:  # the parameter moved, or has another memory format: by value into other slots
                home.layout = layout
                home.views = {key: view for key, view in home.views.items() if key == "step"}
            for key, (dtype, _) in entries.items():
                if not home.holds(key, entry.get(key), dtype):
                    missing.setdefault((key, dtype, param.device), []).append(param)
                    moved |= key in home.slots
            if not home.holds_step(entry.get("step"), param.device):
                steps.setdefault(param.device, []).append(param)
                moved |= home.counters is not None
        self.moves += moved
        for device, owners in steps.items():
            self._make_counters(state, owners, device)
        for (key, dtype, device), owners in missing.items():
            numels = [group_elements(param) if key in GROUPED else real(local(param)).numel() for param in owners]
            group = GROUP if key in GROUPED else 1
            slots = (slot for segment in segments(numels, dtype.to_real(), device, group) for slot in segment)
            for param, slot in zip(owners, slots, strict=True):
                self._move_in(dict.__getitem__(state, param), param, key, slot)

    def _make_counters(self, state: State, params: Sequence[Tensor], device: torch.device) -> None:
        entries = [dict.__getitem__(state, param) for param in params]
        # Reading a counter waits for its device: so only those that were loaded or set by the user, once.
        ages = [float(entry.get("step", 0)) for entry in entries]
        counters = Counters(torch.zeros(len(ages), dtype=torch.float32, device=device))
        if any(ages):
            counters.steps.copy_(torch.tensor(ages, dtype=torch.float32, device="cpu"))
        self.counters.append(counters)
        for i, (param, entry, age) in enumerate(zip(params, entries, ages, strict=True)):
            view, home = counters.steps[i], self.homes[param]
            home.counters, home.counter, home.age, home.views["step"] = counters, i, age, view
            rest = {key: value for key, value in entry.items() if key != "step"}
            entry.clear()
            entry.update({"step": view} | rest)  # torch's order: step first
        counters.version = counters.steps._version
        used = {id(home.counters) for home in self.homes.values()}
        self.counters = [c for c in self.counters if id(c) in used]

    def _move_in(self, entry: dict[str, Any], param: Tensor, key: str, slot: Slot) -> None:
        home, part = self.homes[param], local(param).detach()
        view = slot.flat() if key in GROUPED else slot.view(part)
        home.slots[key], home.views[key] = slot, like(param, key, view)
        if entry.get(key) is not None:
            home.fill(key, part_of(param, key, entry[key]))
        elif key == "master_weight":
            home.fill(key, part)
        entry[key] = home.views[key]

    def counters_unchanged(self) -> bool:
        """Whether nobody but us has written to a step counter since the last step."""
        return all(c.steps._version == c.version for c in self.counters)

    def read_counters(self) -> None:
        """Learn the values of counters that somebody else has written to. Waits for their device."""
        values = {id(c): c.steps.tolist() for c in self.counters if c.steps._version != c.version}
        for home in self.homes.values():
            if id(home.counters) in values:
                home.age = values[id(home.counters)][home.counter]
        self.note_counters()

    def note_counters(self) -> None:
        """Take the counters as they are now for our own work."""
        for c in self.counters:
            c.version = c.steps._version


def grow_older(homes: Iterable[Home]) -> None:
    """Note that the counters of these parameters moved on together, by a number of steps only the device may know."""
    tokens: dict[object, object] = {}
    for home in homes:
        home.age = tokens.setdefault(home.age, object())
