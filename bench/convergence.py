"""`demo --precision`: one GPT trained under each recipe, over seeds, and judged. No drawing, no
tables here.

Weights, gradients and states are stored as the recipe says; the model computes in float32 on the
weights as they are stored, so that what differs between the runs is the optimizer alone (and since
CPUs without bf16 units emulate it).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from torch.func import functional_call

from fused_adam import FusedAdamW
from fused_adam.precision import parse

from .demo import BATCH, LAST_STEPS, LR, determinism, param_groups, schedule, state_tensors
from .harness.corpus import draw_batch, load_corpus
from .harness.gpt import GPT, Shape

FP32, BF16 = "torch AdamW fp32", "torch AdamW bf16"
RECOMMENDED = (
    *("split32", "split32-bf16", "split24-bf16", "sr-bf16", "split24-int8", "master32"),
    *("native-bf16", "native-int8"),
)
# 3 seeds of 10 runs of 1000 steps took 25 minutes on 2 busy cores.
WIDTH, HEADS, BLOCKS = 64, 4, 1
# All runs are held to the same excerpts, whatever their seed.
VALIDATION_EXCERPTS = 512
CURVE_POINTS = 50
# A recipe may be as far from fp32 AdamW, on the mean over seeds, as fp32 AdamW's own best and worst
# seeds are apart.
SPREAD_FACTOR = 1.0

Result = dict[str, Any]


def names_of(text: str) -> list[str]:
    """The recommended recipes for `all`, else the one named. Raises ValueError if there is none of
    this name.
    """
    if text == "all":
        return list(RECOMMENDED)
    recipe = parse(text)
    recipe.check(weights_dtype(text))
    return [text]


def weights_dtype(name: str) -> torch.dtype:
    """What the run of this name trains: fp32 weights only where the recipe stores them as they are."""
    return torch.float32 if name == FP32 or name.startswith("native") else torch.bfloat16


def stated_bytes(name: str) -> float:
    """State bytes per parameter as documented; step counters not counted."""
    dtype = weights_dtype(name)
    return 2.0 * dtype.itemsize if name in (FP32, BF16) else parse(name).held_bytes(dtype)


def train_run(name: str, steps: int, seed: int, device: torch.device) -> Result:
    """Train one model: for one seed the same initial weights (up to their dtype) and batches under
    every name.

    Returns train_loss (mean of the last steps), validation_loss, curve (the training loss, mean of
    each of CURVE_POINTS equal parts), in nats per character; parameters; state_bytes per parameter,
    step counters not counted.
    """
    corpus = load_corpus()
    with determinism():
        shape = Shape(len(corpus.characters), width=WIDTH, heads=HEADS, blocks=BLOCKS)
        torch.manual_seed(seed)
        model = GPT(shape).to(device, weights_dtype(name))
        groups = param_groups(model)
        optimizer: torch.optim.Optimizer
        if name in (FP32, BF16):
            optimizer = torch.optim.AdamW(groups, lr=LR)
        else:
            optimizer = FusedAdamW(groups, lr=LR, precision=name)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))

        def loss_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            weights = {key: param.float() for key, param in model.named_parameters()}
            loss: torch.Tensor = functional_call(model, weights, tuple(x.to(device) for x in batch))
            return loss

        generator, losses = torch.Generator().manual_seed(seed), []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(draw_batch(corpus.train, BATCH, shape.context, generator))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        with torch.no_grad():
            excerpts = torch.Generator().manual_seed(0)
            validation = loss_of(
                draw_batch(corpus.validation, VALIDATION_EXCERPTS, shape.context, excerpts)
            ).item()
    parameters = sum(param.numel() for param in model.parameters())
    held = sum(tensor.nbytes for tensor in state_tensors(optimizer) if tensor.dim())
    points = min(CURVE_POINTS, steps)
    ends = [steps * i // points for i in range(points + 1)]
    return {
        "train_loss": statistics.fmean(losses[-LAST_STEPS:]),
        "validation_loss": validation,
        "curve": [statistics.fmean(losses[a:b]) for a, b in itertools.pairwise(ends)],
        "parameters": parameters,
        "state_bytes": held / parameters,
    }


def train(
    names: Sequence[str],
    steps: int,
    seeds: Sequence[int],
    device: torch.device,
    tell: Callable[[str, float], None],
) -> list[Result]:
    """Train torch's two and all `names` with all seeds, each run in a process with one thread; then
    judge.

    Args:
        tell: called with words and the share done, after each run.

    Returns one result per name: see `summary`.
    """
    jobs = [(name, seed) for seed in seeds for name in (FP32, BF16, *names)]
    found: dict[tuple[str, int], Result] = {}
    workers = min(len(jobs), os.cpu_count() or 1) if device.type == "cpu" else 1
    # Processes of their own: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # Ctrl-C reaches them, too: they would write a traceback each. What is ignored here is
        # ignored in a child.
        with uninterrupted():
            futures = {
                pool.submit(train_run, name, steps, seed, device): (name, seed)
                for name, seed in jobs
            }
        try:
            for future in as_completed(futures):
                job = futures[future]
                found[job] = future.result()
                loss = found[job]["validation_loss"]
                tell(f"{job[0]}, seed {job[1]}: validation loss {loss:.4f}", len(found) / len(jobs))
        except KeyboardInterrupt:
            for (
                child
            ) in multiprocessing.active_children():  # else the pool waits until they are done
                child.terminate()
            raise
    results = [
        summary(name, [found[name, seed] for seed in seeds]) for name in (FP32, BF16, *names)
    ]
    judge(results)
    return results


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """While it lasts Ctrl-C is ignored, here and for good in processes that are started."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread has a say in signals
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def summary(name: str, runs: Sequence[Result]) -> Result:
    """The runs of one name, a list spec per seed: JSON-ready, but that losses may not be finite.

    name, weights (dtype), parameters, state_bytes (measured) and stated_state_bytes per parameter,
    train_losses, validation_losses, curves.
    """
    return {
        "name": name,
        "weights": str(weights_dtype(name)).removeprefix("torch."),
        "parameters": runs[0]["parameters"],
        "state_bytes": runs[0]["state_bytes"],
        "stated_state_bytes": stated_bytes(name),
        "train_losses": [run["train_loss"] for run in runs],
        "validation_losses": [run["validation_loss"] for run in runs],
        "curves": [run["curve"] for run in runs],
    }


def judge(results: Sequence[Result]) -> None:
    """Add to each result difference (mean validation loss less fp32 AdamW's), limit, and passed.

    A recipe passes if its mean is at most torch bf16 AdamW's and |difference| at most `limit`:
    SPREAD_FACTOR times what lies between fp32 AdamW's best and worst seed. The two of torch are
    what is held against, not judged (None), but for within_limit, which says for all whether the
    limit alone is met: torch bf16 AdamW within it means that this run is too short or too small to
    tell.
    """
    means = {result["name"]: statistics.fmean(result["validation_losses"]) for result in results}
    reference = next(result for result in results if result["name"] == FP32)["validation_losses"]
    limit = SPREAD_FACTOR * (max(reference) - min(reference))
    for result in results:
        name = result["name"]
        result["difference"] = means[name] - means[FP32]
        result["limit"] = limit
        result["within_limit"] = abs(result["difference"]) <= limit
        better = means[name] <= means[BF16] or not math.isfinite(means[BF16])
        result["passed"] = None if name in (FP32, BF16) else bool(result["within_limit"] and better)


def json_ready(value: Any) -> Any:
    """Losses that are not finite as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
