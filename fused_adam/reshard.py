"""Distributed checkpoints of 8-bit moments at another world size, or in other placements.

Imported only by who needs it: torch.distributed.checkpoint takes a second to import.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from .distributed import Box, box_of, local
from .numerics import codecs
from .precision import CODED, GROUP
from .state.convert import HALF
from .state.memory import as_flat

CODES = tuple(code for code, _ in CODED.values())
SCALES = tuple(scale for _, scale in CODED.values())


class LoadPlanner(DefaultLoadPlanner):
    """A planner for `torch.distributed.checkpoint.load` that cuts 8-bit moments anew.

    32 neighbours of a shard share a scale. If shards are cut differently than they were in the
    checkpoint, other elements may become neighbours. Groups that come whole from one group of the
    checkpoint keep their codes and scale. The others are decoded and rounded to the nearest codes
    of a scale of their own. Everything else is loaded as torch's planner does.

    Args: those of `DefaultLoadPlanner`.

    Raises:
        ValueError: from `load`: shards in the checkpoint are cut by several mesh dimensions within
            groups of 32, or a tensor to load into is not contiguous.

    Example:
        >>> from torch.distributed import checkpoint
        >>> state = {"model": weights, "optimizer": optimizer_state}
        >>> checkpoint.load(state, checkpoint_id=folder, planner=LoadPlanner())
    """

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None  # a load has some
        self._recuts: dict[str, _Recut] = {}  # by the name of each of its four entries
        saved = metadata.state_dict_metadata
        for name in [name for name in self.state_dict if name.endswith(f".{SCALES[0]}")]:
            prefix = name.removesuffix(SCALES[0])
            names = [prefix + key for key in (*CODES, *SCALES)]
            if all(isinstance(saved.get(x), TensorStorageMetadata) for x in names):
                self._add(names, [saved[x] for x in names])

    def _add(self, names: Sequence[str], saved: Sequence[Any]) -> None:
        """Redirect the scales of one parameter, if they cannot be read to where they belong."""
        code, _, scale, _ = (self.state_dict[name] for name in names)
        boxes = sorted({Box(tuple(x.offsets), tuple(x.sizes)) for x in saved[0].chunks})
        size = saved[2].size
        # Scales of whole groups have one dimension, and torch cuts them. Otherwise each shard has
        # a row of its own.
        as_saved = len(size) != 2 or box_of(code) in boxes or not local(code).numel()
        if size == scale.size() and as_saved:
            return
        boxes = [Box((0,) * code.ndim, tuple(code.shape))] if len(size) == 1 else boxes
        boxes = [box for box in boxes if 0 not in box.shape]
        _check(names[0], code, boxes, len(size))
        targets = [self.state_dict[name] for name in names]
        # All scales of the checkpoint: 1/32 of the elements. Codes are read to where they belong.
        scales = [torch.empty(size, dtype=torch.bfloat16, device="cpu") for _ in SCALES]
        self.state_dict |= dict(zip(names[2:], scales, strict=True))
        recut = _Recut(targets[:2], targets[2:], scales, boxes)
        self._recuts |= dict.fromkeys(names, recut)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        plan = super().finish_plan(new_plan)
        for name, count in Counter(item.dest_index.fqn for item in plan.items).items():
            if name in self._recuts:
                self._recuts[name].missing += count
        return plan

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        recut = self._recuts.get(read_item.dest_index.fqn)
        if recut is not None:
            recut.missing -= 1
            if recut.missing == 0:
                recut.finish()


def _check(name: str, code: Tensor, boxes: Sequence[Box], dimensions: int) -> None:
    """Raise ValueError if nothing says which scale belongs to which element."""
    cut = {i for box in boxes for i, offset in enumerate(box.offset) if offset}
    if dimensions > 2 or len(cut) > 1:
        raise ValueError(
            f"{name!r} in the checkpoint is cut by several mesh dimensions within groups of 32, "
            "so it loads only into the same mesh and placements"
        )
    if not local(code).is_contiguous():
        raise ValueError(f"{name!r} has strides {local(code).stride()}, but must be contiguous")


@dataclass(slots=True, eq=False)
class _Recut:
    """The 8-bit moments of one parameter on their way into other shards.

    Attributes:
        codes, scales: what is loaded into; of both moments.
        saved_scales: all scales of the checkpoint.
        boxes: its shards that are not empty, in the order of the rows of its scales.
        missing: how many reads are still to come.
    """

    codes: list[Tensor]
    scales: list[Tensor]
    saved_scales: list[Tensor]
    boxes: list[Box]
    missing: int = 0

    def finish(self) -> None:
        """Give every group a scale, and new codes where it is made of several groups."""
        # On the host: a checkpoint is loaded once, and needs no memory of a device for it.
        groups_of_origin = self._groups_of_origin()
        if not len(groups_of_origin):
            return
        flat = [as_flat(local(code)) for code in self.codes]
        missing = groups_of_origin.numel() - len(flat[0])
        codes = [torch.nn.functional.pad(x.cpu(), (0, missing)).view(-1, GROUP) for x in flat]
        scales = [saved.view(-1)[groups_of_origin] for saved in self.saved_scales]
        mixed = (groups_of_origin != groups_of_origin[:, :1]).any(1)
        # What stands for the whole group where it is not mixed.
        new_scales = [scale[:, 0].clone() for scale in scales]
        if mixed.any():
            parts = [x[mixed].view(-1) for x in (*codes, *scales)]
            m, v = codecs.decode_moments(*parts)
            nearest = codecs.state_noise(torch.full_like(m, HALF, dtype=torch.int32))
            encoded = codecs.encode_moments(m, v, nearest)
            for code, new_codes in zip(codes, encoded[:2], strict=True):
                code[mixed] = codecs.groups_of(new_codes)
            for new_scale, new in zip(new_scales, encoded[2:], strict=True):
                new_scale[mixed] = new
        for target, code in zip(flat, codes, strict=True):
            target.copy_(code.view(-1)[: len(target)])
        for scale_target, new_scale in zip(self.scales, new_scales, strict=True):
            as_flat(local(scale_target))[: len(new_scale)].copy_(new_scale)

    def _groups_of_origin(self) -> Tensor:
        """For each element here, the place of its scale in the checkpoint: int64, shape (G, 32).

        The last group is filled up with its last element's.
        """
        here = box_of(self.codes[0])
        origin = torch.zeros(here.shape, dtype=torch.int64, device="cpu")
        groups_of_box = self.saved_scales[0].shape[-1]
        for number, box in enumerate(self.boxes):
            number_in_box = torch.zeros((), dtype=torch.int64, device="cpu")
            both: list[slice] = []
            for a, size, b, saved_size in zip(*here, *box, strict=True):
                start, end = max(a, b), min(a + size, b + saved_size)
                coordinate = torch.arange(start - b, max(start, end) - b, device="cpu")
                number_in_box = number_in_box.unsqueeze(-1) * saved_size + coordinate
                both.append(slice(start - a, max(start, end) - a))
            origin[tuple(both)] = number * groups_of_box + number_in_box // GROUP
        flat = origin.view(-1)
        if not len(flat):
            return flat.view(0, GROUP)
        last = flat[-1:].expand(-len(flat) % GROUP)
        return torch.cat([flat, last]).view(-1, GROUP)
