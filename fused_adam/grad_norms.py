"""Norms of single parameters' gradients, made on request from what the norm pass left in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .distributed import RankGroup
from .numerics.norm import PartialSums, add_runs, pairing
from .state.memory import upload


class GradNorms:
    """The partial sums of one plan's last step, and how they become a norm per parameter.

    A step that follows a plan rewrites them. No gradient and no state is kept alive.

    Args:
        params: all parameters of the optimizer, in order.
        sums: of the plan's launch groups.
    """

    def __init__(self, params: Sequence[Tensor], sums: Sequence[PartialSums]) -> None:
        self.params, self.sums = params, sums
        # Tables, made at the first request, which most plans never see.
        self.pairings: list[list[Tensor]] = []
        self.places: Tensor | None = None
        self.positions: list[Tensor] = []

    def by_param(self, grad_scale: Tensor, ranks: RankGroup | None) -> dict[Tensor, Tensor]:
        """The norms of unscaled gradients: float32, shape (), on each parameter's device.

        They are views of one tensor per device. A parameter without a gradient has none.

        Args:
            grad_scale: the loss scale of that step; float64, shape ().
            ranks: the processes whose shards count. With them this is a collective.
        """
        if not self.pairings:
            self.pairings = [
                [upload(pairs, sums.values.device) for pairs in pairing(sums.chunks)]
                for sums in self.sums
            ]
        by_group = [
            add_runs(sums.values, tables)
            for sums, tables in zip(self.sums, self.pairings, strict=True)
        ]
        if ranks:
            by_group = self._over_ranks(by_group, ranks)
        norms: dict[int, Tensor] = {}
        for sums, squares in zip(self.sums, by_group, strict=True):
            # As the norm of all is computed: in float64 until the one rounding at the end.
            of_group = (squares.sqrt() / grad_scale.to(squares.device)).float()
            norms |= zip(sums.positions, of_group.unbind(), strict=True)
        return {self.params[position]: norms[position] for position in sorted(norms)}

    def _over_ranks(self, by_group: Sequence[Tensor], ranks: RankGroup) -> list[Tensor]:
        """The same sums over the shards of all ranks."""
        # Ranks may differ in which parameters have a gradient, so each sends a sum for every one.
        device = self.params[0].device
        none = torch.zeros(1, dtype=torch.float64, device=device)
        here = torch.cat([*(squares.to(device) for squares in by_group), none])
        if self.places is None:
            places = [len(here) - 1] * len(self.params)
            positions = [position for sums in self.sums for position in sums.positions]
            for place, position in enumerate(positions):
                places[position] = place
            self.places = upload(torch.tensor(places, device="cpu"), device)
            self.positions = [
                upload(torch.tensor(sums.positions, device="cpu"), device) for sums in self.sums
            ]
        everywhere = ranks.sum_norms(here[self.places])
        return [
            everywhere[positions].to(squares.device)
            for positions, squares in zip(self.positions, by_group, strict=True)
        ]
