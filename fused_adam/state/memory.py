"""Flat memory: segments, the slots in them, how a tensor's elements lie, uploads of tables.

No optimizer here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_private import to_dlpack

# Slots start on multiples of this many elements. That is a whole 128-byte line of float32 and a
# whole 32-byte sector of any dtype. It is counted in elements, not in bytes, so that neighbours in
# one buffer are neighbours in every buffer, whatever their dtypes.
SLOT_ALIGN = 32
# A segment is the unit of offloading and of running out of memory: it is small against a GPU, and
# large against the cost of one copy.
SEGMENT_BYTES = 1 << 30


def is_apart(device: torch.device) -> bool:
    """Whether tensors on this device are not in the host's memory."""
    return device.type != "cpu"


def pinned_zeros(numel: int, *, dtype: torch.dtype, device: torch.device, asked: int) -> Tensor:
    """As `torch.zeros`, in pinned memory of the host, which a device reads without a wait.

    Args:
        numel, dtype, device: as for `torch.zeros`; the device is a CPU.
        asked: bytes that are allocated along with these, for the error.

    Raises RuntimeError if the host has no more memory that can be pinned.
    """
    try:
        return torch.zeros(numel, dtype=dtype, device=device, pin_memory=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"state_device='cpu' needs {asked:,} bytes of pinned host memory, and pinning "
            f"{numel * dtype.itemsize:,} of them failed ({error}): free host memory, raise the "
            "limit of locked memory (ulimit -l), or choose a precision with smaller state"
        ) from error


def align(numel: int) -> int:
    """Elements from the start of a slot to the start of the next: `align(33) == 64`."""
    return -(-numel // SLOT_ALIGN) * SLOT_ALIGN


def as_real(tensor: Tensor) -> Tensor:
    """The tensor's values as real numbers; a complex one gets a last dimension of two."""
    return (
        torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    )


def as_flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as one dimension, in the order of its addresses."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def send(host: Tensor, device: torch.device) -> Tensor:
    """The same values on the device, copied in the order of the current stream.

    `host` is pinned if the device is a GPU: other memory would be waited for.
    """
    return host.to(device, non_blocking=True)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A table that never changes, sent to the device without waiting for it."""
    return values if device.type == "cpu" else send(values.pin_memory(), device)


def with_own_storage(tensor: Tensor) -> Tensor:
    """The same memory, in a storage that covers this tensor alone."""
    return torch.utils.dlpack.from_dlpack(to_dlpack(tensor))


def dense_layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Size and strides of `torch.zeros_like(tensor)`: its own if it is dense, else contiguous."""
    twin = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return twin.shape, twin.stride()


def is_lazy(tensor: Tensor) -> bool:
    """Whether the tensor's values are the conjugate or negative of what lies in memory."""
    return tensor.is_conj() or tensor.is_neg()


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory without gaps or overlaps, in any dimension order."""
    return tensor.is_contiguous() or tensor.stride() == dense_layout(tensor)[1]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """`numel` elements of a flat `segment`, from element `start` on."""

    segment: Tensor
    start: int
    numel: int

    @property
    def address(self) -> int:
        """Address of the first element in bytes; 0 for an empty slot, as torch has it."""
        if not self.numel:
            return 0
        return self.segment.data_ptr() + self.start * self.segment.element_size()

    def flat(self) -> Tensor:
        """The elements as one dimension, in a storage of their own over the segment's memory.

        With a plain view, `torch.save` would write the whole segment, and safetensors refuses it.
        """
        return with_own_storage(self._elements())

    def view(self, like: Tensor) -> Tensor:
        """The elements in the shape and layout of `like`, in a storage of their own.

        The view is complex if `like` is.
        """
        return self._shaped(self.flat(), like)

    def view_within(self, like: Tensor) -> Tensor:
        """The same as `view`, but as a view of the segment."""
        return self._shaped(self._elements(), like)

    def _elements(self) -> Tensor:
        return self.segment[self.start : self.start + self.numel]

    @staticmethod
    def _shaped(elements: Tensor, like: Tensor) -> Tensor:
        if like.is_complex():
            elements = torch.view_as_complex(elements.view(-1, 2))
        return elements.as_strided(*dense_layout(like))


def segments(
    numels: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group: int = 1,
    zeros: Callable[..., Tensor] = torch.zeros,
) -> Iterator[list[Slot]]:
    """Allocate zeroed slots for `numels`, in order; each list of slots shares one segment.

    A segment has at most SEGMENT_BYTES, unless a single parameter needs more. It is allocated when
    the iterator gets there, so that the caller can free other memory in between.

    Args:
        numels: elements of each parameter.
        group: a divisor of SLOT_ALIGN; a slot has one element for every `group` elements of its
            parameter, rounded up.
        zeros: allocates a segment.
    """
    limit = SEGMENT_BYTES // dtype.itemsize * group
    starts: list[int] = []
    end = 0
    for i, numel in enumerate(numels):
        starts.append(end)
        end += align(numel)
        if i + 1 == len(numels) or end + align(numels[i + 1]) > limit:
            segment = zeros(end // group, dtype=dtype, device=device)
            batch = numels[i + 1 - len(starts) : i + 1]
            yield [
                Slot(segment, start // group, -(-n // group))
                for start, n in zip(starts, batch, strict=True)
            ]
            starts, end = [], 0
