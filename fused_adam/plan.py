"""Parameters -> launches: decides once which memory each launch updates. No arithmetic, no backend
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .distributed import global_offset, local
from .precision import Recipe, parse
from .state.arena import (
    Arena,
    Entries,
    ParamState,
    Slot,
    State,
    align,
    as_flat,
    as_real,
    dense_layout,
    is_dense,
)
from .state.checks import check_pair, is_lazy
from .state.convert import reorder
from .state.flatten import FlatBuffers


@dataclass(frozen=True, slots=True)
class Staging:
    """When a launch works on copies of parameters and gradients, as a backend asks for.

    small: dense parameters of up to this many elements are copied together, to be updated as one.
    page: elements per scratch buffer of such copies.
    shared: one scratch buffer serves page after page (launches run one after the other on the
        host).
    """

    small: int = 0
    page: int = 0
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What a param group says that launches depend on."""

    amsgrad: bool
    recipe: Recipe
    seed: int


def options_of(group: Mapping[str, Any]) -> Options:
    """A param group's options."""
    return Options(bool(group["amsgrad"]), parse(group.get("precision")), group.get("seed", 0))


@dataclass(slots=True, eq=False)
class Row:
    """One parameter that has a gradient: what the tables say of it."""

    grad_index: int  # among the parameters that have a gradient
    param_index: int  # among all parameters
    group: int
    param: Tensor  # real view of the user's parameter, or of its shard
    complex: bool
    options: Options
    entries: Entries
    param_state: ParamState
    slots: dict[str, Slot | None] = field(
        default_factory=dict
    )  # of the operands; None: the gradient, where it is
    global_offset: int = 0  # of the full parameter, the element that is the first here
    in_norm: bool = True  # in the norm: not what another rank counts
    overlaps: bool = False  # another parameter lies in the same memory, or it is listed twice
    staged: bool = False
    stage: tuple[Tensor, Tensor] | None = (
        None  # the copies of parameter and gradient, in the parameter's shape
    )

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the state's entries."""
        return {key: dtype for key, (dtype, _) in self.entries.items()}


@dataclass(slots=True, eq=False)
class CoalescedRows:
    """Rows of one group and step count that lie one behind the other in every buffer: updated as
    one.
    """

    rows: list[Row]
    numel: int  # from the first row's start to the last one's end, the gaps between slots included

    @property
    def first(self) -> Row:
        return self.rows[0]


@dataclass(slots=True, eq=False)
class Launch:
    """Spans of one dtype mix: one launch of the update."""

    param: torch.dtype
    grad: torch.dtype
    recipe: Recipe
    amsgrad: bool
    rows: list[Row] = field(default_factory=list)
    spans: list[CoalescedRows] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class LaunchGroup:
    """Rows of one device and arithmetic type: one prologue, then their launches."""

    device: torch.device
    compute: torch.dtype
    rows: list[Row] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)


def overlap_order(rows: Sequence[Row]) -> list[int]:
    """For each row, how many rows before it overlap it in memory: such rows are stepped in order,
    as torch does.

    Marks them, too: a parameter that is listed twice counts two steps where its neighbours count
    one. (Also an empty one, which has no memory to overlap in.)
    """
    ends: list[tuple[int, int, int]] = []
    empty: dict[int, int] = {}  # listings so far
    wave = [0] * len(rows)
    for i, row in enumerate(rows):
        p = row.param
        reach = 1 + sum(
            (size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)
        )
        if p.numel():
            ends.append((p.data_ptr(), p.data_ptr() + reach * p.element_size(), i))
        else:
            wave[i] = empty.get(id(row.param_state), 0)
            empty[id(row.param_state)] = wave[i] + 1
    cluster: list[int] = []
    cluster_end = 0
    for start, end, i in sorted(ends):
        if start >= cluster_end:
            cluster = []
        cluster.append(i)
        cluster_end = max(cluster_end, end)
        if len(cluster) > 1:
            for order, member in enumerate(sorted(cluster)):
                wave[member] = order
                rows[member].overlaps = True
    return wave


def build(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    groups: Sequence[int],
    options: Sequence[Options],
    arena: Arena,
    state: State,
    buffers: FlatBuffers | None,
    staging: dict[torch.device, Staging],
) -> list[LaunchGroup]:
    """Decide the launches for the parameters that have gradients, and give these their state.

    Args:
        params, grads: all parameters of the optimizer in order, and what is here of their gradients
            or None.
        groups: for each parameter, the number of its param group.
        options: for each param group.
        arena, state: where state lives, and the mapping that users see.
        buffers: flat parameters and gradients, if the optimizer has them.
        staging: per device, what its backend asks for.

    Raises ValueError, TypeError or RuntimeError for what cannot be stepped, before any state is
    made.
    """
    arena.keep(params)
    rows: list[Row] = []
    for index, (param, grad, group) in enumerate(zip(params, grads, groups, strict=True)):
        if grad is not None:
            name = f"parameter {index} (group {group})"
            part = local(param)
            check_pair(part, grad, name)
            chosen = options[group]
            row = Row(
                len(rows),
                index,
                group,
                as_real(part.detach()),
                part.is_complex(),
                chosen,
                chosen.recipe.state(part.dtype, part.shape, chosen.amsgrad),
                arena.param_states.setdefault(param, ParamState()),
                global_offset=global_offset(param),
            )
            _check_state(arena, state, param, name, row.entries)
            _place(row, param, grad, buffers, staging[part.device])
            rows.append(row)
    live = [(param, grad) for param, grad in zip(params, grads, strict=True) if grad is not None]
    for row in rows:
        reorder(state.get(live[row.grad_index][0], {}), live[row.grad_index][0], row.options.recipe)
    # A parameter that is listed twice has one state, with what either of its groups asks for.
    # What is staged together lies together.
    order = sorted(rows, key=lambda row: (row.options.amsgrad, not row.staged))
    arena.adopt(state, {live[row.grad_index][0]: row.entries for row in order})

    sections: dict[Any, LaunchGroup] = {}
    launches: dict[Any, Launch] = {}
    for row, wave in zip(rows, overlap_order(rows), strict=True):
        grad = live[row.grad_index][1]
        row.slots |= {key: row.param_state.slots[key] for key in row.entries}
        compute = torch.float64 if row.param.dtype == torch.float64 else torch.float32
        key = (wave, row.param.device, compute)
        section = sections.setdefault(key, LaunchGroup(row.param.device, compute))
        section.rows.append(row)
        mix = (row.param.dtype, as_real(grad).dtype, row.options.recipe, row.options.amsgrad)
        if (key, mix) not in launches:
            section.launches.append(launches.setdefault((key, mix), Launch(*mix)))
        launches[key, mix].rows.append(row)
    ordered = [sections[key] for key in sorted(sections, key=lambda key: key[0])]
    for section in ordered:
        for launch in section.launches:
            _stage(launch, staging[section.device], section.device)
            launch.spans = list(_spans(launch.rows))
    return ordered


def _check_state(arena: Arena, state: State, param: Tensor, name: str, entries: Entries) -> None:
    """Raise ValueError if what stands in `state` cannot be this parameter's state."""
    entry = state.get(param, {})
    if not isinstance(entry, dict):
        raise ValueError(f"state of {name} is {type(entry).__name__}, but must be a dict")
    param_state = arena.param_states.get(param)
    arena.check(param, name, entry, entries, param_state.stored if param_state else ())


def make_state(
    params: Sequence[Tensor],
    groups: Sequence[int],
    options: Sequence[Options],
    arena: Arena,
    state: State,
) -> None:
    """Give every parameter that requires gradients its state, of no step.

    Args as for `build`. Raises ValueError if the state that is there cannot be used, before any is
    made.
    """
    arena.keep(params)
    wanted: dict[Tensor, Entries] = {}
    for index, (param, group) in enumerate(zip(params, groups, strict=True)):
        if param.requires_grad:
            part, chosen = local(param), options[group]
            entries = chosen.recipe.state(part.dtype, part.shape, chosen.amsgrad)
            _check_state(arena, state, param, f"parameter {index} (group {group})", entries)
            wanted[param] = entries
    for param, group in zip(params, groups, strict=True):
        if param in wanted:
            reorder(state.get(param, {}), param, options[group].recipe)
    arena.adopt(state, wanted)


def same_order(p: Tensor, grad: Tensor) -> bool:
    """Whether a parameter and its gradient are dense, and their elements follow each other alike in
    memory.
    """
    g = as_real(grad)
    alike = g.stride() == p.stride() or (g.is_contiguous() and p.is_contiguous())
    return alike and is_dense(p) and not is_lazy(grad)


def _place(
    row: Row, param: Tensor, grad: Tensor, buffers: FlatBuffers | None, staging: Staging
) -> None:
    """Say where the row's parameter and gradient lie, or that copies are to be stepped."""
    p, numel = row.param, row.param.numel()
    place = buffers.place(param, grad) if buffers else None
    if place:
        row.slots = {"param": place.param, "grad": place.grad}
        return
    # Under a recipe every parameter has random bits of its own: stepping several as one would gain
    # nothing.
    together = numel <= staging.small and row.options.recipe.weights is None
    row.staged = together or not same_order(p, grad)
    if not row.staged:
        row.slots = {"param": Slot(as_flat(p), 0, numel), "grad": None}


def _stage(launch: Launch, staging: Staging, device: torch.device) -> None:
    """Give staged rows places in scratch buffers, page by page, and put them first, to be updated
    as one.
    """
    launch.rows.sort(key=lambda row: not row.staged)
    pages: list[list[Row]] = []
    room = 0
    for row in launch.rows:
        if row.staged:
            need = align(row.param.numel())
            if not pages or need > room:
                pages.append([])
                room = max(staging.page, need)
            pages[-1].append(row)
            room -= need
    if not pages:
        return
    sizes = [sum(align(row.param.numel()) for row in page) for page in pages]
    total = max(sizes) if staging.shared else sum(sizes)
    memory = {
        "param": torch.zeros(total, dtype=launch.param, device=device),
        "grad": torch.zeros(total, dtype=launch.grad, device=device),
    }
    start = 0
    for page, size in zip(pages, sizes, strict=True):
        # One tensor object per page: only rows of one page count as neighbours.
        scratch = {key: tensor[start : start + size] for key, tensor in memory.items()}
        offset = 0
        for row in page:
            numel = row.param.numel()
            row.slots |= {key: Slot(tensor, offset, numel) for key, tensor in scratch.items()}
            # In the order of the state, which is the parameter's own where that is dense.
            layout = dense_layout(row.param)
            p, g = (
                scratch[key][offset : offset + numel].as_strided(*layout)
                for key in ("param", "grad")
            )
            row.stage = (p, g)
            offset += align(numel)
        if not staging.shared:
            start += size


def _spans(rows: Iterable[Row]) -> Iterable[CoalescedRows]:
    """Join neighbours: rows that step together and follow each other in every buffer."""
    span: CoalescedRows | None = None
    for row in rows:
        if row.param.numel() == 0:
            continue
        if (
            span
            and _follows(span, row)
            and row.param_state.step_key == span.first.param_state.step_key
        ):
            span.numel = align(span.numel) + row.param.numel()
            span.rows.append(row)
        else:
            if span:
                yield span
            span = CoalescedRows([row], row.param.numel())
    if span:
        yield span


def _follows(span: CoalescedRows, row: Row) -> bool:
    if (
        row.group != span.first.group
        or row.overlaps
        or span.first.overlaps
        or row.options.recipe.weights
    ):
        return False
    for key, slot in row.slots.items():
        before = span.first.slots[key]
        if slot is None or before is None or slot.segment is not before.segment:
            return False
        if slot.start != before.start + align(span.numel):
            return False
    return True
