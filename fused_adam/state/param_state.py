"""Where the state of one parameter is, and the step counters that several have in common."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..distributed import local
from ..precision import GROUPED
from .memory import Slot


def reads_cost_nothing(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


class StateRef(weakref.ref[Tensor]):
    """A weak reference to a tensor in `optimizer.state`; frees the slot when the tensor dies.

    Frameworks move state to the host by replacing entry after entry (`entry[key] =
    entry[key].to("cpu")`). The memory that the old tensor leaves must be free at once, not at the
    next step.
    """

    __slots__ = ("fresh_version", "key", "param_state")

    def __new__(cls, tensor: Tensor, param_state: ParamState, key: str) -> StateRef:
        return super().__new__(cls, tensor, _free_slot)

    def __init__(self, tensor: Tensor, param_state: ParamState, key: str) -> None:
        super().__init__(tensor, _free_slot)  # type: ignore[call-arg]
        self.param_state, self.key = weakref.ref(param_state), key
        # Of an average that no step has used yet: its version when we last wrote to it.
        self.fresh_version: int | None = None


def _free_slot(ref: Any) -> None:
    param_state = ref.param_state()
    # Another tensor may have taken its place since: then the slot is that one's.
    if param_state is not None and param_state.refs.get(ref.key) is ref:
        del param_state.refs[ref.key]
        param_state.slots.pop(ref.key, None)


@dataclass(slots=True, eq=False)
class Counters:
    """Step counters on one device: float32, shape (C,).

    Ours are one buffer for many parameters, so one launch can advance all of them. Entries of
    `state` are views of it and share its version. A counter that the user put into `state` is a
    buffer of one.
    """

    steps: Tensor
    version: int = -1  # of `steps`, after our own last write
    ours: bool = True
    values: Tensor | None = None  # on the CPU, what our own last write left there

    def unchanged(self) -> bool:
        """Whether only we have written since `note`, as far as one can tell without waiting."""
        # Writes to `step.data` and to arrays over the memory do not change the version. On the CPU
        # comparing values notices them, in 2 us.
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
    """Where one parameter's state is: its slots, the tensors in `state`, its step counter.

    A slot is part of one of our segments, or a whole tensor that the user put into `state`.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    refs: dict[str, StateRef] = field(default_factory=dict)
    counters: Counters | None = None
    counter: int = 0  # this parameter's index in `counters`
    stored: Collection[str] = ()  # names of what the last step stored, besides the step counter
    layout: object = None  # the device of the slots, and the order of their elements
    # Parameters with equal keys have equal step counts. Reading the counts would wait for the
    # device, so this is the count itself only where it is known. After a step, the parameters that
    # had a common key and took part get a new common key.
    step_key: object = 0.0

    def view(self, key: str) -> Tensor | None:
        """The tensor that we put into `state`, or None if nobody has it any more."""
        ref = self.refs.get(key)
        return None if ref is None else ref()

    def put(self, key: str, view: Tensor) -> None:
        """Remember the tensor that stands in `state`, without keeping it alive."""
        self.refs[key] = StateRef(view, self, key)

    def holds(self, key: str, value: Any, dtype: torch.dtype) -> bool:
        """Whether `value` is the tensor that we step on, at its old address and of this dtype."""
        view = self.view(key)
        if view is None or value is not view or view.dtype != dtype:
            return False
        return local(view).data_ptr() == self.slots[key].address

    def holds_step(self, value: Any, device: torch.device) -> bool:
        """Whether `value` is the step counter that we advance, at its old address on `device`."""
        view = self.view("step")
        if self.counters is None or view is None or value is not view:
            return False
        return view.device == device and view.data_ptr() == self.step_address

    def fill(self, key: str, value: Tensor) -> None:
        """Copy this rank's part of a value into the entry's memory."""
        view = self.view(key)
        assert view is not None
        part = local(view)
        if key in GROUPED:
            # A smaller shard than the largest has scales left over at the end.
            part = part.view(-1)[: len(value)]
        part.copy_(value)

    @property
    def step_address(self) -> int:
        assert self.counters is not None
        return self.counters.steps.data_ptr() + 4 * self.counter


def advance_step_keys(param_states: Iterable[ParamState]) -> None:
    """Give parameters that stepped together new keys: equal ones stay equal to each other.

    The new keys are tokens, not counts: where steps are skipped, only the device knows whether
    this one took place.
    """
    tokens: dict[object, object] = {}
    for param_state in param_states:
        param_state.step_key = tokens.setdefault(param_state.step_key, object())
