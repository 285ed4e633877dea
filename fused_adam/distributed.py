"""DTensor parameters: local shards, state as DTensors, what ranks compare and add up.

No other file looks into a DTensor.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.functional import pad

from .numerics.norm import halving_sum
from .precision import GROUP, GROUPED
from .torch_private import FakeTensor, make_dtensor, shape_and_offset

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

# Distance between the random bits of shards that are no runs of rows, in elements: more than any
# shard has.
RANGE = 1 << 40


class _Layout(NamedTuple):
    """How a DTensor is laid out over its mesh."""

    placements: tuple[Any, ...]
    shape: torch.Size  # of the whole


class Box(NamedTuple):
    """Where in the whole parameter a shard begins, and the shard's shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def is_sharded(tensor: object) -> TypeIs[DTensor]:
    """Whether it is a DTensor."""
    # Importing torch.distributed.tensor takes a second. Nothing is a DTensor before that.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check(param: Tensor) -> None:
    """Raise TypeError or ValueError if a DTensor parameter cannot be stepped shard by shard."""
    if not is_sharded(param):
        return
    part = param._local_tensor
    # Fake tensors have shapes alone: estimates of memory step over them.
    if type(part) not in (Tensor, torch.nn.Parameter) and not isinstance(part, FakeTensor):
        raise TypeError(f"a parameter is a DTensor of {type(part).__name__}, but must be of Tensor")
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"a parameter has placements {tuple(param.placements)}, but must be Shard or Replicate "
            "on every mesh dimension: call redistribute() first"
        )


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


class LocalShards:
    """Local tensors of some parameters, at least one of them a DTensor, and of their gradients.

    Every step asks for them, so what does not change is looked up once.
    """

    def __init__(self, params: Sequence[Any]) -> None:
        self.params = list(params)
        self.kind = sys.modules["torch.distributed.tensor"].DTensor
        self.all = {*map(type, params)} == {self.kind}
        self.placements = [param.placements for param in params] if self.all else []

    def tensors(self) -> list[Tensor]:
        """`local` of each parameter."""
        if self.all:
            return [param._local_tensor for param in self.params]
        return [local(param) for param in self.params]

    def gradient_parts(
        self, grads: Sequence[Any], redistributed: dict[Tensor, Tensor]
    ) -> list[Tensor]:
        """The local gradients, summed and moved first where their placements differ.

        Args:
            grads: of every parameter.
            redistributed: parameter -> local gradient, of those moved in this step. Those moved now
                are added: moving is a collective, so it happens once.
        """
        # FSDP2 leaves gradients with the placements of their parameters. To ask for all at once
        # takes half as long as one after the other.
        if self.all and {*map(type, grads)} == {self.kind}:
            if [grad._spec.placements for grad in grads] == self.placements:
                parts = [grad._local_tensor for grad in grads]
                if {*map(type, parts)} == {Tensor}:
                    return parts
        return [
            self._gradient_part(param, grad, redistributed)
            for param, grad in zip(self.params, grads, strict=True)
        ]

    @staticmethod
    def _gradient_part(param: Tensor, grad: Tensor, redistributed: dict[Tensor, Tensor]) -> Tensor:
        if not is_sharded(grad):
            return grad
        if not is_sharded(param) or grad.placements == param.placements:
            part = grad._local_tensor
        else:
            if param not in redistributed:
                resharded = grad.redistribute(param.device_mesh, param.placements)
                redistributed[param] = resharded.to_local()
            part = redistributed[param]
        # The result of a collective that is still running has a type of torch's own.
        return part if type(part) is Tensor else part.wait()  # type: ignore[attr-defined]


def to_dtensor(param: Tensor, key: str, value: Tensor) -> Tensor:
    """State entry `key` over the memory of `value`: a DTensor where the parameter is one.

    Args:
        value: this rank's part of the entry.
    """
    if not is_sharded(param):
        return value
    layout = _layout(param, key)
    strides = param.stride()
    if key in GROUPED:
        strides = torch.empty(layout.shape, device="meta").stride()
        value = value.view([1] * (len(layout.shape) - 1) + [-1])
    return _dtensor(value, param.device_mesh, layout, strides)


def as_byte_pairs(value: Tensor) -> Tensor:
    """A tensor of int16 as one of int8 over the same memory, shape (..., 2); others as they are.

    Neither gloo nor NCCL carries int16, so nothing could gather or move shards of it. Whole tensors
    have the same form, because files of shards are loaded into these, too.
    """
    if value.dtype != torch.int16:
        return value
    if not is_sharded(value):
        return value.unsqueeze(-1).view(torch.int8)
    pairs = value._local_tensor.unsqueeze(-1).view(torch.int8)
    strides = (*(2 * stride for stride in value.stride()), 1)
    layout = _Layout(value.placements, torch.Size((*value.shape, 2)))
    return _dtensor(pairs, value.device_mesh, layout, strides)


def _from_byte_pairs(param: Tensor, value: Tensor) -> Tensor:
    """What `as_byte_pairs` made of an entry of this parameter, in int16; others as they are."""
    if value.dtype != torch.int8 or value.shape != (*param.shape, 2):
        return value
    # Gathered or moved as bytes: int16 could not be. Other meshes are refused later.
    if is_sharded(value) and not is_sharded(param):
        value = value.full_tensor()
    if not is_sharded(value):
        return value.contiguous().view(torch.int16).squeeze(-1)
    if is_sharded(param) and value.device_mesh == param.device_mesh:
        value = value.redistribute(param.device_mesh, param.placements)
    whole = value._local_tensor.contiguous().view(torch.int16).squeeze(-1)
    layout = _Layout(value.placements, param.shape)
    return _dtensor(whole, value.device_mesh, layout, param.stride())


def _dtensor(value: Tensor, mesh: Any, layout: _Layout, strides: tuple[int, ...]) -> DTensor:
    """A DTensor over the memory of `value`, this rank's part."""
    return make_dtensor(value, mesh, layout.placements, layout.shape, strides)


def to_local(param: Tensor, key: str, value: Tensor) -> Tensor:
    """This rank's part of state entry `key`.

    Args:
        value: a DTensor of any placements, or a whole tensor that every rank has. Remainders may be
            pairs of bytes, as `as_byte_pairs` makes them.

    Raises ValueError if a DTensor lies on another mesh than the parameter, or has another shape.
    """
    if key == "remainder":
        value = _from_byte_pairs(param, value)
    if not is_sharded(param):
        return value.full_tensor() if is_sharded(value) else value
    from torch.distributed.tensor import distribute_tensor

    mesh, layout = param.device_mesh, _layout(param, key)
    if is_sharded(value):
        if value.device_mesh != mesh:
            raise ValueError(
                f"state {key!r} lies on {value.device_mesh}, but its parameter on {mesh}"
            )
        if value.shape != layout.shape:
            reason = (
                ": 8-bit state cut within groups of 32 fits the world size it was saved with; load "
                "the files with planner=fused_adam.reshard.LoadPlanner()"
            )
            raise ValueError(
                f"state {key!r} has shape {tuple(value.shape)}, but must have {tuple(layout.shape)}"
                + (reason if key in GROUPED else "")
            )
        if value.placements != layout.placements:
            value = value.redistribute(mesh, layout.placements)
    elif value.shape == layout.shape:
        # Every rank has the whole, so it cuts its part out without asking rank 0.
        whole = value.to(param.device)
        value = distribute_tensor(whole, mesh, layout.placements, src_data_rank=None)
    else:
        return value  # not of this parameter: for the caller to refuse
    part = value._local_tensor
    if key in GROUPED:
        # A smaller shard than the largest has scales left over at the end.
        return part.reshape(-1)[: -(-param._local_tensor.numel() // GROUP)]
    return part


def local_as_stored(param: Tensor, key: str, value: Tensor) -> Tensor | None:
    """This rank's part of state entry `key`, if its layout is that of `to_dtensor`; else None."""
    if not is_sharded(param) or key == "step":
        return None if is_sharded(value) else value
    if not is_sharded(value) or value.device_mesh != param.device_mesh:
        return None
    return value._local_tensor if (value.placements, value.shape) == _layout(param, key) else None


def group_elements(param: Tensor) -> int:
    """Elements of the parameter for which this rank stores scales of 8-bit state.

    Those of the largest shard, so that scales have one shape on all ranks.
    """
    if not is_sharded(param) or len(_layout_of_scales(param).shape) == 1:
        return local(param).numel()
    return _largest_shard(param)


def _largest_shard(param: DTensor) -> int:
    sizes = list(param.shape)
    for i, placement in enumerate(param.placements):
        if placement.is_shard():
            sizes[placement.dim] = -(-sizes[placement.dim] // param.device_mesh.size(i))  # type: ignore[attr-defined]
    return torch.Size(sizes).numel()


def _layout(param: DTensor, key: str) -> _Layout:
    """The layout of state entry `key`: the parameter's, but for scales."""
    return _layout_of_scales(param) if key in GROUPED else _Layout(param.placements, param.shape)


def _layout_of_scales(param: DTensor) -> _Layout:
    """The layout of one scale per group of GROUP elements.

    Where shards are whole groups, shape (groups of the parameter,): the scales can be cut anew for
    any number of ranks. Otherwise a row for each shard, as groups never straddle shards: these
    scales fit only the mesh that they were made on.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, groups = param.device_mesh, -(-param.numel() // GROUP)
    largest = _largest_shard(param)
    cut = [i for i, p in enumerate(param.placements) if p.is_shard() and mesh.size(i) > 1]
    placements = tuple(Shard(cut.index(i)) if i in cut else Replicate() for i in range(mesh.ndim))
    if not cut:
        return _Layout(placements, torch.Size([groups]))
    # Chunks of groups must be chunks of rows on every rank, and torch's chunks are all of the
    # largest one's size but the last.
    by_rows = len(cut) == 1 and param.placements[cut[0]].is_shard(0)
    chunk = -(-groups // mesh.size(cut[0]))
    if by_rows and largest % GROUP == 0 and chunk == largest // GROUP:
        return _Layout(placements, torch.Size([groups]))
    return _Layout(placements, torch.Size([*map(mesh.size, cut), -(-largest // GROUP)]))


def global_offset(param: Tensor) -> int:
    """The number of this rank's first element in the whole parameter; 0 if it is not sharded.

    Random bits are keyed by it, so they do not depend on how rows are cut. A shard that is not a
    run of rows has no such number. It gets a range of RANGE numbers of its own instead.
    """
    if not is_sharded(param) or not any(placement.is_shard() for placement in param.placements):
        return 0
    shard = box_of(param)
    row = param.shape[1:]
    if shard.shape[1:] == row and param._local_tensor.is_contiguous():
        return shard.offset[0] * row.numel()
    # The rank's position among all shards, counted like digits.
    number = 0
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    for i, placement in enumerate(param.placements):
        if placement.is_shard():
            number = number * param.device_mesh.size(i) + coordinate[i]
    return number * RANGE


def box_of(tensor: Tensor) -> Box:
    """Where this rank's shard lies in the whole; all of a tensor that is no DTensor."""
    if not is_sharded(tensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    shape, offset = shape_and_offset(tensor)
    return Box(tuple(offset), tuple(shape))


def _digest(value: object) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()[:8]


class _RankFacts(NamedTuple):
    """What one rank tells the others of its parameters: digests, one per parameter."""

    facts: list[bytes]
    shards: list[bytes]


class RankGroup:
    """The processes that step one optimizer's shards together: the mesh that holds all its meshes.

    Every method is a collective: all processes call it, or none.

    Raises ValueError if no mesh holds all.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        meshes = list(dict.fromkeys(param.device_mesh for param in params if is_sharded(param)))
        mesh = max(meshes, key=lambda mesh: mesh.size())
        ranks = set(mesh.mesh.flatten().tolist())
        for other in meshes:
            if not ranks >= set(other.mesh.flatten().tolist()):
                raise ValueError(
                    f"parameters lie on {mesh} and on {other}, and neither has all ranks: make an "
                    "optimizer for each"
                )
        self.size = mesh.size()
        # None is the group of all processes. A mesh of several dimensions has a group for each of
        # them, and none for itself.
        self.group: Any = None
        if mesh.ndim == 1:
            self.group = mesh.get_group()
        elif self.size < distributed.get_world_size():
            self.group = distributed.new_group(sorted(ranks), use_local_synchronization=True)
        self.rank = distributed.get_rank(self.group)

    def check_agreement(self, facts: Sequence[dict[str, object]]) -> list[bool]:
        """Compare facts over all ranks, and say which parameters this rank adds to the norm.

        What several ranks hold alike (replicas, plain parameters) is added by the first of them.

        Args:
            facts: per parameter, what must be the same everywhere, by name.

        Returns: per parameter, whether it is in this rank's part of the norm.

        Raises ValueError on every rank if ranks differ.
        """
        shards = [_digest(box_of(p) if is_sharded(p) else None) for p in self.params]
        # 16 bytes per parameter: facts as they are would be hundreds of megabytes from a thousand
        # ranks.
        everyone = self._gather(_RankFacts(list(map(_digest, facts)), shards))
        first = everyone[0].facts
        for rank, other in enumerate(everyone):
            if len(other.facts) != len(first):
                raise ValueError(
                    f"ranks differ: rank 0 has {len(first)} parameters, and rank {rank} has "
                    f"{len(other.facts)}"
                )
            # All ranks find the same difference first, so all of them gather its facts.
            for i, (mine, theirs) in enumerate(zip(first, other.facts, strict=True)):
                if mine != theirs:
                    self._raise_difference(i, rank, facts[i])
        earlier = everyone[: self.rank]
        return [all(x.shards[i] != shard for x in earlier) for i, shard in enumerate(shards)]

    def _raise_difference(self, i: int, rank: int, facts: dict[str, object]) -> None:
        everyone = self._gather({name: repr(value) for name, value in facts.items()})
        texts = [
            f"{name} {everyone[0][name]} on rank 0, {everyone[rank][name]} on rank {rank}"
            for name in facts
            if everyone[0][name] != everyone[rank][name]
        ]
        raise ValueError(f"ranks differ: parameter {i} has {' and '.join(texts)}")

    def raise_if_any_failed(self, failure: Exception | None) -> None:
        """Let every rank go on, or none.

        Args:
            failure: what keeps this rank from stepping, if something does. It is raised here, and
                the others are told.

        Raises RuntimeError if another rank cannot step.
        """
        everyone = self._gather(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(everyone):
            if text:
                raise RuntimeError(
                    f"no rank steps, because rank {rank} of the optimizer's {self.size} cannot: "
                    f"{text}"
                )

    def _gather(self, value: object) -> list[Any]:
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, value, self.group)
        return everyone

    def sum_norms(self, square_sum: Tensor) -> Tensor:
        """The sums over all ranks: float64, of the same shape. Does not wait for the device.

        Args:
            square_sum: float64, shape (n,), equal n on all ranks.

        Not an all_reduce: the order of additions depends on the number of ranks alone, not on what
        the collective library chooses, so every run has the same bits.
        """
        sums = [torch.empty_like(square_sum) for _ in range(self.size)]
        distributed.all_gather(sums, square_sum, self.group)
        power_of_two = 1 << (self.size - 1).bit_length()
        return halving_sum(pad(torch.stack(sums, dim=-1), (0, power_of_two - self.size)))
