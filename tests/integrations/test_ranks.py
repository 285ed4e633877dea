"""The helper that starts ranks: ordered results, every traceback, and an end to what hangs."""

import time

import pytest
import torch
from ranks import run_ranks
from torch import distributed


def summed(rank, value):
    total = torch.full((), rank + value)
    distributed.all_reduce(total)
    return rank, total


def failing(rank):
    if rank == 1:
        raise ValueError("no good")
    return rank


def hanging(rank):
    if rank == 1:
        time.sleep(1000)
    distributed.barrier()


def test_results_come_back_by_rank():
    assert run_ranks(2, summed, 10.0) == [(0, 21.0), (1, 21.0)]


def test_a_failure_shows_the_traceback_of_its_rank():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 .*in failing.*ValueError: no good"):
        run_ranks(2, failing)


def test_a_hang_ends_and_shows_where_each_rank_stood():
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"(?s)rank 0 of 2 .*in hanging.*rank 1 of 2 .*in hanging"
    ):
        run_ranks(2, hanging, timeout_s=5)
    assert time.monotonic() - start < 100  # the sleep takes 1000
