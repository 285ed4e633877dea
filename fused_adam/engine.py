"""The plans of one optimizer, and a step through the one that fits. No arguments of users, no arithmetic here."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, count, repeat
from typing import Any

import torch
from torch import Tensor

from fused_adam_kernels import table

from . import arguments, plan, shapes
from . import backend as backends
from .arena import Arena, State, grow_older
from .distributed import Ranks, Shards, is_sharded
from .flatten import FlatBuffers
from .scalars import Guard, hyper
from .watch import Watch, reader

# Plans are kept for the patterns of gradients that come back (experts, frozen layers): so many rows per parameter.
ROWS_KEPT = 8

Found = tuple[list[Tensor], list[int]]


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """For making memory: under the user's inference mode it could never be written outside that mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(slots=True, eq=False)
class Plan:
    """How one set of parameters is stepped."""

    live: list[Tensor]  # the parameters, in order
    rows: list[plan.Row]
    runners: list[backends.Runner]
    watch: Watch
    spans: list[plan.Span]  # of several rows
    written: list[Tensor]  # autograd is told of these: it saves parameters for backward, never moments
    generation: int  # of the user's state when last compared

    def intact(self, state: State) -> bool:
        """Whether the user's state still holds what our tables point to."""
        for row in self.rows:
            entry = dict.get(state, self.live[row.index], {})
            if not row.home.holds_step(entry.get("step"), row.param.device):
                return False
            if not all(row.home.holds(key, entry.get(key), dtype) for key, (dtype, _) in row.entries.items()):
                return False
        return True

    def coherent(self) -> bool:
        """Whether rows that are updated as one still have one step count."""
        return all(row.home.age == span.first.home.age for span in self.spans for row in span.rows)


class Engine:
    """Steps the parameters of one optimizer.

    Args:
        backend: as the optimizer's.
        max_grad_norm, skip_nonfinite, grad_attribute: as the optimizer's.
    """

    def __init__(self, backend: str, max_grad_norm: float | None, skip_nonfinite: bool, grad_attribute: str) -> None:
        self.backend, self.read = backend, reader(grad_attribute)
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.guards = max_grad_norm is not None or skip_nonfinite
        self.arena = Arena()
        self.flat: FlatBuffers | None = None
        self.stats: Tensor | None = None
        self.ranks: Ranks | None = None  # where parameters are DTensors
        self.counted: list[bool] = []
        self.reduce_norm: Callable[[Tensor], Tensor] | None = None
        self.moved: dict[Tensor, Tensor] = {}
        self.generation = self.moves = 0
        self.ran: Plan | None = None
        self.forget()

    def forget(self) -> None:
        """Drop every plan."""
        self._note_steps()
        self.params: list[Tensor] = []
        self.options: list[Any] = []
        self.plans: dict[tuple[bool, tuple[int, ...]], Plan] = {}
        self.usual: Plan | None = None

    def step(
        self, groups: Sequence[dict[str, Any]], state: State, guard: Guard, only: tuple[int, ...] | None = None
    ) -> None:
        """Step every parameter that has a gradient, or those alone whose numbers are given.

        Args:
            groups: the optimizer's param groups; their values are read anew every time.
            state: the optimizer's state.
            guard: a GradScaler's scale and flag.
            only: positions among all parameters; each of these has a gradient.

        Raises what `plan.build` raises, before anything is changed.
        """
        capturing = backends.is_capturing()
        self.moved.clear()  # of a step that failed
        params = list(chain.from_iterable([group["params"] for group in groups]))
        if shapes.are_all(params):
            self.stats = shapes.step(groups, state, self.read(params), only, self.guards)
            return
        options = [(group["amsgrad"], group.get("precision"), group.get("seed")) for group in groups]
        known = self._still_known(params, options) and self.arena.counters_unchanged()
        if state.touched:
            self.generation += 1
        found = self._find(params, state, only) if known else None
        if found is None:
            if capturing:
                raise RuntimeError(
                    "this step cannot be captured in a CUDA graph, because what it needs is not there yet: run a step "
                    "with the same parameters, and gradients of the same layout, before the capture"
                )
            if not known:
                self.forget()
                self.params, self.options = params, options
                self.arena.read_counters()
            with lasting():
                found = self._build_with_others(groups, state, only)
        state.touched = False
        self._run(*found, [hyper(group, self.max_grad_norm, self.skip_nonfinite) for group in groups], guard, capturing)

    def _still_known(self, params: list[Tensor], options: list[Any]) -> bool:
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and options == self.options
            and self.moves == self.arena.moves
        )

    def _find(self, params: list[Tensor], state: State, only: tuple[int, ...] | None) -> tuple[Plan, Found] | None:
        """The plan for this step, with the gradients it takes; None if none fits."""
        if only is None and self.usual:
            found = self._fit(self.usual, state)
            if found:
                return self.usual, found
        key = self._key(params, only)
        kept = self.plans.get(key)
        found = self._fit(kept, state) if kept else None
        if kept is None or found is None:
            return None
        self.plans[key] = self.plans.pop(key)  # the last to be dropped
        if only is None:
            self.usual = kept
        return kept, found

    def _key(self, params: list[Tensor], only: tuple[int, ...] | None) -> tuple[bool, tuple[int, ...]]:
        if only is not None:
            return True, only
        return False, tuple(compress(count(), map(operator.is_not, self.read(params), repeat(None))))

    def _fit(self, kept: Plan, state: State) -> Found | None:
        if kept.generation != self.generation:
            if not kept.intact(state):
                return None
            kept.generation = self.generation
        if kept is not self.ran:
            self._note_steps()
            if not kept.coherent():
                return None
        return kept.watch.gradients()

    def _note_steps(self) -> None:
        """Before another plan is looked at: the parameters of the last one have moved on together."""
        if self.ran:
            grow_older(row.home for row in self.ran.rows)
            self.ran = None

    def _build_with_others(
        self, groups: Sequence[dict[str, Any]], state: State, only: tuple[int, ...] | None
    ) -> tuple[Plan, Found]:
        """`_build`; where parameters are DTensors, the first time on all ranks or on none."""
        if not any(map(is_sharded, self.params)):
            self.ranks = None
            return self._build(groups, state, only)
        if self.ranks is None or list(map(id, self.ranks.params)) != list(map(id, self.params)):
            ranks, failure, found = Ranks(self.params), None, None
            self.counted = ranks.compare(self._facts(groups))
            try:
                found = self._build(groups, state, only)
            except Exception as error:
                failure = error
            try:
                ranks.together(failure)
            except Exception:
                self.forget()  # the next step has to ask again
                raise
            self.ranks = ranks
        else:
            found = self._build(groups, state, only)
        assert found is not None
        for row in found[0].rows:
            row.counted = self.counted[row.ordinal]
        return found

    def _facts(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
        """What every rank must have alike, per parameter."""
        members = [(number, group, param) for number, group in enumerate(groups) for param in group["params"]]
        return [
            {
                "shape": tuple(param.shape),
                "dtype": param.dtype,
                "placements": getattr(param, "placements", "none"),
                "gradient": grad is not None,
                "group": number,
                **{key: group.get(key) for key in ("amsgrad", "precision", "seed")},
                "max_grad_norm": self.max_grad_norm,
                "skip_nonfinite": self.skip_nonfinite,
            }
            for (number, group, param), grad in zip(members, self.read(self.params), strict=True)
        ]

    def _build(
        self, groups: Sequence[dict[str, Any]], state: State, only: tuple[int, ...] | None
    ) -> tuple[Plan, Found]:
        """Decide anew what each launch updates, and make the state it needs."""
        self._note_steps()
        params = self.params
        key = self._key(params, only)
        chosen = set(key[1])
        grads = [grad if i in chosen else None for i, grad in enumerate(self.read(params))]
        live, found = [], []
        for param, grad in zip(params, grads, strict=True):
            if grad is not None:
                live.append(param)
                found.append(grad)
        if any(map(is_sharded, live)):
            found = Shards(live).gradient_parts(found, self.moved)
            rest = iter(found)
            grads = [None if grad is None else next(rest) for grad in grads]
        devices = {device: backends.choose(self.backend, device) for device in {param.device for param in live}}
        sections = plan.build(
            params=params,
            grads=grads,
            groups=[number for number, group in enumerate(groups) for _ in group["params"]],
            options=[plan.options_of(group) for group in groups],
            arena=self.arena,
            state=state,
            buffers=self.flat,
            staging={device: backends.staging(name) for device, name in devices.items()},
        )
        if self.moves != self.arena.moves:
            self.plans.clear()
            self.usual = None
            self.moves = self.arena.moves
        idle = [param for param, grad in zip(params, grads, strict=True) if grad is None and only is None]
        made = Plan(
            live,
            [row for section in sections for row in section.rows],
            [backends.bind(devices[section.device], section) for section in sections],
            Watch(live, found, idle, self.flat, self.read, self.moved),
            [span for s in sections for launch in s.launches for span in launch.spans if len(span.rows) > 1],
            [param for param in live if not param.is_inference()],
            self.generation,
        )
        self.plans.pop(key, None)
        self.plans[key] = made
        if only is None:
            self.usual = made
        while len(self.plans) > 1 and sum(len(kept.rows) for kept in self.plans.values()) > ROWS_KEPT * len(params):
            del self.plans[next(iter(self.plans))]
        gradients = made.watch.gradients()
        assert gradients is not None
        return made, gradients

    def _run(self, chosen: Plan, found: Found, values: Any, guard: Guard, capturing: bool) -> None:
        self.ran = chosen
        for runner in chosen.runners:
            runner.begin(*found, capturing)
        if self.guards and (chosen.runners or self.ranks):
            guard = self._checked(chosen, guard)
        for i, runner in enumerate(chosen.runners):
            # The norm is counted once.
            runner.run(values, guard if i == 0 else replace(guard, stats=None))
        self.moved.clear()
        self.arena.note_counters()
        # Kernels write through addresses, which autograd does not see.
        torch.autograd.graph.increment_version(chosen.written)

    def _checked(self, chosen: Plan, guard: Guard) -> Guard:
        """Add the norm of all gradients, over all devices, and the place for what users may ask of it."""
        sums = [runner.square_sum().reshape(1) for runner in chosen.runners]
        # A rank without gradients takes part, too.
        sums = sums or [torch.zeros(1, dtype=torch.float64, device=self.params[0].device)]
        total = sums[0]
        for other in sums[1:]:
            # Between GPUs this does not wait; to the CPU it must, or the sum would read what has not arrived.
            total = total + other.to(total.device)
        if self.ranks:
            total = self.ranks.total(total)
        if self.reduce_norm:
            total = arguments.check_norm(self.reduce_norm(total), total.device)
        if self.stats is None or self.stats.device != total.device:
            with lasting():
                stats = torch.zeros(table.STATS, dtype=torch.float64, device=total.device)
                self.stats = stats if self.stats is None else stats.copy_(self.stats)
        return replace(guard, square_sum=total, stats=self.stats)
