"""Scratch copies of parameters and gradients, for steps that do not work on them in place.

Some parameters have to be staged: their elements leave gaps in memory, or are in another order
than those of the gradient. Others are staged to save time: on a CPU every tensor costs a dozen
calls, but small ones that are copied next to each other are updated as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_private import foreach_copy_
from .memory import SLOT_ALIGN, Slot, align, as_flat, as_real, dense_layout, is_dense, is_lazy

# By this name, so that tests which stand in for a CUDA graph can defer all copies.
copy_all = foreach_copy_

# Up to so many elements per tensor on average, a join costs less than copies.
JOINED_NUMEL = 512
# Elements that are joined by one call. torch spends more on each tensor where it divides a join
# among threads, which it does from 2^15 elements on.
JOINED = (1 << 15) - 1


class Staging(NamedTuple):
    """What a backend asks for.

    small: parameters of up to this many elements are staged even where they could be updated in
        place.
    page: elements per page. Parameters of one page lie next to each other; 0 gives each its own.
    shared: all pages use the same memory. Only for launches that run one after the other.
    """

    small: int = 0
    page: int = 0
    shared: bool = False


class Scratch(NamedTuple):
    """Where one staged parameter and its gradient are copied to.

    slots: their elements within a page, for "param" and "grad".
    param, grad: the same memory in the parameter's shape. The order of elements is that of the
        parameter's state: the parameter's own where it is dense.
    """

    slots: dict[str, Slot]
    param: Tensor
    grad: Tensor


def same_order(param: Tensor, grad: Tensor) -> bool:
    """Whether parameter and gradient are dense, with their elements in the same order in memory.

    Only then can the step update the one and read the other where they are.

    Args:
        param: real numbers, of any layout.
        grad: its gradient, which may be complex.
    """
    g = as_real(grad)
    # Strides of dimensions of one element may differ although the order is the same.
    alike = g.stride() == param.stride() or (g.is_contiguous() and param.is_contiguous())
    return alike and is_dense(param) and not is_lazy(grad)


def allocate(params: Sequence[Tensor], grad_dtype: torch.dtype, staging: Staging) -> list[Scratch]:
    """Scratch memory for parameters of one dtype and device, in their order.

    Args:
        params: real tensors of any layout.
        grad_dtype: of all of their gradients.
    """
    if not params:
        return []
    pages = _pages(params, staging.page)
    sizes = [sum(align(param.numel()) for param in page) for page in pages]
    param_pages = _page_memory(sizes, params[0].dtype, params[0].device, staging.shared)
    grad_pages = _page_memory(sizes, grad_dtype, params[0].device, staging.shared)
    scratch = []
    for page, *memory in zip(pages, param_pages, grad_pages, strict=True):
        start = 0
        for param in page:
            numel, layout = param.numel(), dense_layout(param)
            # Slots of one page name one tensor object, by which the planner knows neighbours.
            p_slot, g_slot = (Slot(segment, start, numel) for segment in memory)
            p, g = (segment[start : start + numel].as_strided(*layout) for segment in memory)
            scratch.append(Scratch({"param": p_slot, "grad": g_slot}, p, g))
            start += align(numel)  # as in the state's segments, or rows would not stay neighbours
    return scratch


def _pages(params: Sequence[Tensor], page: int) -> list[list[Tensor]]:
    """The parameters, cut into runs that fit a page. One larger than a page has its own."""
    pages: list[list[Tensor]] = []
    room = 0
    for param in params:
        need = align(param.numel())
        if not pages or need > room:
            pages.append([])
            room = max(page, need)
        pages[-1].append(param)
        room -= need
    return pages


def _page_memory(
    sizes: Sequence[int], dtype: torch.dtype, device: torch.device, shared: bool
) -> Sequence[Tensor]:
    """One zeroed tensor for each page, all of them over one allocation."""
    # Zeros: the gaps between slots are updated, too, and what lies there should be numbers.
    memory = torch.zeros(max(sizes) if shared else sum(sizes), dtype=dtype, device=device)
    return [memory[:size] for size in sizes] if shared else torch.split(memory, list(sizes))


class StagedCopies:
    """Copies parameters and gradients to their scratch memory, and updated parameters back.

    Args:
        params: what is copied, N real tensors.
        scratch: where to, N of `allocate`'s.
        grad_indexes: where their gradients are among those of a step, N numbers.
    """

    def __init__(
        self, params: Sequence[Tensor], scratch: Sequence[Scratch], grad_indexes: Sequence[int]
    ) -> None:
        self.params, self.grad_indexes = list(params), list(grad_indexes)
        self.param_copies = [copies.param for copies in scratch]
        self.grad_copies = [copies.grad for copies in scratch]

    def load_params(self) -> None:
        """Copy the parameters in."""
        copy_all(self.param_copies, self.params)

    def load_grads(self, grads: Sequence[Tensor]) -> None:
        """Copy their gradients in. `grads`: of every parameter that has one, in order."""
        copy_all(self.grad_copies, [as_real(grads[i]) for i in self.grad_indexes])

    def store_params(self) -> None:
        """Copy the updated parameters back."""
        copy_all(self.params, self.param_copies)


class Join(NamedTuple):
    """One-dimensional tensors that are copied onto a stretch of a page by one call.

    first, last: the tensors' numbers among those of the page; `last` is the one behind.
    page: the stretch.
    paddings: what fills each tensor's slot behind it; none if all fill their slots.
    """

    first: int
    last: int
    page: Tensor
    paddings: list[Tensor]

    def __call__(self, tensors: list[Tensor]) -> None:
        if self.paddings:
            tensors = list(chain.from_iterable(zip(tensors, self.paddings, strict=True)))
        torch.cat(tensors, out=self.page)


class JoinedCopies(StagedCopies):
    """The same for contiguous tensors that fill one page, with fewer calls on the way in.

    A copy costs 0.35 us per tensor, a join 0.15 us. Only one-dimensional tensors can be joined:
    parameters are viewed so once, gradients of more dimensions are copied.

    Args:
        params, scratch, grad_indexes: as for `StagedCopies`. Parameters and gradients are not
            complex.
        pages: the flat memory behind the copies of parameters and of gradients, from the first
            slot's start on.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        scratch: Sequence[Scratch],
        grad_indexes: Sequence[int],
        pages: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__(params, scratch, grad_indexes)
        self.flat_params = [as_flat(param) for param in params]
        self.param_joins, self.grad_joins = [self._joins(page) for page in pages]

    @staticmethod
    def suits(params: Sequence[Tensor]) -> bool:
        """Whether these parameters, none of them complex, are small and contiguous enough."""
        small = sum(param.numel() for param in params) <= JOINED_NUMEL * len(params)
        return small and all(param.is_contiguous() for param in params)

    def _joins(self, page: Tensor) -> list[Join]:
        """Cut the page into stretches."""
        zeros = page.new_zeros(SLOT_ALIGN)
        sizes = [align(param.numel()) for param in self.params]
        joins: list[Join] = []
        last = end = 0
        while last < len(sizes):
            first, start = last, end
            while last < len(sizes) and (last == first or end + sizes[last] <= start + JOINED):
                end += sizes[last]
                last += 1
            members = zip(sizes[first:last], self.params[first:last], strict=True)
            paddings = [zeros[: size - param.numel()] for size, param in members]
            if not any(padding.numel() for padding in paddings):
                paddings = []
            joins.append(Join(first, last, page[start:end], paddings))
        return joins

    def load_params(self) -> None:
        for join in self.param_joins:
            join(self.flat_params[join.first : join.last])

    def load_grads(self, grads: Sequence[Tensor]) -> None:
        members = [grads[i] for i in self.grad_indexes]
        for join in self.grad_joins:
            part = slice(join.first, join.last)
            if all(grad.ndim == 1 for grad in members[part]):
                join(members[part])
            else:
                copy_all(self.grad_copies[part], members[part])
