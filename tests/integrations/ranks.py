"""Runs a function in several processes that talk over gloo, and brings back what each returned.
Knows no optimizer.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import pathlib
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

# Ranks are forked from a server that has imported torch, and what an optimizer's step imports:
# seconds for each rank.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["pytest", "torch.distributed.optim", "torch._dynamo"])


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` processes of one gloo group; returns their
    results by rank.

    Args:
        function: of a module's top level, as are the types of arguments and results: they are
            pickled.
        timeout_s: a rank that takes longer ends, and shows where it stood.

    Raises RuntimeError with the traceback of every rank that failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        ranks = [
            context.Process(
                target=_rank, args=(rank, world_size, folder, timeout_s, function, args)
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout_s + 30)
            process.kill()  # of one that has ended: nothing
            process.join()
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
        if failed:
            texts = [(folder / f"{rank}.failure") for rank in failed]
            raise RuntimeError(
                "\n".join(
                    f"rank {rank} of {world_size} ended with exit code {ranks[rank].exitcode}\n"
                    + (text.read_text() if text.exists() else "")
                    for rank, text in zip(failed, texts, strict=True)
                )
            )
        return [
            pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)
        ]


def _rank(
    rank: int, world_size: int, folder: pathlib.Path, timeout_s: float, function: Any, args: Any
) -> None:
    torch.set_num_threads(1)  # ranks share the cores
    with (folder / f"{rank}.failure").open("w") as failure:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=failure)
        try:
            store = distributed.FileStore(str(folder / "store"), world_size)
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            result = function(rank, *args)
            (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
            distributed.barrier()  # nobody leaves while others still wait for it
            distributed.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=failure)
            raise SystemExit(1) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
