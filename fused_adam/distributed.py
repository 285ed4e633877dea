"""DTensor parameters: their shards, state as DTensors, what ranks compare and add up. No other file
names DTensor.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch._subclasses import FakeTensor
from torch.nn.functional import pad

from .numerics.norm import halving_sum
from .precision import GROUP, GROUPED

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

# Between the random bits of shards that are no runs of rows: more than a shard has elements.
RANGE = 1 << 40


def is_sharded(tensor: object) -> TypeIs[DTensor]:
    """Whether it is a DTensor; asked without importing torch.distributed.tensor, which takes a
    second.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check(param: Tensor) -> None:
    """Raise TypeError or ValueError if the parameter is a DTensor that cannot be stepped shard by
    shard.
    """
    if is_sharded(param):
        part = param._local_tensor
        fake = isinstance(part, FakeTensor)  # of shapes alone, for estimates of memory
        if not fake and type(part) not in (Tensor, torch.nn.Parameter):
            raise TypeError(
                f"a parameter is a DTensor of {type(param._local_tensor).__name__}, but must be of Tensor"
            )
        if any(placement.is_partial() for placement in param.placements):
            raise ValueError(
                f"a parameter has placements {tuple(param.placements)}, but must be Shard or Replicate on every mesh "
                "dimension: call redistribute() first"
            )


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


class LocalShards:
    """What is here of some parameters, at least one of them a DTensor, and of their gradients:
    every step asks.
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
        """What the shards take of their parameters' gradients: summed and moved first where they
        lie otherwise.

        Args:
            grads: of every parameter.
            moved: parameter -> its part, of those moved in this step; added to. Moving is a
                collective: once.
        """
        # As FSDP2 leaves them, all at once: one after the other takes twice as long.
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
        if is_sharded(param) and grad.placements != param.placements:
            if param not in redistributed:
                redistributed[param] = grad.redistribute(
                    param.device_mesh, param.placements
                ).to_local()
            part = redistributed[param]
        else:
            part = grad._local_tensor
        # One that is still on its way, from a collective of torch's own, is of another type.
        return part if type(part) is Tensor else part.wait()  # type: ignore[attr-defined]


def to_dtensor(param: Tensor, key: str, value: Tensor) -> Tensor:
    """State entry `key` over the memory of `value`, this rank's part of it: a DTensor where the
    parameter is one.
    """
    if not is_sharded(param):
        return value
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    placements, shape, stride = param.placements, param.shape, param.stride()
    if key in GROUPED:
        placements, shape = _of_groups(param)
        stride = torch.empty(shape, device="meta").stride()
        value = value.view([1] * (len(shape) - 1) + [-1])
    # Not `from_local`, which would take offloaded state back to its mesh's device.
    spec = DTensorSpec(
        param.device_mesh, placements, tensor_meta=TensorMeta(shape, stride, value.dtype)
    )
    return DTensor(value, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def to_local(param: Tensor, key: str, value: Tensor) -> Tensor:
    """This rank's part of state entry `key`: of a DTensor, or of a whole tensor that every rank
    has.

    Raises ValueError if a DTensor lies on another mesh than the parameter.
    """
    if not is_sharded(param):
        return value.full_tensor() if is_sharded(value) else value
    from torch.distributed.tensor import distribute_tensor

    placements, shape = _of_groups(param) if key in GROUPED else (param.placements, param.shape)
    if is_sharded(value):
        if value.device_mesh != param.device_mesh:
            raise ValueError(
                f"state {key!r} lies on {value.device_mesh}, but its parameter on {param.device_mesh}"
            )
        if value.shape != shape:
            raise ValueError(
                f"state {key!r} has shape {tuple(value.shape)}, but must have {tuple(shape)}"
                + (
                    ": 8-bit state cut within groups of 32 fits the world size it was saved with"
                    * (key in GROUPED)
                )
            )
        if value.placements != placements:
            value = value.redistribute(param.device_mesh, placements)
        part = value._local_tensor
    elif value.shape == shape:
        part = distribute_tensor(
            value.to(param.device), param.device_mesh, placements, src_data_rank=None
        )
        part = part._local_tensor
    else:
        return value
    return part.reshape(-1)[: -(-param._local_tensor.numel() // GROUP)] if key in GROUPED else part


def local_as_stored(param: Tensor, key: str, value: Tensor) -> Tensor | None:
    """This rank's part of state entry `key`, if it is distributed over ranks as `to_dtensor` would; else
    None.
    """
    if not is_sharded(param) or key == "step":
        return None if is_sharded(value) else value
    placements, shape = _of_groups(param) if key in GROUPED else (param.placements, param.shape)
    if not is_sharded(value) or value.device_mesh != param.device_mesh:
        return None
    return value._local_tensor if (value.placements, value.shape) == (placements, shape) else None


def group_elements(param: Tensor) -> int:
    """Elements for which scales of 8-bit state are held: those of the largest shard, so that all
    have one shape.
    """
    if not is_sharded(param) or len(_of_groups(param)[1]) == 1:
        return local(param).numel()
    return _largest_shard(param)


def _largest_shard(param: DTensor) -> int:
    sizes = list(param.shape)
    for i, placement in enumerate(param.placements):
        if placement.is_shard():
            sizes[placement.dim] = -(-sizes[placement.dim] // param.device_mesh.size(i))  # type: ignore[attr-defined]
    return torch.Size(sizes).numel()


def _of_groups(param: DTensor) -> tuple[tuple[Any, ...], torch.Size]:
    """Placements and shape of scales: as of the whole parameter where shards are whole groups, else
    a row per shard.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, whole, most = param.device_mesh, -(-param.numel() // GROUP), _largest_shard(param)
    cut = [
        i
        for i, placement in enumerate(param.placements)
        if placement.is_shard() and mesh.size(i) > 1
    ]
    placements = tuple(Shard(cut.index(i)) if i in cut else Replicate() for i in range(mesh.ndim))
    # Chunks of groups must be chunks of rows on every rank.
    rows = len(cut) == 1 and param.placements[cut[0]].is_shard(0)
    if not cut or (rows and most % GROUP == 0 and -(-whole // mesh.size(cut[0])) == most // GROUP):
        return placements, torch.Size([whole])
    return placements, torch.Size([*[mesh.size(i) for i in cut], -(-most // GROUP)])


def global_offset(param: Tensor) -> int:
    """The number of this rank's first element, which random bits are keyed by: however rows are
    cut, bits are equal.

    Shards that are no runs of rows have ranges of their own.
    """
    if not is_sharded(param) or not any(placement.is_shard() for placement in param.placements):
        return 0
    start, shape = _cut(param)
    if shape[1:] == param.shape[1:] and param._local_tensor.is_contiguous():
        return start[0] * param.shape[1:].numel()
    number = 0
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    for i, placement in enumerate(param.placements):
        if placement.is_shard():
            number = number * param.device_mesh.size(i) + coordinate[i]
    return number * RANGE


def _cut(param: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in the parameter this rank's shard starts, and its shape."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return start, shape


def _digest(value: object) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()[:8]


class RankGroup:
    """The processes that step the shards of one optimizer together: those of the mesh that holds
    all of its meshes.

    Every method is a collective: all of them call it, or none.

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
                    f"parameters lie on {mesh} and on {other}, and neither has all ranks: make an optimizer for each"
                )
        self.size = mesh.size()
        self.group: Any = None
        if mesh.ndim == 1:
            self.group = mesh.get_group()
        elif self.size < distributed.get_world_size():
            self.group = distributed.new_group(sorted(ranks), use_local_synchronization=True)
        self.rank = distributed.get_rank(self.group)

    def check_agreement(self, facts: Sequence[dict[str, object]]) -> list[bool]:
        """Compare what is true of each parameter; returns which of them are counted here.

        What several ranks hold alike (replicas, plain parameters) is counted by the first of them.

        Args:
            facts: per parameter, what must be the same everywhere, by name.

        Raises ValueError on every rank if ranks differ.
        """
        places = [_digest(_cut(param) if is_sharded(param) else None) for param in self.params]
        # 16 bytes per parameter: facts as they are would be hundreds of megabytes from a thousand
        # ranks.
        everyone = self._gather((list(map(_digest, facts)), places))
        first = everyone[0][0]
        for rank, (other, _) in enumerate(everyone):
            if len(other) != len(first):
                raise ValueError(
                    f"ranks differ: rank 0 has {len(first)} parameters, and rank {rank} has {len(other)}"
                )
            if other != first:
                i = next(
                    i for i, pair in enumerate(zip(first, other, strict=True)) if pair[0] != pair[1]
                )
                told = self._gather({name: repr(value) for name, value in facts[i].items()})
                differing = [name for name in facts[i] if told[0][name] != told[rank][name]]
                texts = [
                    f"{name} {told[0][name]} on rank 0, {told[rank][name]} on rank {rank}"
                    for name in differing
                ]
                raise ValueError(f"ranks differ: parameter {i} has {' and '.join(texts)}")
        return [
            all(other[i] != place for _, other in everyone[: self.rank])
            for i, place in enumerate(places)
        ]

    def raise_if_any_failed(self, failure: Exception | None) -> None:
        """Let every rank go on, or none.

        Args:
            failure: what keeps this rank from stepping, if something does: raised here, and told to
                the others.

        Raises RuntimeError if another rank cannot.
        """
        everyone = self._gather(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(everyone):
            if text:
                raise RuntimeError(
                    f"no rank steps, because rank {rank} of the optimizer's {self.size} cannot: {text}"
                )

    def _gather(self, value: object) -> list[Any]:
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, value, self.group)
        return everyone

    def sum_norms(self, square_sum: Tensor) -> Tensor:
        """The sum over all ranks, in an order that only their number decides; float64, shape (1,),
        not waited for.
        """
        sums = [torch.empty_like(square_sum) for _ in range(self.size)]
        distributed.all_gather(sums, square_sum, self.group)
        return halving_sum(
            pad(torch.cat(sums), (0, (1 << (self.size - 1).bit_length()) - self.size))
        ).reshape(1)
