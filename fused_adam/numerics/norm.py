"""Sum of squares of gradients in plain torch.

The Triton twin `fused_adam_kernels/norm.py` describes the order of the sums. Both give the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_adam_kernels import table

LANES, CHUNK = table.NORM_LANES, table.NORM_CHUNK
BATCH = 16 * CHUNK  # elements per pass: 4 MiB as float32


def halving_sum(x: Tensor) -> Tensor:
    """Add x[..., i] + x[..., i + half] over the last dimension until one element is left."""
    # torch.sum adds in an order of its own. A sum of two has only one order.
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def add_in_order(pieces: Tensor) -> Tensor:
    """Sum over the dimension before the last, one piece after the other, as a lane does."""
    total = pieces[..., 0, :].clone()
    for k in range(1, pieces.shape[-2]):
        total += pieces[..., k, :]
    return total


def add_squares_in_order(pieces: Tensor) -> Tensor:
    """As above, of squares: float64. Squares and sums are rounded to the dtype of the pieces.

    float32 sums keep what every addition rounds off, and get it back at the end.
    """
    if pieces.dtype == torch.float64:
        return add_in_order(pieces.square())
    total = pieces[..., 0, :].square()
    error = torch.zeros_like(total)
    square, bigger, part, rest = (torch.empty_like(total) for _ in range(4))
    for k in range(1, pieces.shape[-2]):
        # Two-sum (Knuth 1969), into memory that stays in the cache.
        torch.square(pieces[..., k, :], out=square)
        torch.add(total, square, out=bigger)
        torch.sub(bigger, total, out=part)
        torch.sub(bigger, part, out=rest)
        total -= rest
        square -= part
        error += total.add_(square)
        total, bigger = bigger, total
    # An infinite sum has no error, but two-sum gives a NaN for it.
    return total.double() + torch.where(total < torch.inf, error, 0.0).double()


def _widened(grad: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return grad if grad.dtype == torch.float64 else grad.float()


def square_sums(grads: Sequence[Tensor]) -> list[Tensor]:
    """Sums of squares of the chunks of each gradient: float64, shape (ceil(n / CHUNK),) each.

    Args:
        grads: flat tensors of any float dtype and any size, on one device.
    """
    sums: list[Tensor] = [grad.new_zeros(0, dtype=torch.float64) for grad in grads]
    # A model has many small gradients, of up to one piece. They are summed in one go, a row each:
    # zeros at the end of a row do not change its sum.
    small = [i for i, grad in enumerate(grads) if 0 < grad.numel() <= LANES]
    if small:
        # float32 squares in float64 are as they are in float32.
        squares = [_widened(grads[i]).square().double() for i in small]
        rows = torch.nn.utils.rnn.pad_sequence(squares, batch_first=True)
        rows = torch.nn.functional.pad(rows, (0, LANES - rows.shape[1]))
        for i, total in zip(small, halving_sum(rows).unsqueeze(1), strict=True):
            sums[i] = total
    for i, grad in enumerate(grads):
        if grad.numel() > LANES:
            whole = grad.numel() // CHUNK * CHUNK
            parts = [*torch.split(grad[:whole], BATCH), grad[whole:]]
            sums[i] = torch.cat([_chunk_sums(part) for part in parts if part.numel()])
    return sums


def _chunk_sums(part: Tensor) -> Tensor:
    """Sums of squares of several whole chunks, or of one incomplete chunk; one per chunk."""
    pieces = torch.nn.functional.pad(_widened(part), (0, -part.numel() % LANES))
    pieces = pieces.view(-1, min(CHUNK, pieces.numel()) // LANES, LANES)
    return halving_sum(add_squares_in_order(pieces))


def total(partials: Tensor) -> Tensor:
    """Sum of all partial sums: float64, shape ()."""
    if not partials.numel():
        return partials.sum()
    return halving_sum(
        add_in_order(torch.nn.functional.pad(partials, (0, -len(partials) % LANES)).view(-1, LANES))
    )


def square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares over all gradients of one device: float64, shape ()."""
    return total(torch.cat(square_sums(grads)))


@dataclass(slots=True, eq=False)
class PartialSums:
    """What the norm pass of one launch group leaves in memory.

    Attributes:
        positions: of the group's parameters among all of the optimizer.
        chunks: for each of them, how many partial sums it has; 0 where another rank counts it.
        values: float64, shape (sum(chunks),), parameter by parameter. Of the last step.
    """

    positions: list[int]
    chunks: list[int]
    values: Tensor


def pairing(runs: Sequence[int]) -> list[Tensor]:
    """Which elements to add so that one per run is left: a table per round, for `add_runs`.

    Args:
        runs: how many elements each run has; may be 0. Runs lie one behind the other.

    Returns int64 tables on the CPU, shape (2, elements that are left after the round). Each column
    has the indexes of two neighbours. An element without a neighbour is added to a zero, which
    stands behind the last element.
    """
    length, tables = torch.tensor(runs, dtype=torch.int64, device="cpu"), []
    while True:
        half = ((length + 1) // 2).clamp(min=1)  # of an empty run, a zero is left
        run = torch.repeat_interleave(half)
        start, half_start = length.cumsum(0) - length, half.cumsum(0) - half
        first = 2 * (torch.arange(len(run), device="cpu") - half_start[run])
        pair = torch.stack([first, first + 1])
        tables.append(torch.where(pair < length[run], start[run] + pair, length.sum()))
        if len(run) == len(runs):
            return tables
        length = half


def add_runs(values: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The sum of each run of `pairing`. The order depends on the run's length alone."""
    for table_of_pairs in tables:
        pair = torch.nn.functional.pad(values, (0, 1))[table_of_pairs]
        values = pair[0] + pair[1]
    return values
