"""Steps over fake tensors, which have shapes and no values: they make the state, for whoever
estimates memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fused_adam_kernels import table

from .distributed import group_elements, is_sharded, local, to_dtensor
from .plan import check, options_of
from .precision import GROUP, GROUPED
from .state.arena import State


def _is_fake(param: Tensor) -> bool:
    return isinstance(local(param), FakeTensor)


def under_fake_mode() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def are_all(params: Sequence[Tensor]) -> bool:
    """Whether a step is over fake tensors: parameters that were made under FakeTensorMode.

    Raises RuntimeError if some are real, or a mode is on and all are: tables made there would have
    no addresses.
    """
    # Two questions in an ordinary step, however many parameters there are.
    if not params or not (under_fake_mode() or _is_fake(params[0])):
        return False
    real = next((i for i, param in enumerate(params) if not _is_fake(param)), None)
    if real is not None:
        raise RuntimeError(
            f"parameter {real} is a real tensor, but others are fake or FakeTensorMode is on: make the whole model "
            "under the mode, or step outside of it"
        )
    return True


def refuse(action: str, params: Sequence[Tensor]) -> None:
    """Raise RuntimeError if some of the parameters are fake, or a mode is on."""
    if under_fake_mode() or any(map(_is_fake, params)):
        raise RuntimeError(
            f"{action} cannot be used under FakeTensorMode, because tensors have no values there"
        )


def step(
    groups: Sequence[dict[str, Any]],
    state: State,
    grads: Sequence[Tensor | None],
    only: Sequence[Tensor] | None,
    needs_norm: bool,
) -> Tensor | None:
    """Make the state of parameters that have a gradient and count their step: the memory that a
    real one would hold.

    Args:
        groups, state: the optimizer's.
        grads: of all parameters in order, or None.
        only: the parameters to step; None: all that have a gradient.
        guards: whether gradients are clipped or checked.

    Returns what the norm and the number of skipped steps would be kept in, if gradients are clipped
    or checked. Raises what a real step raises for a parameter or gradient that it cannot take.
    """
    members = [
        (number, group, param) for number, group in enumerate(groups) for param in group["params"]
    ]
    chosen = None if only is None else set(map(id, only))
    live = [
        (i, number, group, param, grad)
        for i, ((number, group, param), grad) in enumerate(zip(members, grads, strict=True))
        if grad is not None and (chosen is None or id(param) in chosen)
    ]
    for i, number, _, param, grad in live:
        if not is_sharded(param):
            check(param, grad, f"parameter {i} (group {number})")
    stats = None
    for *_, group, param, _ in live:
        with local(param).fake_mode:  # type: ignore[attr-defined]
            entry = state.setdefault(param, {})
            if not entry:
                entry.update(_entries(group, param))
            entry["step"] += 1
            if needs_norm and stats is None:
                stats = torch.zeros(table.STATS, dtype=torch.float64, device=param.device)
    torch.autograd.graph.increment_version([param for *_, param, _ in live])
    return stats


def _entries(group: dict[str, Any], param: Tensor) -> Iterator[tuple[str, Tensor]]:
    part = local(param).detach()
    options = options_of(group)
    yield "step", torch.zeros((), dtype=torch.float32, device=part.device)
    for key, (dtype, _) in options.recipe.state(part.dtype, part.shape, options.amsgrad).items():
        if key in GROUPED:
            value = torch.zeros(-(-group_elements(param) // GROUP), dtype=dtype, device=part.device)
        else:
            value = torch.zeros_like(part, dtype=dtype)
        yield key, to_dtensor(param, key, value)
