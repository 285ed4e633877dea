"""A plan that is ready to run: with runners for its launches, and a guard that says if it fits.

The engine caches these and decides which of them a step takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import choose as backends
from .backends.streaming import Ring
from .grad_norms import GradNorms
from .guards import Gradients, PlanGuard
from .plan import LaunchGroup
from .state.param_state import ParamState


class PlanKey(NamedTuple):
    """What plans are cached by."""

    given: bool  # whether the caller says which parameters to step
    positions: tuple[int, ...]  # of the parameters that are stepped
    in_buffers: tuple[int, ...]  # of those whose gradients lie in flat buffers


@dataclass(slots=True, eq=False)
class CachedPlan:
    """How to step one set of parameters; runs again as long as its guard holds.

    With the Triton backend a plan keeps addresses, and no state alive.
    """

    param_states: list[ParamState]  # of the parameters that it steps
    runners: list[backends.Runner]  # one per device and arithmetic type
    guard: PlanGuard
    # Rows that are updated as one have one bias correction, so they need equal step counts.
    coalesced: list[list[ParamState]]
    # Autograd has to learn that these changed, because kernels write through addresses: parameters,
    # which it may have saved for a backward, and step counters that the user set and may share with
    # another optimizer. Nobody else uses our moments.
    versions_to_bump: list[Tensor]
    grad_norms: GradNorms  # of its last step; empty without a norm

    def step_counts_agree(self) -> bool:
        """Whether the parameters that are updated as one still have equal step counts."""
        return all(
            param_state.step_key == rows[0].step_key
            for rows in self.coalesced
            for param_state in rows
        )


class Match(NamedTuple):
    """A plan that fits this step, and the gradients that it takes."""

    plan: CachedPlan
    grads: Gradients


def bind(
    launch_groups: Sequence[LaunchGroup],
    names: Mapping[torch.device, str],
    takes_norm: bool,
    skip_spikes: bool,
    guard: PlanGuard,
    params: Sequence[Tensor],
    rings: Mapping[torch.device, Ring],
) -> CachedPlan:
    """Give every launch group the runner that launches it.

    Args:
        launch_groups: what `plan.build` decided.
        names: for every device, its backend, as `backends.choose` returns it.
        takes_norm: whether the runners are asked for sums of squares.
        skip_spikes: whether steps of large norms are skipped, too.
        guard: says whether the plan still fits.
        params: all parameters of the optimizer, in order.
        rings: what state is streamed through, for devices whose state is on the host.
    """
    rows = [row for group in launch_groups for row in group.rows]
    launches = [launch for group in launch_groups for launch in group.launches]
    spans = [span.rows for launch in launches for span in launch.spans]
    counters = [row.param_state.counters for row in rows]
    runners = [
        backends.bind(names[group.device], group, takes_norm, skip_spikes, rings.get(group.device))
        for group in launch_groups
    ]
    return CachedPlan(
        param_states=[row.param_state for row in rows],
        runners=runners,
        guard=guard,
        coalesced=[[row.param_state for row in span] for span in spans if len(span) > 1],
        versions_to_bump=[
            *(row.user_param for row in rows if not row.user_param.is_inference()),
            *(owner.steps for owner in counters if owner and not owner.ours),
        ],
        grad_norms=GradNorms(
            params, [runner.partial_sums for runner in runners if runner.partial_sums]
        ),
    )
