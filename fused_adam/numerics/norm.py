"""Sum of squares of gradients in plain torch.

The Triton twin `fused_adam_kernels/norm.py` describes the order of the sums. Both give the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_adam_kernels import table

LANES, CHUNK = table.NORM_LANES, table.NORM_CHUNK
BATCH = 16 * CHUNK  # elements per pass: 8 MiB as float64


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
        rows = torch.nn.utils.rnn.pad_sequence([grads[i].double() for i in small], batch_first=True)
        rows = torch.nn.functional.pad(rows, (0, LANES - rows.shape[1]))
        for i, total in zip(small, halving_sum(rows.square()).unsqueeze(1), strict=True):
            sums[i] = total
    for i, grad in enumerate(grads):
        if grad.numel() > LANES:
            whole = grad.numel() // CHUNK * CHUNK
            parts = [*torch.split(grad[:whole], BATCH), grad[whole:]]
            sums[i] = torch.cat([_chunk_sums(part) for part in parts if part.numel()])
    return sums


def _chunk_sums(part: Tensor) -> Tensor:
    """Sums of squares of several whole chunks, or of one incomplete chunk; one per chunk."""
    squares = part.double().square()
    pieces = torch.nn.functional.pad(squares, (0, -squares.numel() % LANES))
    return halving_sum(add_in_order(pieces.view(-1, min(CHUNK, pieces.numel()) // LANES, LANES)))


def square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares over all gradients of one device: float64, shape ()."""
    partials = torch.cat(square_sums(grads))
    if not partials.numel():
        return partials.sum()
    return halving_sum(
        add_in_order(torch.nn.functional.pad(partials, (0, -len(partials) % LANES)).view(-1, LANES))
    )
