"""Averages of weights: in the model for a while, or by name. The kernel of the step keeps them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor

from .distributed import local, to_dtensor, to_local
from .engine import outside_inference_mode
from .state.arena import HOST, Arena, Groups, State
from .state.checkpoint import keys_of


def check_averages(groups: Groups, name: str) -> None:
    """Raise RuntimeError unless some group averages its weights.

    Args:
        name: of the method that needs it.
    """
    if all(group.get("ema_decay") is None for group in groups):
        raise RuntimeError(f"{name} needs ema_decay, and no param group has one")


def averages(groups: Groups, state: State) -> dict[Tensor, Tensor]:
    """Return this rank's part of the averages that are kept now, by parameter; not copies.

    Without those that are left from a time when the group had an `ema_decay`, and no longer follow.
    """
    found: dict[Tensor, Tensor] = {}
    for group in groups:
        for param in group["params"] if group.get("ema_decay") is not None else ():
            average = state.get(param, {}).get("ema")
            if average is not None:
                found[param] = to_local(param, "ema", average)
    return found


def by_name(groups: Groups, state: State, arena: Arena) -> dict[str | int, Tensor]:
    """Return copies of the averages by their parameters' names, or positions.

    They are on the parameters' devices, or on the host if that is where `arena` has state: the
    device may have no room for all of it.
    """
    keys = keys_of(groups)
    found = {}
    for param, part in averages(groups, state).items():
        device = local(param).device
        # Offloaded state is on the host, too, but comes back to the device.
        copy = part.to(HOST if arena.is_streamed(device) else device, copy=True)
        found[keys[param]] = to_dtensor(param, "ema", copy)
    return found


@contextlib.contextmanager
def swapped(groups: Groups, state: State) -> Iterator[None]:
    """Have the averages in the parameters, and give the parameters back what they had."""
    pairs = averages(groups, state)
    with outside_inference_mode():
        # All copies first: memory can run out here alone, and parameters may share theirs.
        exact = [local(param).detach().clone() for param in pairs]
    try:
        _write(pairs, pairs.values())
        yield
    finally:
        _write(pairs, exact)


def _write(params: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy this rank's values into the parameters, rounded to nearest, wherever those are now."""
    with outside_inference_mode():
        for param, value in zip(params, values, strict=True):
            local(param).detach().copy_(value)
