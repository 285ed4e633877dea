"""Steps memory of the host a chunk at a time in numpy, on several threads.

The formula is that of `numerics/formula.py`. numpy's functions round as torch's do, but cost a
third per call, write where they are told to, and never wait for each other. A chunk's operands and
scratch memory stay in a core's cache from the first operation to the last.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics import formula
from ..numerics.formula import Flags, Scalars, Scratch

# Elements per chunk. Measured on 16 Mi elements and two threads: 2^15 takes 1.5 times as long, as
# threads wait for Python's lock between calls, and 2^18 is 2 % faster but splits into few chunks.
FLOAT32_CHUNK = 1 << 17
# Operands of other types are converted by torch, which keeps copies of up to this many elements in
# the thread that asks. Larger ones would start threads of torch's in each of ours.
CONVERTED_CHUNK = 1 << 15
# More threads than this would wait for Python's lock most of the time.
MAX_THREADS = 8


class ArrayOperand(NamedTuple):
    """A flat tensor of the host, and its memory as a numpy array if it is float32, else None."""

    tensor: Tensor
    array: Any

    @staticmethod
    def of(tensor: Tensor) -> ArrayOperand:
        """`tensor`: flat, in a storage of its own: numpy's view makes a storage unresizable."""
        return ArrayOperand(tensor, tensor.numpy() if tensor.dtype == torch.float32 else None)


class ArrayChunk(NamedTuple):
    """Elements `start` to `end` of the operands of `adam_update`, and its arguments."""

    operands: Sequence[ArrayOperand | None]  # p, g, m, v, v_max, ema
    start: int
    end: int
    scalars: Scalars  # numpy's float32
    flags: Flags


def suits(device: torch.device, compute: torch.dtype) -> bool:
    """Whether numpy can compute in this type on this device, and is there."""
    return formula.NUMPY is not None and device.type == "cpu" and compute == torch.float32


def chunks_of(
    operands: Sequence[ArrayOperand | None],
    numel: int,
    scalars: Tensor,
    flags: Flags,
) -> list[ArrayChunk]:
    """Cut the first `numel` elements of the operands into chunks.

    Args:
        scalars: shape (SCALARS,), float32.
        flags: as for `adam_update`.
    """
    of_numpy = Scalars(*scalars.numpy()[: len(Scalars._fields)])
    in_place = all(operand.array is not None for operand in operands if operand)
    size = FLOAT32_CHUNK if in_place else CONVERTED_CHUNK
    return [
        ArrayChunk(operands, start, min(start + size, numel), of_numpy, flags)
        for start in range(0, numel, size)
    ]


def step_chunks(chunks: Sequence[ArrayChunk]) -> None:
    """Update the chunks, which share no memory, on as many threads as torch uses."""
    if not chunks:
        return
    size = max(chunk.end - chunk.start for chunk in chunks)
    remaining = deque(chunks)
    threads = min(torch.get_num_threads(), MAX_THREADS, len(chunks) // 2)
    helpers = _start_helpers(threads - 1, remaining, size)
    try:
        _step_remaining(remaining, size)
    finally:
        # After Ctrl-C nothing may go on writing behind the user's back.
        remaining.clear()
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _start_helpers(count: int, remaining: deque[ArrayChunk], size: int) -> list[Future[None]]:
    """Have other threads take chunks as well."""
    helpers = []
    for _ in range(count):
        try:
            helpers.append(_pool().submit(_step_remaining, remaining, size))
        except RuntimeError:  # the interpreter is shutting down, and this thread works alone
            break
    return helpers


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS - 1, thread_name_prefix="fused_adam")


if hasattr(os, "register_at_fork"):
    # A forked child has no threads but the one that forked.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _step_remaining(remaining: deque[ArrayChunk], size: int) -> None:
    workspace = Workspace(size)
    with formula.silent():
        while True:
            try:
                chunk = remaining.popleft()
            except IndexError:
                return
            workspace.step(chunk)


class Workspace:
    """One thread's scratch memory for chunks of up to `size` elements."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.scratch = Scratch(*(self._memory().numpy() for _ in Scratch._fields))
        self.converted: dict[int, Tensor] = {}  # place among the operands -> float32 memory

    def _memory(self) -> Tensor:
        return torch.empty(self.size, dtype=torch.float32, device="cpu")

    def step(self, chunk: ArrayChunk) -> None:
        """Load, update and store, as `adam_step`."""
        start, end, numel = chunk.start, chunk.end, chunk.end - chunk.start
        arrays: list[Any] = []  # p, g, m, v, v_max, ema
        copies: list[tuple[Tensor, Tensor]] = []  # a user's memory, and what belongs there
        for place, operand in enumerate(chunk.operands):
            if operand is None:
                arrays.append(None)
            elif operand.array is not None:
                arrays.append(operand.array[start:end])
            else:
                memory, copy = operand.tensor[start:end], self._converted(place)[:numel]
                arrays.append(copy.copy_(memory).numpy())
                if place > 1 or (place == 0 and chunk.flags.store_param):
                    copies.append((memory, copy))
        scratch = self.scratch
        if numel < self.size:
            scratch = Scratch(*(array[:numel] for array in scratch))
        assert formula.NUMPY is not None
        p, g, m, v, v_max, ema = arrays
        formula.adam_update(
            p, g, m, v, v_max, ema, chunk.scalars, chunk.flags, formula.NUMPY, scratch
        )
        for memory, copy in copies:
            memory.copy_(copy)

    def _converted(self, place: int) -> Tensor:
        if place not in self.converted:
            self.converted[place] = self._memory()
        return self.converted[place]
