"""Parameters -> launches: which memory each launch updates, decided once for many steps.

No arithmetic and no backend here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .distributed import global_offset, local
from .precision import Recipe, parse
from .state.arena import Arena, Entries, Params, State
from .state.convert import reorder
from .state.flatten import FlatBuffers
from .state.memory import Slot, align, as_flat, as_real
from .state.param_state import ParamState
from .state.staging import Scratch, Staging, allocate, same_order
from .state.validate import check_entry, check_pair

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Options(NamedTuple):
    """What a param group says that launches depend on."""

    amsgrad: bool
    recipe: Recipe
    seed: int
    cautious: bool
    ema: bool  # whether weights are averaged

    def entries(self, part: Tensor) -> Entries:
        """What the state of a parameter holds, of which `part` is here.

        Raises ValueError if the recipe cannot store its dtype.
        """
        return self.recipe.state(part.dtype, part.shape, self.amsgrad, self.ema)


def options_of(group: Mapping[str, Any]) -> Options:
    """A param group's options."""
    return Options(
        amsgrad=bool(group["amsgrad"]),
        recipe=parse(group.get("precision")),
        seed=group.get("seed", 0),
        cautious=group.get("cautious", False),
        ema=group.get("ema_decay") is not None,
    )


@dataclass(slots=True, eq=False)
class Row:
    """One parameter that has a gradient: what the tables say of it."""

    grad_index: int  # its position among the parameters that have a gradient
    param_index: int  # its position among all parameters
    group: int  # the number of its param group
    user_param: Tensor  # the key of its entry in `optimizer.state`
    param: Tensor  # the memory to update: the parameter or its shard, as real numbers
    grad_dtype: torch.dtype  # as real numbers, too
    options: Options
    entries: Entries
    param_state: ParamState
    global_offset: int  # where the shard's first element is in the full parameter
    # Where each operand lies. None is a gradient that is read wherever backward has put it.
    slots: dict[str, Slot | None] = field(default_factory=dict)
    in_norm: bool = True  # False if another rank adds this gradient to the norm
    # Several rows may share memory. They are stepped in this order, and never as one.
    overlaps: bool = False
    overlap_order: int = 0
    staged: bool = False  # whether the step works on copies of parameter and gradient
    scratch: Scratch | None = None  # where those copies are

    @property
    def compute(self) -> torch.dtype:
        """What the step computes in: float32 holds all that the smaller dtypes do."""
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32


@dataclass(slots=True, eq=False)
class CoalescedRows:
    """Rows of one param group and step count, next to each other in every buffer: updated as one.

    `numel` counts from the start of the first row to the end of the last. The gaps between slots
    are updated along with them, which costs less than to leave them out: nobody reads them.
    """

    rows: list[Row]
    numel: int

    @property
    def first(self) -> Row:
        return self.rows[0]


class Launch(NamedTuple):
    """One launch of the update: everything of a launch group that has these dtypes and options."""

    param: torch.dtype
    grad: torch.dtype
    recipe: Recipe
    amsgrad: bool
    cautious: bool
    ema: bool
    spans: list[CoalescedRows]


class LaunchGroup(NamedTuple):
    """Rows of one device and arithmetic dtype: one prologue computes their scalars."""

    device: torch.device
    compute: torch.dtype
    rows: list[Row]  # in the order of the parameters
    launches: list[Launch]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by key, both in the order in which they first come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def build(
    params: Params,
    grads: Mapping[int, Tensor],
    groups: Sequence[int],
    options: Sequence[Options],
    arena: Arena,
    state: State,
    buffers: FlatBuffers | None,
    staging: dict[torch.device, Staging],
) -> list[LaunchGroup]:
    """Decide the launches for the parameters that have gradients, and give these their state.

    Args:
        params: all parameters of the optimizer in order.
        grads: position of a parameter -> what is here of its gradient, in order, for those to step.
        groups: for each parameter, the number of its param group.
        options: for each param group.
        arena, state: where state lives, and the mapping that users see.
        buffers: flat parameters and gradients, if the optimizer has them.
        staging: per device, what its backend asks for.

    Returns the launch groups in the order in which they have to run.

    Raises ValueError, TypeError or RuntimeError for what cannot be stepped, before any state is
    made.
    """
    arena.keep(params)
    rows: list[Row] = []
    for index, grad in grads.items():
        param, group = params[index], groups[index]
        name = f"parameter {index} (group {group})"
        part = local(param)
        check_pair(part, grad, name)
        row = Row(
            grad_index=len(rows),
            param_index=index,
            group=group,
            user_param=param,
            param=as_real(part.detach()),
            grad_dtype=grad.dtype.to_real(),
            options=options[group],
            entries=options[group].entries(part),
            param_state=arena.param_states.setdefault(param, ParamState()),
            global_offset=global_offset(param),
        )
        check_entry(param, name, state.get(param, {}), row.entries, row.param_state)
        _place(row, grad, buffers, staging[part.device])
        rows.append(row)
    for row in rows:
        reorder(state.get(row.user_param, {}), row.user_param, row.options.recipe)
    # What is staged together needs neighbouring state, too. A parameter that is listed twice has
    # one state: what all of its rows ask for.
    wanted: dict[Tensor, Entries] = {}
    for row in sorted(rows, key=lambda row: (row.options.amsgrad, not row.staged)):
        wanted[row.user_param] = wanted.get(row.user_param, {}) | row.entries
    arena.adopt(state, wanted)
    arena.begin_averages(state, wanted, stepped=True)
    for row in rows:
        row.slots |= {key: row.param_state.slots[key] for key in row.entries}
    return _launch_groups(rows, staging)


def make_state(
    params: Params, groups: Sequence[int], options: Sequence[Options], arena: Arena, state: State
) -> None:
    """Give every parameter that requires gradients its state, with no step counted.

    Args as for `build`. Raises ValueError if the state that is there cannot be used, before any is
    made.
    """
    arena.keep(params)
    wanted: dict[Tensor, Entries] = {}
    for index, (param, group) in enumerate(zip(params, groups, strict=True)):
        if param.requires_grad:
            entries = options[group].entries(local(param))
            param_state = arena.param_states.get(param)
            name = f"parameter {index} (group {group})"
            check_entry(param, name, state.get(param, {}), entries, param_state)
            wanted[param] = entries
    for param, group in zip(params, groups, strict=True):
        if param in wanted:
            reorder(state.get(param, {}), param, options[group].recipe)
    arena.adopt(state, wanted)
    arena.begin_averages(state, wanted, stepped=False)


def _place(row: Row, grad: Tensor, buffers: FlatBuffers | None, staging: Staging) -> None:
    """Say where the row's parameter and gradient lie, or that the step works on copies."""
    flat_param = buffers.find(row.user_param, grad) if buffers else None
    if flat_param:
        row.slots = {"param": flat_param.param, "grad": flat_param.grad}
        return
    numel = row.param.numel()
    # Under a recipe every parameter has random bits of its own, so rows are never updated as one:
    # copying small ones next to each other would gain nothing.
    small = numel <= staging.small and row.options.recipe.weights is None
    row.staged = small or not same_order(row.param, grad)
    if not row.staged:
        row.slots = {"param": Slot(as_flat(row.param), 0, numel), "grad": None}


def _launch_groups(rows: Sequence[Row], staging: dict[torch.device, Staging]) -> list[LaunchGroup]:
    """The rows by device and dtypes, in the order in which they have to run."""
    _mark_overlaps(rows)
    groups = grouped(rows, lambda row: (row.overlap_order, row.param.device, row.compute))
    launch_groups = []
    for (_, device, compute), members in sorted(groups.items(), key=lambda item: item[0][0]):
        launches = [_launch(part, staging[device]) for part in grouped(members, _mix).values()]
        launch_groups.append(LaunchGroup(device, compute, members, launches))
    return launch_groups


def _mix(row: Row) -> tuple[torch.dtype, torch.dtype, Recipe, bool, bool, bool]:
    """What is compiled into a kernel, so what the rows of one launch have in common."""
    amsgrad, recipe, _, cautious, ema = row.options
    return row.param.dtype, row.grad_dtype, recipe, amsgrad, cautious, ema


def _mark_overlaps(rows: Sequence[Row]) -> None:
    """Find rows that share memory, and number them in the order in which they are stepped.

    torch.optim updates parameters one after the other, so one that shares memory starts from what
    those before it have written. Rows of one number share nothing and may run together.
    """
    extents = []  # first byte, byte after the last, row
    for i, row in enumerate(rows):
        p = row.param
        if p.numel():
            steps = zip(p.shape, p.stride(), strict=True)
            reach = 1 + sum((size - 1) * stride for size, stride in steps)
            extents.append((p.data_ptr(), p.data_ptr() + reach * p.element_size(), i))
    # From the lowest address up: a row either begins within the memory of those before it, or
    # behind all of it.
    clusters: list[list[int]] = []
    cluster_end = 0
    for start, end, i in sorted(extents):
        if start >= cluster_end:
            clusters.append([])
        clusters[-1].append(i)
        cluster_end = max(cluster_end, end)
    # An empty parameter has no memory to share, but one that is listed twice counts two steps.
    empty = [i for i, row in enumerate(rows) if not row.param.numel()]
    clusters += grouped(empty, lambda i: id(rows[i].param_state)).values()
    for cluster in clusters:
        if len(cluster) > 1:
            for order, i in enumerate(sorted(cluster)):
                rows[i].overlap_order, rows[i].overlaps = order, True


def _launch(rows: Sequence[Row], staging: Staging) -> Launch:
    """The launch of these rows, all of one mix, with scratch memory for those that are staged."""
    staged = [row for row in rows if row.staged]
    scratch = allocate([row.param for row in staged], rows[0].grad_dtype, staging)
    for row, copies in zip(staged, scratch, strict=True):
        row.scratch = copies
        row.slots |= copies.slots
    # The staged rows first: next to each other, they can be updated as one.
    return Launch(*_mix(rows[0]), _coalesce([*staged, *(row for row in rows if not row.staged)]))


def _coalesce(rows: Iterable[Row]) -> list[CoalescedRows]:
    """Join neighbours. Empty rows have nothing to update."""
    spans: list[CoalescedRows] = []
    for row in rows:
        if not row.param.numel():
            continue
        if spans and _continues(spans[-1], row):
            spans[-1].rows.append(row)
            spans[-1].numel = align(spans[-1].numel) + row.param.numel()
        else:
            spans.append(CoalescedRows([row], row.param.numel()))
    return spans


def _continues(span: CoalescedRows, row: Row) -> bool:
    """Whether the row can be updated as one with the span: same scalars, next in every buffer."""
    first = span.first
    if row.group != first.group or row.param_state.step_key != first.param_state.step_key:
        return False
    # Rows that overlap others run in an order of their own. Under a recipe each row has random
    # bits of its own.
    if row.overlaps or first.overlaps or row.options.recipe.weights:
        return False
    for key, slot in row.slots.items():
        before = first.slots[key]
        if slot is None or before is None or slot.segment is not before.segment:
            return False
        if slot.start != before.start + align(span.numel):
            return False
    return True
