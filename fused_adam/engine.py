"""The plans of one optimizer, and a step through the one that fits. No arguments of users, no
arithmetic here.
"""

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

from . import arguments, plan
from .backends import choose as backends
from .distributed import LocalShards, RankGroup, is_sharded
from .guards import PlanGuard, StateGuard, reader
from .numerics.scalars import GradTransform, hyper
from .state import shapes
from .state.arena import Arena, ParamState, State, advance_step_keys
from .state.flatten import FlatBuffers

# Plans are kept for the patterns of gradients that come back (experts, frozen layers): so many rows
# per parameter.
ROWS_KEPT = 8

Found = tuple[list[Tensor], list[int]]
Key = tuple[bool, tuple[int, ...], tuple[int, ...]]


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """For making memory: under the user's inference mode it could never be written outside that
    mode.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def members_of(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """All parameters, in order."""
    return list(chain.from_iterable([group["params"] for group in groups]))


def plan_facts(groups: Sequence[dict[str, Any]]) -> list[Any]:
    """Per group, what plans are made for: the number of its parameters, AMSGrad, precision and
    seed.
    """
    try:
        return [
            (len(group["params"]), group["amsgrad"], group.get("precision"), group.get("seed"))
            for group in groups
        ]
    except TypeError:
        lists = [group["params"] for group in groups]
        number = next(i for i, params in enumerate(lists) if not hasattr(params, "__len__"))
        raise TypeError(
            f"param_groups[{number}]['params'] is a {type(lists[number]).__name__}, but must be a list: what can be "
            "read only once has no parameters at the next step"
        ) from None


@dataclass(slots=True, eq=False)
class CachedPlan:
    """How one set of parameters is stepped. On the kernel, plans do not keep state alive."""

    live: list[Tensor]  # the parameters, in order
    param_states: list[ParamState]  # of the rows' state
    runners: list[backends.Runner]
    watch: PlanGuard
    state: StateGuard
    spans: list[list[ParamState]]  # several rows that are updated as one
    # Whose versions a step counts up: parameters, which autograd saves for backward, and step
    # counters of the user's, which another optimizer may share. Moments are nobody else's business.
    written: list[Tensor]

    def coherent(self) -> bool:
        """Whether rows that are updated as one still have one step count."""
        return all(
            param_state.step_key == span[0].step_key for span in self.spans for param_state in span
        )


class Engine:
    """Steps the parameters of one optimizer.

    Args:
        backend: as the optimizer's.
        max_grad_norm, skip_nonfinite, grad_attribute: as the optimizer's.
    """

    def __init__(
        self, backend: str, max_grad_norm: float | None, skip_nonfinite: bool, grad_attribute: str
    ) -> None:
        self.backend, self.read = backend, reader(grad_attribute)
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.needs_norm = max_grad_norm is not None or skip_nonfinite
        self.arena = Arena()
        self.flat: FlatBuffers | None = None
        self.stats: Tensor | None = None
        self.ranks: RankGroup | None = None  # where parameters are DTensors
        self.in_norm: list[bool] = []
        self.reduce_norm: Callable[[Tensor], Tensor] | None = None
        self.redistributed: dict[Tensor, Tensor] = {}
        self.state_moves = 0
        self.ran: CachedPlan | None = None
        # What captured graphs read and write: nothing of it may be freed while they can be
        # replayed.
        self.captured: dict[int, tuple[CachedPlan, list[Any]]] = {}
        # What the optimizer's methods set. Here, because frameworks wrap an optimizer by copying
        # its __dict__: the engine is the same for both.
        self.release: Any = None  # the handle of `step_in_backward`, while it steps
        self.origins: Any = None  # while offloaded: where state came from
        self.forget()

    def forget(self) -> None:
        """Drop every plan."""
        self._note_steps()
        self.params: list[Tensor] = []
        self.members: dict[int, list[int]] = {}  # id of a parameter -> its positions
        self.options: list[Any] = []
        self.plans: dict[Key, CachedPlan] = {}
        self.usual: CachedPlan | None = None

    def step(
        self,
        groups: Sequence[dict[str, Any]],
        state: State,
        guard: GradTransform,
        check_group: Callable[[dict[str, Any]], None],
        only: Sequence[Tensor] | None = None,
    ) -> None:
        """Step every parameter that has a gradient, or those alone that are given.

        Args:
            groups: the optimizer's param groups; their values are read anew every time.
            state: the optimizer's state.
            guard: a GradScaler's scale and flag.
            check_group: raises if a group cannot be stepped: called when groups are not those of
                the last step.
            only: some of the parameters; each of these has a gradient.

        Raises what `plan.build` raises, before anything is changed.
        """
        capturing = backends.is_capturing()
        self.redistributed.clear()  # of a step that failed
        known = self._still_known(groups)
        params = self.params if known else members_of(groups)
        if shapes.are_all(params):
            self.stats = shapes.step(groups, state, self.read(params), only, self.needs_norm)
            return
        known = known and self.arena.counters_unchanged()
        if self.flat:
            self.flat.always = self.flat.uncounted or any(group["capturable"] for group in groups)
        found = self._find(state, self._positions(only)) if known else None
        if found is None:
            if capturing:
                raise RuntimeError(
                    "this step cannot be captured in a CUDA graph, because what it needs is not there yet: run a step "
                    "with the same parameters, and gradients of the same layout, before the capture"
                )
            if not known:
                for group in groups:
                    check_group(group)
                self._learn(groups)
            with outside_inference_mode():
                found = self._build_with_others(groups, state, self._positions(only))
        self._run(
            *found,
            [hyper(group, self.max_grad_norm, self.skip_nonfinite) for group in groups],
            guard,
            capturing,
        )

    def init_state(
        self,
        groups: Sequence[dict[str, Any]],
        state: State,
        check_group: Callable[[dict[str, Any]], None],
    ) -> None:
        """Make the state of every parameter that is trained, with no step counted."""
        for group in groups:
            check_group(group)
        self._learn(groups)
        with outside_inference_mode():
            plan.make_state(
                self.params,
                [number for number, group in enumerate(groups) for _ in group["params"]],
                [plan.options_of(group) for group in groups],
                self.arena,
                state,
            )

    def _still_known(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether groups have the parameters and options that plans were made for, and state is
        where it was.
        """
        params = chain.from_iterable([group["params"] for group in groups])
        return (
            plan_facts(groups) == self.options  # so there are as many parameters
            and all(map(operator.is_, params, self.params))
            and self.state_moves == self.arena.state_moves
        )

    def _learn(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take the groups as they are now, and drop what was decided for others."""
        self.forget()
        self.params, self.options = members_of(groups), plan_facts(groups)
        for i, param in enumerate(self.params):
            self.members.setdefault(id(param), []).append(i)
        if self.flat:
            self.flat.keep(self.params)
        self.arena.read_counters()

    def _positions(self, only: Sequence[Tensor] | None) -> tuple[int, ...] | None:
        """Where these parameters are among all; those that the optimizer no longer has are left
        out.
        """
        if only is None:
            return None
        return tuple(sorted(i for param in only for i in self.members.get(id(param), ())))

    def read_grads(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of these parameters."""
        return self.flat.read(params) if self.flat else self.read(params)

    def _find(self, state: State, only: tuple[int, ...] | None) -> tuple[CachedPlan, Found] | None:
        """The plan for this step, with the gradients it takes; None if none fits."""
        if only is None and self.usual:
            found = self._fit(self.usual, state)
            if found:
                return self.usual, found
        key = self._key(only)
        kept = self.plans.get(key)
        found = self._fit(kept, state) if kept else None
        if kept is None or found is None:
            return None
        self.plans[key] = self.plans.pop(key)  # the last to be dropped
        if only is None:
            self.usual = kept
        return kept, found

    def _key(self, only: tuple[int, ...] | None) -> Key:
        """What plans are kept by: which parameters are stepped, and whose gradients lie in flat
        buffers.
        """
        if only is not None:
            return True, only, ()
        grads = self.read_grads(self.params)
        in_buffers = self.flat.in_buffers(self.params, grads) if self.flat else ()
        return (
            False,
            tuple(compress(count(), map(operator.is_not, grads, repeat(None)))),
            in_buffers,
        )

    def _fit(self, kept: CachedPlan, state: State) -> Found | None:
        if not kept.state.holds(state):
            return None
        if kept is not self.ran:
            self._note_steps()
            if not kept.coherent():
                return None
        return kept.watch.gradients()

    def _note_steps(self) -> None:
        """Before another plan is looked at: the parameters of the last one have moved on together."""
        if self.ran:
            advance_step_keys(self.ran.param_states)
            self.ran = None

    def _build_with_others(
        self, groups: Sequence[dict[str, Any]], state: State, only: tuple[int, ...] | None
    ) -> tuple[CachedPlan, Found]:
        """`_build`; where parameters are DTensors, the first time on all ranks or on none."""
        if not any(map(is_sharded, self.params)):
            self.ranks, self.in_norm = None, []
            return self._build(groups, state, only)
        if self.ranks is None or list(map(id, self.ranks.params)) != list(map(id, self.params)):
            ranks, failure, found = RankGroup(self.params), None, None
            self.in_norm = ranks.check_agreement(self._facts(groups))
            try:
                found = self._build(groups, state, only)
            except Exception as error:
                failure = error
            try:
                ranks.raise_if_any_failed(failure)
            except Exception:
                self.forget()  # the next step has to ask again
                raise
            self.ranks = ranks
        else:
            found = self._build(groups, state, only)
        assert found is not None
        return found

    def _facts(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
        """What every rank must have alike, per parameter."""
        members = [
            (number, group, param)
            for number, group in enumerate(groups)
            for param in group["params"]
        ]
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
            for (number, group, param), grad in zip(
                members, self.read_grads(self.params), strict=True
            )
        ]

    def _build(
        self, groups: Sequence[dict[str, Any]], state: State, only: tuple[int, ...] | None
    ) -> tuple[CachedPlan, Found]:
        """Decide anew what each launch updates, and make the state it needs."""
        self._note_steps()
        params = self.params
        if self.flat:
            self.flat.look_for_uncounted()
        key = self._key(only)
        chosen = set(key[1])
        grads = [grad if i in chosen else None for i, grad in enumerate(self.read_grads(params))]
        live, found = [], []
        for param, grad in zip(params, grads, strict=True):
            if grad is not None:
                live.append(param)
                found.append(grad)
        if any(map(is_sharded, live)):
            found = LocalShards(live).gradient_parts(found, self.redistributed)
            rest = iter(found)
            grads = [None if grad is None else next(rest) for grad in grads]
        devices = {
            device: backends.choose(self.backend, device)
            for device in {param.device for param in live}
        }
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
        if self.state_moves != self.arena.state_moves:
            self.plans.clear()
            self.usual = None
            self.state_moves = self.arena.state_moves
        rows = [row for section in sections for row in section.rows]
        for row in rows if self.in_norm else ():
            row.in_norm = self.in_norm[row.param_index]
        in_order = sorted(rows, key=operator.attrgetter("grad_index"))
        idle = [
            param
            for param, grad in zip(params, grads, strict=True)
            if grad is None and only is None
        ]
        spans = [
            span for section in sections for launch in section.launches for span in launch.spans
        ]
        made = CachedPlan(
            live,
            [row.param_state for row in rows],
            [
                backends.bind(devices[section.device], section, self.needs_norm)
                for section in sections
            ],
            PlanGuard(live, found, idle, self.flat, self.read, self.redistributed),
            StateGuard(
                state, [(live[row.grad_index], row.param_state, row.dtypes) for row in in_order]
            ),
            [[row.param_state for row in span.rows] for span in spans if len(span.rows) > 1],
            [param for param in live if not param.is_inference()]
            + [
                row.param_state.counters.steps
                for row in rows
                if row.param_state.counters and not row.param_state.counters.ours
            ],
        )
        self.plans.pop(key, None)
        if live or not self.flat:  # else every step looks again for gradients that nothing counted
            self.plans[key] = made
        if only is None and live:
            self.usual = made
        while len(self.plans) > 1 and sum(
            len(kept.param_states) for kept in self.plans.values()
        ) > ROWS_KEPT * len(params):
            del self.plans[next(iter(self.plans))]
        gradients = made.watch.gradients()
        assert gradients is not None
        return made, gradients

    def _run(
        self, chosen: CachedPlan, found: Found, values: Any, guard: GradTransform, capturing: bool
    ) -> None:
        self.ran = chosen
        for runner in chosen.runners:
            runner.begin(*found, capturing)
        if self.needs_norm and self.params:
            guard = self._checked(chosen, guard)
            if not chosen.runners:
                guard.record(self.skip_nonfinite)
        for i, runner in enumerate(chosen.runners):
            # The norm is counted once.
            runner.run(values, guard if i == 0 else replace(guard, stats=None))
        self.redistributed.clear()
        self.arena.note_counters()
        # Kernels write through addresses, which nobody else sees.
        torch.autograd.graph.increment_version(chosen.written)
        if capturing:
            self._keep_captured(chosen)

    def _keep_captured(self, chosen: CachedPlan) -> None:
        memory: list[Any] = [self.stats]
        for param_state in chosen.param_states:
            memory += [param_state.counters, *param_state.slots.values()]
        if self.flat:
            memory += self.flat.grad_segments
        self.captured[id(chosen)] = chosen, memory

    def _checked(self, chosen: CachedPlan, guard: GradTransform) -> GradTransform:
        """Add the norm of all gradients, over all devices, and the place for what users may ask of
        it.
        """
        sums = [runner.square_sum().reshape(1) for runner in chosen.runners]
        # A rank without gradients takes part, too.
        sums = sums or [torch.zeros(1, dtype=torch.float64, device=self.params[0].device)]
        total = sums[0]
        for other in sums[1:]:
            # Between GPUs this does not wait; to the CPU it must, or the sum would read what has
            # not arrived.
            total = total + other.to(total.device)
        if self.ranks:
            total = self.ranks.sum_norms(total)
        if self.reduce_norm:
            total = arguments.check_norm(self.reduce_norm(total), total.device)
        if self.stats is None or self.stats.device != total.device:
            with outside_inference_mode():
                stats = torch.zeros(table.STATS, dtype=torch.float64, device=total.device)
                self.stats = stats if self.stats is None else stats.copy_(self.stats)
        return replace(guard, square_sum=total, stats=self.stats)
