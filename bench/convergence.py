"""`convergence`: one GPT trained under each precision recipe, over seeds, and compared with torch's
AdamW in fp32 and bf16 and, if wanted, other projects' 8-bit optimizers.

Weights, gradients and states are stored as the recipe says; the model computes in float32 on the
weights as they are stored, so that what differs between the runs is the optimizer alone (and since
CPUs without bf16 units emulate it). A result is what `summary` and `add_verdicts` say.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_adam import FusedAdamW
from fused_adam.precision import parse

from .harness.console import Progress, Table, exact_bytes
from .harness.corpus import draw_batch, load_corpus
from .harness.gpt import (
    BATCH,
    GPT,
    LAST_STEPS,
    LR,
    Shape,
    determinism,
    param_groups,
    schedule,
    state_tensors,
)
from .harness.optimizers import peers
from .harness.oracle import AdamWOptions
from .harness.results import Record, Result
from .harness.session import Session, hold_interrupts

FP32, BF16 = "torch AdamW fp32", "torch AdamW bf16"
RECOMMENDED = (
    "split32",
    "split32-bf16",
    "split24-bf16",
    "sr-bf16",
    "split24-int8",
    "master32",
    "native-bf16",
    "native-int8",
)
# Other projects' optimizers that can be compared: fp32 weights, 8-bit moments. Each leaves small
# parameters in fp32, as is its default.
PEERS = ("bitsandbytes-8-bit", "torchao-8-bit")
# 3 seeds of 10 runs of 1000 steps took 25 minutes on 2 busy cores.
STEPS, SEEDS = 1000, 3
QUICK_STEPS, QUICK_SEEDS = 50, 2
WIDTH, HEADS, BLOCKS = 64, 4, 1
# All runs are held to the same excerpts, whatever their seed.
VALIDATION_EXCERPTS = 512
CURVE_POINTS = 50
# A recipe may be as far from fp32 AdamW, on the mean over seeds, as fp32 AdamW's own best and worst
# seeds are apart.
SPREAD_FACTOR = 1.0
COLUMNS = (
    "optimizer",
    "weights",
    "state B/param.",
    "stated",
    "train loss",
    "valid. loss",
    "less fp32's",
    "verdict",
)

Runs = Mapping[tuple[str, int], Result]  # by name and seed


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after some seeds were complete; `results` are of those."""

    def __init__(self, results: list[Result], seeds: int) -> None:
        super().__init__()
        self.results, self.seeds = results, seeds


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if every recipe passes, else 1."""
    names = [name for text in arguments.precision for name in recipe_names(text)]
    arguments.precision = list(dict.fromkeys(names))
    arguments.steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    arguments.seeds = arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)
    session = Session(arguments)
    recorder, seeds = session.recorder, range(arguments.seed, arguments.seed + arguments.seeds)
    results: list[Result] = []
    with session.measuring() as progress:
        try:
            everyone = (FP32, BF16, *arguments.precision, *arguments.peers)
            results = train(everyone, arguments.steps, seeds, session.device, progress)
        except Interrupted as stop:
            recorder.results, recorder.arguments["seeds"] = stop.results, stop.seeds
            raise
        recorder.results = results
    failed = any(result["passed"] is False for result in results)
    return session.finish(tables) or (1 if failed else 0)


def recipe_names(text: str) -> list[str]:
    """The recommended recipes for `all`, else the one named. Raises ValueError if it is none."""
    if text == "all":
        return list(RECOMMENDED)
    recipe = parse(text)
    recipe.check(weights_dtype(text))
    return [text]


def check_peer(name: str) -> None:
    """Raises ValueError if there is no such optimizer to compare with, or none installed."""
    if name not in PEERS:
        raise ValueError(f"{name!r} is not one of {', '.join(PEERS)}")
    try:
        make_optimizer(name, [{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    except ImportError as error:
        raise ValueError(f"{name}: {error}") from None


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of this name: torch's, another project's, or ours with this recipe."""
    if name in (FP32, BF16):
        return torch.optim.AdamW(groups, lr=LR)
    if name in PEERS:
        params: Any = groups  # as every optimizer takes them, besides tensors
        return peers()[name].make(params, AdamWOptions(lr=LR))
    return FusedAdamW(groups, lr=LR, precision=name)


def weights_dtype(name: str) -> torch.dtype:
    """Of the weights that this run trains: fp32 where the optimizer keeps them as they are."""
    exact = name in (FP32, *PEERS) or name.startswith("native")
    return torch.float32 if exact else torch.bfloat16


def stated_bytes(name: str) -> float | None:
    """State bytes per parameter as documented, step counters not counted; None of others."""
    if name in PEERS:
        return None
    dtype = weights_dtype(name)
    return 2.0 * dtype.itemsize if name in (FP32, BF16) else parse(name).held_bytes(dtype)


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, step counters not counted; what is shared counts once."""
    tensors = [tensor for tensor in state_tensors(optimizer) if tensor.dim()]
    parts: list[Tensor] = []
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):  # torchao's hold their codes and scales
            names, _ = tensor.__tensor_flatten__()
            parts += [getattr(tensor, name) for name in names]
        else:
            parts.append(tensor)
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())


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
        optimizer = make_optimizer(name, groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))

        def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
            weights = {key: param.float() for key, param in model.named_parameters()}
            loss: Tensor = functional_call(model, weights, tuple(x.to(device) for x in batch))
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
            batch = draw_batch(corpus.validation, VALIDATION_EXCERPTS, shape.context, excerpts)
            validation = loss_of(batch).item()
    parameters = sum(param.numel() for param in model.parameters())
    points = min(CURVE_POINTS, steps)
    ends = [steps * i // points for i in range(points + 1)]
    return {
        "train_loss": statistics.fmean(losses[-LAST_STEPS:]),
        "validation_loss": validation,
        "curve": [statistics.fmean(losses[a:b]) for a, b in itertools.pairwise(ends)],
        "parameters": parameters,
        "state_bytes": held_bytes(optimizer) / parameters,
    }


def train(
    names: Sequence[str], steps: int, seeds: Sequence[int], device: torch.device, tell: Progress
) -> list[Result]:
    """Train all `names`, torch's two first, with all seeds, each run in a process with one thread;
    then compare. Returns one result per name.

    Args:
        tell: called with words and the share done, after each run.

    Raises Interrupted if an interrupt leaves at least one seed complete.
    """
    jobs = [(name, seed) for seed in seeds for name in names]
    runs: dict[tuple[str, int], Result] = {}
    workers = min(len(jobs), os.cpu_count() or 1) if device.type == "cpu" else 1
    # Processes of their own: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            # Ctrl-C reaches them, too: they would write a traceback each. One that comes while they
            # start must not be lost, so it is held back here, and in them for good.
            with hold_interrupts():
                futures = {
                    pool.submit(train_run, name, steps, seed, device): (name, seed)
                    for name, seed in jobs
                }
            for future in as_completed(futures):
                name, seed = futures[future]
                runs[name, seed] = future.result()
                loss = runs[name, seed]["validation_loss"]
                tell(f"{name}, seed {seed}: validation loss {loss:.4f}", len(runs) / len(jobs))
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()  # else the pool waits until they are done
            complete = [seed for seed in seeds if all((name, seed) in runs for name in names)]
            if not complete:
                raise
            raise Interrupted(summaries(names, runs, complete), len(complete)) from None
    return summaries(names, runs, seeds)


def summaries(names: Sequence[str], runs: Runs, seeds: Sequence[int]) -> list[Result]:
    """One result per name, compared."""
    results = [summary(name, [runs[name, seed] for seed in seeds]) for name in names]
    add_verdicts(results)
    return results


def summary(name: str, runs: Sequence[Result]) -> Result:
    """The runs of one name, a list entry per seed.

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


def add_verdicts(results: Sequence[Result]) -> None:
    """Add difference (mean validation loss less fp32 AdamW's), limit, within_limit and passed.

    A recipe passes if its mean is at most torch bf16 AdamW's and |difference| at most `limit`:
    SPREAD_FACTOR times what lies between fp32 AdamW's best and worst seed. For other projects'
    optimizers `passed` is None, but `within_limit` says for all whether the
    limit alone is met. torch bf16 AdamW within it means that this run is too short or too small to
    tell. One seed gives no limit, and no verdict.
    """
    means = {result["name"]: statistics.fmean(result["validation_losses"]) for result in results}
    reference = next(result for result in results if result["name"] == FP32)["validation_losses"]
    limit = SPREAD_FACTOR * (max(reference) - min(reference)) if len(reference) > 1 else None
    for result in results:
        name = result["name"]
        result["difference"] = means[name] - means[FP32]
        result["limit"] = limit
        within = None if limit is None else abs(result["difference"]) <= limit
        better = means[name] <= means[BF16] or not math.isfinite(means[BF16])
        result["within_limit"] = within
        judged = within is not None and name not in (FP32, BF16, *PEERS)
        result["passed"] = bool(within and better) if judged else None


# The table.


def tables(record: Record) -> list[Table]:
    """A row per optimizer; below, the rule of the verdict with its numbers, and whether this run
    can tell.
    """
    results, options = record["results"], record["arguments"]
    rows = [
        [
            result["name"],
            result["weights"],
            exact_bytes(result["state_bytes"]),
            "-" if stated is None else exact_bytes(stated),
            mean_and_range(result["train_losses"]),
            mean_and_range(result["validation_losses"]),
            "-" if result["difference"] is None else f"{result['difference']:+.4f}",
            verdict(result),
        ]
        for result in results
        for stated in [result["stated_state_bytes"]]
    ]
    fp32, bf16 = results[0], results[1]
    title = (
        f"GPT of {fp32['parameters']:,} parameters, {options['steps']} steps, mean over "
        f"{options['seeds']} seeds ± half their range, nats per character"
    )
    limit = "not known" if fp32["limit"] is None else f"{fp32['limit']:.4f}"
    notes = [
        f"pass: validation loss at most {bf16['name']}'s, and at most {limit} from "
        f"{fp32['name']}'s: as far as the best and the worst of its own seeds are apart",
        "the model computes in float32 on the weights as stored: what differs is the optimizer "
        "alone",
    ]
    if bf16["within_limit"]:
        notes.append(
            f"{bf16['name']} is within that limit too: this run does not tell good from bad by it"
        )
    return [Table(title, COLUMNS, [*rows], notes)]


def mean_and_range(losses: Sequence[float | None]) -> str:
    """The mean over seeds and, behind it, half the distance between the lowest and the highest."""
    finite = [loss for loss in losses if loss is not None]
    if len(finite) < len(losses):
        return "not finite"
    return f"{statistics.fmean(finite):.4f} ±{(max(finite) - min(finite)) / 2:.4f}"


def verdict(result: Result) -> str:
    """One word."""
    if result["passed"] is None:
        return "outside" if result["within_limit"] is False else "-"
    return "pass" if result["passed"] else "FAIL"
