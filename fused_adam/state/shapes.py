"""Steps over fake tensors, which have shapes but no values.

Estimates of a model's memory run such steps. They make the state that a real step would make, and
update nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adam_kernels import table

from ..distributed import group_elements, is_sharded, local, to_dtensor
from ..precision import GROUP, GROUPED, parse
from ..torch_private import FakeTensor, under_fake_mode
from .arena import HOST, Groups, Params, State
from .validate import check_pair


def _is_fake(param: Tensor) -> bool:
    return isinstance(local(param), FakeTensor)


def are_all(params: Params) -> bool:
    """Whether a step is over fake tensors: parameters that were made under FakeTensorMode.

    Raises RuntimeError if only some are fake, or if the mode is on and the parameters are real.
    """
    # Two questions in an ordinary step, however many parameters there are.
    if not params or not (under_fake_mode() or _is_fake(params[0])):
        return False
    real = next((i for i, param in enumerate(params) if not _is_fake(param)), None)
    # Tables that are made under the mode have no addresses, so real parameters cannot use them.
    if real is not None:
        raise RuntimeError(
            f"parameter {real} is a real tensor, but others are fake or FakeTensorMode is on: "
            "make the whole model under the mode, or step outside of it"
        )
    return True


def refuse(action: str, params: Params) -> None:
    """Raise RuntimeError if some of the parameters are fake, or a mode is on."""
    if under_fake_mode() or any(map(_is_fake, params)):
        raise RuntimeError(
            f"{action} cannot be used under FakeTensorMode, because tensors have no values there"
        )


def step(
    groups: Groups,
    state: State,
    grads: Sequence[Tensor | None],
    only: Params | None,
    needs_norm: bool,
    on_host: bool = False,
) -> Tensor | None:
    """Make the state of every parameter that is stepped, and count the step.

    Args:
        groups, state: the optimizer's.
        grads: of all parameters in order, or None.
        only: the parameters to step; None: all that have a gradient.
        needs_norm: whether gradients are clipped or checked.
        on_host: whether state but the step counters is on the host.

    Returns the tensor that would hold the norm and the number of skipped steps, if `needs_norm`.
    Raises what a real step raises for a parameter or gradient that it cannot take.
    """
    params = [param for group in groups for param in group["params"]]
    numbers = [number for number, group in enumerate(groups) for _ in group["params"]]
    wanted = {id(param) for param in (params if only is None else only)}
    stepped = []
    for i, (number, param, grad) in enumerate(zip(numbers, params, grads, strict=True)):
        if grad is not None and id(param) in wanted:
            # Local parts can be compared once a DTensor's gradient has the parameter's placements.
            # Moving it there is a collective.
            if not is_sharded(param):
                check_pair(param, grad, f"parameter {i} (group {number})")
            stepped.append((groups[number], param))
    stats = None
    for group, param in stepped:
        # The mode may be off by now, but state has to be fake wherever its parameter is.
        with local(param).fake_mode:  # type: ignore[attr-defined]
            entry = state.setdefault(param, {})
            if not entry:
                entry.update(_entries(group, param, on_host))
            entry["step"] += 1
            if needs_norm and stats is None:
                stats = torch.zeros(table.STATS, dtype=torch.float64, device=param.device)
    torch.autograd.graph.increment_version([param for _, param in stepped])
    return stats


def _entries(group: dict[str, Any], param: Tensor, on_host: bool) -> Iterator[tuple[str, Tensor]]:
    """The parameter's state as a first step would make it: names and fake tensors."""
    part = local(param).detach()
    recipe = parse(group.get("precision"))
    yield "step", torch.zeros((), dtype=torch.float32, device=part.device)
    device = HOST if on_host else part.device
    ema = group.get("ema_decay") is not None
    entries = recipe.state(part.dtype, part.shape, bool(group["amsgrad"]), ema)
    for key, (dtype, _) in entries.items():
        if key in GROUPED:
            value = torch.zeros(-(-group_elements(param) // GROUP), dtype=dtype, device=device)
        else:
            value = torch.zeros_like(part, dtype=dtype, device=device)
        yield key, to_dtensor(param, key, value)
