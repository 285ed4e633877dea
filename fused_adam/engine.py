"""Caches the plans of one optimizer, and runs each step through the plan that fits.

The optimizer checks its users' arguments before it calls; backends do the arithmetic.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from itertools import chain, compress, count, repeat
from typing import Any

import torch
from torch import Tensor

from fused_adam_kernels import table

from . import arguments, plan
from .backends import choose as backends
from .backends.pieces import state_bytes
from .backends.streaming import Ring
from .cached_plan import CachedPlan, Match, PlanKey, bind
from .distributed import LocalShards, RankGroup, is_sharded, local
from .grad_norms import GradNorms
from .guards import Gradients, PlanGuard, StateGuard, reader
from .numerics.scalars import GradTransform, hyper
from .state import shapes
from .state.arena import Arena, Groups, Params, State
from .state.convert import keep_dtype_of_moments
from .state.flatten import FlatBuffers
from .state.memory import as_real
from .state.param_state import advance_step_keys

# Patterns of missing gradients come back (experts, frozen layers), and so should their plans. They
# are bounded by rows, which is what takes memory: this many per parameter, over all plans.
MAX_CACHED_ROWS = 8

# What launches depend on, so it has to be equal on every rank.
OPTIONS_OF_PLANS = ("amsgrad", "precision", "seed", "cautious", "ema_decay")

CheckGroup = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Allocate memory that can be written at any time.

    What is allocated in the user's inference mode could never be written outside of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def params_of(groups: Groups) -> list[Tensor]:
    """Return the parameters of all groups, in order."""
    return list(chain.from_iterable([group["params"] for group in groups]))


def plan_options(groups: Groups) -> list[tuple[Any, ...]]:
    """Return what a plan assumes about each group, as written there.

    These are the number of parameters, amsgrad, precision, seed, cautious, and whether weights are
    averaged. All other values of a group may change from step to step, but for the kind of decay
    where it is cautious.
    """
    try:
        return [
            (
                len(group["params"]),
                group["amsgrad"],
                group.get("precision"),
                group.get("seed"),
                # Only decoupled decay can be cautious, so a change of the kind has to be checked.
                group.get("cautious") and (group["cautious"], group["decoupled_weight_decay"]),
                group.get("ema_decay") is not None,
            )
            for group in groups
        ]
    except TypeError:
        lists = [group["params"] for group in groups]
        number = next(i for i, params in enumerate(lists) if not hasattr(params, "__len__"))
        raise TypeError(
            f"param_groups[{number}]['params'] is a {type(lists[number]).__name__}, but must be a "
            "list: what can be read only once has no parameters at the next step"
        ) from None


def _comparable(option: object) -> object:
    """An option as ranks compare it: the value of a tensor would have to be waited for."""
    return "a tensor" if isinstance(option, Tensor) else option


class Engine:
    """Steps the parameters of one optimizer.

    A step needs a plan: which launches update which memory. Making one takes milliseconds, so plans
    are cached, one per set of parameters that have a gradient, and each is guarded. On an ordinary
    step that guard is nearly all the Python that runs.

    Args:
        backend, max_grad_norm, skip_nonfinite, skip_grad_norm, grad_attribute, state_device,
        stream_bytes: the optimizer's arguments.
    """

    def __init__(
        self,
        backend: str,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        skip_grad_norm: float | Tensor | None,
        grad_attribute: str,
        state_device: str | None,
        stream_bytes: int,
    ) -> None:
        self.backend, self.read_attribute = backend, reader(grad_attribute)
        self.max_grad_norm, self.skip_spikes = max_grad_norm, skip_grad_norm is not None
        # A limit skips what is not finite as well, so `skip_nonfinite` is a limit of infinity.
        infinity = math.inf if skip_nonfinite else None
        self.skip_grad_norm = infinity if skip_grad_norm is None else skip_grad_norm
        self.needs_norm = max_grad_norm is not None or self.skip_grad_norm is not None
        self.reduce_norm: Callable[[Tensor], Tensor] | None = None  # see `FusedAdam.reduce_norm`
        self.stats: Tensor | None = None  # the last gradient norm, and what else `table.py` says
        self.last_norms: GradNorms | None = None  # of the last step, by parameter

        self.state_device, self.stream_bytes = state_device, stream_bytes
        self.arena = Arena(on_host=state_device is not None)
        self.rings: dict[torch.device, Ring] = {}  # what state on the host is streamed through
        self.flat: FlatBuffers | None = None  # with flatten=True
        self.ranks: RankGroup | None = None  # where parameters are DTensors
        # Per parameter, whether its gradient counts here: of copies, one rank's does. Empty: all.
        self.in_norm: list[bool] = []
        self.redistributed: dict[Tensor, Tensor] = {}  # this step's gradients in other placements

        self.state_moves = 0  # the arena's count when plans were made
        self.last_run: CachedPlan | None = None
        # What captured graphs read and write may not be freed while they can be replayed.
        self.captured: dict[int, tuple[CachedPlan, list[Any]]] = {}

        # Set by the optimizer, but kept here: frameworks wrap an optimizer by copying its __dict__,
        # and both have this engine.
        self.in_backward: Any = None  # the handle of `step_in_backward`
        self.origins: Any = None  # while state is offloaded: the devices it came from
        self.swapped = False  # whether parameters hold the averages of their weights
        self.drop_plans()

    def drop_plans(self) -> None:
        """Forget every plan; the next step makes one."""
        self._advance_step_keys()
        # Plans have addresses in the rings. The next ones may need larger buffers.
        self.finish_copies()
        self.rings.clear()
        self.params: list[Tensor] = []
        self.positions: dict[int, list[int]] = {}  # id of a parameter -> where it is listed
        self.group_numbers: list[int] = []  # per parameter
        self.plan_options: list[tuple[Any, ...]] = []  # as read from the groups
        self.options: list[plan.Options] = []  # the same, parsed
        self.plans: dict[PlanKey, CachedPlan] = {}  # least recently used first
        self.usual: CachedPlan | None = None  # tried first, before a key is made

    def finish_copies(self) -> None:
        """Wait until state on the host is what the last step has made of it."""
        for ring in self.rings.values():
            ring.finish()

    def step(
        self,
        groups: Groups,
        state: State,
        transform: GradTransform,
        check_group: CheckGroup,
        only: Params | None = None,
    ) -> None:
        """Step every parameter that has a gradient, or only the given ones.

        Args:
            groups: the optimizer's param groups; their values are read anew every time.
            state: the optimizer's state.
            transform: a GradScaler's scale and overflow flag.
            check_group: raises if a group cannot be stepped; called for groups that were edited.
            only: parameters to step, each of which has a gradient.

        Raises what `plan.build` raises, before anything is changed.
        """
        self.redistributed.clear()  # left over if the last step raised
        if self.flat:
            # With `capturable` a graph's replays may write gradients, which no version counts.
            capturable = any(group["capturable"] for group in groups)
            self.flat.always = self.flat.uncounted or capturable
        match = self._find_plan(groups, state, only)
        if match is None:
            params = params_of(groups)
            if shapes.are_all(params):
                grads = self.read_attribute(params)
                on_host = self.arena.on_host
                self.stats = shapes.step(groups, state, grads, only, self.needs_norm, on_host)
                return
            match = self._plan_anew(groups, state, check_group, only)
        self._run(match, groups, transform)

    def init_state(self, groups: Groups, state: State, check_group: CheckGroup) -> None:
        """Make the state of every parameter that requires gradients, with step count 0."""
        self.finish_copies()
        for group in groups:
            keep_dtype_of_moments(group, state, self.arena)
        self._learn(groups, check_group)
        with outside_inference_mode():
            plan.make_state(self.params, self.group_numbers, self.options, self.arena, state)

    def grad_norms(self) -> dict[Tensor, Tensor]:
        """Return the norm of each parameter that had a gradient in the last step.

        With DTensors it is a collective.
        """
        if self.last_norms is None or self.stats is None:
            return {}
        with torch.no_grad():
            return self.last_norms.by_param(self.stats[table.GRAD_SCALE], self.ranks)

    def read_grads(self, params: Params) -> list[Tensor | None]:
        """Return the gradients; None for flat ones that nothing has written to."""
        return self.flat.read(params) if self.flat else self.read_attribute(params)

    # Finding a plan

    def _find_plan(self, groups: Groups, state: State, only: Params | None) -> Match | None:
        """Return a cached plan whose guard holds, or None."""
        if not self._are_current(groups):
            return None
        if only is None and self.usual:
            grads = self._gradients_if_valid(self.usual, state)
            if grads:
                return Match(self.usual, grads)
        key = self._key(only)
        cached = self.plans.get(key)
        grads = self._gradients_if_valid(cached, state) if cached else None
        if cached is None or grads is None:
            return None
        self.plans[key] = self.plans.pop(key)  # now the most recently used
        if only is None:
            self.usual = cached
        return Match(cached, grads)

    def _are_current(self, groups: Groups) -> bool:
        """Whether plans were made for these parameters and options, and for where state is now."""
        params = chain.from_iterable([group["params"] for group in groups])
        return (
            plan_options(groups) == self.plan_options  # so there are as many parameters
            and all(map(operator.is_, params, self.params))
            and self.state_moves == self.arena.state_moves
        )

    def _key(self, only: Params | None) -> PlanKey:
        if only is not None:
            # Parameters that the optimizer no longer has are left out.
            known = (self.positions.get(id(param), ()) for param in only)
            return PlanKey(True, tuple(sorted(chain.from_iterable(known))), ())
        grads = self.read_grads(self.params)
        # Without a Python frame per parameter: experts come here in every step.
        positions = tuple(compress(count(), map(operator.is_not, grads, repeat(None))))
        in_buffers = self.flat.in_buffers(self.params, grads) if self.flat else ()
        return PlanKey(False, positions, in_buffers)

    def _gradients_if_valid(self, cached: CachedPlan, state: State) -> Gradients | None:
        """Return this step's gradients of the plan, or None if it no longer fits."""
        if cached is not self.last_run:
            self._advance_step_keys()
            if not cached.step_counts_agree():
                return None
        return cached.guard.gradients(state)

    def _advance_step_keys(self) -> None:
        """Record that the parameters of the last plan have advanced together, and others have not.

        Only a change of plans needs this, so ordinary steps do not pay for it.
        """
        if self.last_run:
            advance_step_keys(self.last_run.param_states)
            self.last_run = None

    # Making a plan

    def _plan_anew(
        self, groups: Groups, state: State, check_group: CheckGroup, only: Params | None
    ) -> Match:
        """Make the plan for this step, and first read the groups again if they have changed."""
        if backends.is_capturing():
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph, because what it needs is not there "
                "yet: run a step with the same parameters, and gradients of the same layout, "
                "before the capture"
            )
        self.finish_copies()  # state may be copied to where the plan wants it
        for group in groups:
            keep_dtype_of_moments(group, state, self.arena)
        if not (self._are_current(groups) and self.arena.counters_unchanged()):
            self._learn(groups, check_group)
        with outside_inference_mode():
            return self._build_on_all_ranks(groups, state, only)

    def _learn(self, groups: Groups, check_group: CheckGroup) -> None:
        """Read parameters and options from the groups, and drop the plans made for others."""
        for group in groups:
            check_group(group)
        self.drop_plans()
        self.params, self.plan_options = params_of(groups), plan_options(groups)
        self.options = [plan.options_of(group) for group in groups]
        self.group_numbers = [i for i, group in enumerate(groups) for _ in group["params"]]
        for i, param in enumerate(self.params):
            self.positions.setdefault(id(param), []).append(i)
        if self.flat:
            self.flat.keep(self.params)
        self.arena.read_counters()

    def _build_on_all_ranks(self, groups: Groups, state: State, only: Params | None) -> Match:
        """Build the plan. Where parameters are DTensors, the first one is for all ranks or none.

        A rank that raised alone would leave the others waiting in a collective.
        """
        if not any(map(is_sharded, self.params)):
            self.ranks, self.in_norm = None, []
            return self._build(state, only)
        if self.ranks and list(map(id, self.ranks.params)) == list(map(id, self.params)):
            return self._build(state, only)
        ranks = RankGroup(self.params)
        self.in_norm = ranks.check_agreement(self._facts(groups))
        match, failure = None, None
        try:
            match = self._build(state, only)
        except Exception as error:
            failure = error
        try:
            ranks.raise_if_any_failed(failure)
        except Exception:
            self.drop_plans()  # the next step has to ask again
            raise
        assert match is not None
        self.ranks = ranks
        return match

    def _facts(self, groups: Groups) -> list[dict[str, object]]:
        """Return per parameter what has to be equal on every rank, by name."""
        grads, limit = self.read_grads(self.params), self.skip_grad_norm
        return [
            {
                "shape": tuple(param.shape),
                "dtype": param.dtype,
                "placements": getattr(param, "placements", "none"),
                "gradient": grad is not None,
                "group": number,
                **{key: _comparable(groups[number].get(key)) for key in OPTIONS_OF_PLANS},
                "max_grad_norm": self.max_grad_norm,
                "skip_grad_norm": _comparable(limit),
            }
            for param, number, grad in zip(self.params, self.group_numbers, grads, strict=True)
        ]

    def _build(self, state: State, only: Params | None) -> Match:
        """Decide what each launch updates, make the state it needs, and cache the plan."""
        self._advance_step_keys()
        if self.flat:
            self.flat.look_for_uncounted()
        key, all_grads = self._key(only), self.read_grads(self.params)
        stepped = [self.params[i] for i in key.positions]
        grads: list[Any] = [all_grads[i] for i in key.positions]
        if any(map(is_sharded, stepped)):
            grads = LocalShards(stepped).gradient_parts(grads, self.redistributed)
        by_position = dict(zip(key.positions, grads, strict=True))
        devices = {param.device for param in stepped}
        names = {device: backends.choose(self.backend, device) for device in devices}
        for device in filter(self.arena.is_streamed, devices):
            backends.check_streams(device, names[device])
        launch_groups = plan.build(
            params=self.params,
            grads=by_position,
            groups=self.group_numbers,
            options=self.options,
            arena=self.arena,
            state=state,
            buffers=self.flat,
            staging={device: backends.staging(name) for device, name in names.items()},
        )
        if self.state_moves != self.arena.state_moves:  # plans point to where it was
            self.plans.clear()
            self.usual = None
            self.state_moves = self.arena.state_moves
        # Others must have no gradient, or they would be left out. If the caller names what to step,
        # the others may have one.
        idle: list[Tensor] = []
        if only is None:
            idle = [param for i, param in enumerate(self.params) if i not in by_position]
        rows = [row for group in launch_groups for row in group.rows]
        for row in rows if self.in_norm else ():
            row.in_norm = self.in_norm[row.param_index]
        guard = PlanGuard(
            stepped,
            grads,
            idle,
            buffers=self.flat,
            read=self.read_attribute,
            redistributed=self.redistributed,
            arena=self.arena,
            state_guard=StateGuard(state, rows),
        )
        for device in filter(self.arena.is_streamed, devices - self.rings.keys()):
            self.rings[device] = Ring(device, self._buffer_bytes(device))
        cached = bind(
            launch_groups,
            names,
            self.needs_norm,
            self.skip_spikes,
            guard,
            self.params,
            self.rings,
        )
        self._cache(key, cached)
        gradients = cached.guard.gradients(state)
        assert gradients is not None
        return Match(cached, gradients)

    def _buffer_bytes(self, device: torch.device) -> int:
        """How large buffers for state have to be: no larger than the state of all parameters."""
        parts = [local(param) for param in self.params]
        needed = sum(
            state_bytes(self.options[group].entries(part).items(), as_real(part).numel())
            for part, group in zip(parts, self.group_numbers, strict=True)
            if part.device == device
        )
        return min(self.stream_bytes, needed)

    def _cache(self, key: PlanKey, cached: CachedPlan) -> None:
        """Keep the plan, and drop those that were not used for longest if there are too many."""
        self.plans.pop(key, None)
        # A plan that steps nothing would stop `look_for_uncounted` from looking at flat gradients.
        if key.positions or not self.flat:
            self.plans[key] = cached
        if key.positions and not key.given:
            self.usual = cached
        rows = sum(len(other.param_states) for other in self.plans.values())
        while len(self.plans) > 1 and rows > MAX_CACHED_ROWS * len(self.params):
            rows -= len(self.plans.pop(next(iter(self.plans))).param_states)

    # Running a plan

    def _run(self, match: Match, groups: Groups, transform: GradTransform) -> None:
        """Launch everything. Nothing here waits for a device, except where the CPU reads a norm.

        Raises ValueError for a decay of averages that its user has edited to something else.
        """
        cached, grads = match
        for group in groups:
            if "ema_decay" in group:
                arguments.as_ema_decay(group["ema_decay"])  # it may change at every step
        hypers = [hyper(group, self.max_grad_norm, self.skip_grad_norm) for group in groups]
        capturing = backends.is_capturing()
        self.last_run = cached
        for runner in cached.runners:
            runner.begin(grads.tensors, grads.addresses, capturing)
        if self.needs_norm and self.params:
            transform = self._with_norm(cached, transform)
            self.last_norms = cached.grad_norms
            if not cached.runners:
                transform.record(self.skip_grad_norm)
        if len(cached.runners) > 1:  # one alone fails before it changes anything
            for runner in cached.runners:
                runner.prepare(hypers, transform)
        for i, runner in enumerate(cached.runners):
            # The first one records norm and skip; all of them would count a skipped step twice.
            runner.run(hypers, transform if i == 0 else transform._replace(stats=None))
        self.redistributed.clear()
        self.arena.note_counters()
        torch.autograd.graph.increment_version(cached.versions_to_bump)
        if capturing:
            self._keep_for_replays(cached)

    def _with_norm(self, cached: CachedPlan, transform: GradTransform) -> GradTransform:
        """Add the norm of all gradients on all devices and ranks, and where to record it."""
        sums = [runner.square_sum().reshape(1) for runner in cached.runners]
        # A rank without gradients takes part in the sum over ranks, too.
        sums = sums or [torch.zeros(1, dtype=torch.float64, device=self.params[0].device)]
        total = sums[0]
        for other in sums[1:]:
            # Does not wait between GPUs. To the CPU it has to, or the sum would read what has not
            # arrived.
            total = total + other.to(total.device)
        if self.ranks:
            total = self.ranks.sum_norms(total)
        if self.reduce_norm:
            total = arguments.check_norm(self.reduce_norm(total), total.device)
        if self.stats is None or self.stats.device != total.device:
            with outside_inference_mode():
                stats = torch.zeros(table.STATS, dtype=torch.float64, device=total.device)
                self.stats = stats if self.stats is None else stats.copy_(self.stats)
        return transform._replace(square_sum=total, stats=self.stats)

    def _keep_for_replays(self, cached: CachedPlan) -> None:
        memory: list[Any] = [self.stats]
        for param_state in cached.param_states:
            memory += [param_state.counters, *param_state.slots.values()]
        if self.flat:
            memory += self.flat.grad_segments
        self.captured[id(cached)] = cached, memory
