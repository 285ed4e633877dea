"""`train`: a real model in bf16 on one device, once per optimizer: tokens per second, memory, loss.

torch's AdamW and FusedAdamW without a recipe train fp32 weights under autocast; a recipe trains
bf16 weights. All begin with the same weights and see the same batches: two characters of Python's
own library are one token.

A result: {"model", "parameters", "weights", "optimizer", "family", "in_backward", "state_device",
"steps", "tokens" per step, "tokens_per_s", "peak_bytes", "state_bytes", "first_loss", "loss"}.
`tokens_per_s`: a statistic over blocks of steps. `peak_bytes`: the most that torch's allocator
held, null on a CPU. `state_bytes`: per parameter. `loss`: nats per token, the mean of the last
steps.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_adam import FusedAdamW, step_in_backward

from .harness.console import Table, exact_bytes, spread
from .harness.corpus import draw_batch, load_corpus
from .harness.gpt import LAST_STEPS, schedule, state_tensors
from .harness.optimizers import OURS, TORCH, recipes_of
from .harness.results import Record, Recorder, unique
from .harness.session import Session
from .harness.timing import give_back_memory, statistic, synchronize
from .harness.workload import one_line

CHARACTERS = 20_000_000
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
BLOCK_STEPS = 10  # timed together: a wait per step would keep the device idle
STEPS = 150
TORCH_FUSED = "torch fused"


@dataclass(frozen=True)
class Model:
    """A model of Hugging Face's transformers, and what one step of its training sees.

    kind: name of its config class.
    checkpoints: activations are computed again in backward, not kept.
    """

    kind: str
    sizes: dict[str, Any]
    batch: int
    time: int
    checkpoints: bool = False
    lr: float = 6e-4


LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
MODELS = {
    "gpt2": Model("GPT2Config", {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, 16, 1024),
    "llama-3-8b": Model("LlamaConfig", LLAMA_3_8B, 1, 1024, checkpoints=True, lr=3e-5),
    "tiny": Model(
        "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}, 2, 64
    ),
}


def run(arguments: argparse.Namespace) -> int:
    """Train the model with each optimizer; returns the exit code.

    Raises ValueError without transformers, or for a recipe that is not known.
    """
    session = Session(arguments)
    if arguments.memory and session.device.type == "cuda":
        total = torch.cuda.get_device_properties(session.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.memory * 1e9 / total))
    runs: dict[str, str | None] = {}
    if "torch-fused" in (arguments.peers or ()):
        runs[TORCH_FUSED] = None
    for recipe in recipes_of(arguments.precision or ["none"]):
        runs[f"FusedAdamW {recipe or ''}".strip()] = recipe
    with session.measuring() as progress:
        tokens = pairs(load_corpus(CHARACTERS).train)
        for number, (name, recipe) in enumerate(runs.items()):
            progress(name, number / len(runs))
            measure(session.recorder, name, recipe, tokens, arguments, session.device)
    return session.finish(tables)


def pairs(numbers: Tensor) -> Tensor:
    """Characters -> tokens, one per two characters."""
    even = numbers[: len(numbers) // 2 * 2].view(-1, 2)
    return even[:, 0] * (int(numbers.max()) + 1) + even[:, 1]


def make_model(model: Model, dtype: torch.dtype, seed: int, device: torch.device) -> nn.Module:
    """Random weights, the same for every optimizer up to the rounding to `dtype`."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("train needs transformers: pip install transformers")
    transformers = importlib.import_module("transformers")

    config = getattr(transformers, model.kind)(**model.sizes, use_cache=False)
    torch.manual_seed(seed)
    with torch.device(device):
        made: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if model.checkpoints:
        made.gradient_checkpointing_enable()
    model_in_training: nn.Module = made.train()
    return model_in_training


def make_optimizer(
    name: str, recipe: str | None, model: nn.Module, lr: float, state_device: str | None = None
) -> torch.optim.Optimizer:
    """Decay for matrices, none for vectors."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    if name == TORCH_FUSED:
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
    return FusedAdamW(groups, lr=lr, betas=BETAS, precision=recipe, state_device=state_device)


def measure(
    recorder: Recorder,
    name: str,
    recipe: str | None,
    tokens: Tensor,
    arguments: argparse.Namespace,
    device: torch.device,
) -> None:
    """One optimizer; what stops it is recorded."""
    in_backward = arguments.in_backward and name != TORCH_FUSED
    state_device = None if name == TORCH_FUSED else arguments.state_device
    for model_name in arguments.model or ["gpt2"]:
        model = MODELS[model_name]
        # An 8 B model has no room for fp32 weights: there torch's trains bf16 weights too.
        low = recipe is not None or model.checkpoints
        dtype = torch.bfloat16 if low else torch.float32
        words = {
            "model": model_name,
            "weights": str(dtype).removeprefix("torch."),
            "optimizer": name,
            "family": TORCH if name == TORCH_FUSED else OURS,
            "in_backward": in_backward,
            "state_device": state_device,
        }
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            made = make_model(model, dtype, arguments.seed, device)
            optimizer = make_optimizer(name, recipe, made, model.lr, state_device)
            if in_backward:
                assert isinstance(optimizer, FusedAdamW)
                step_in_backward(made, optimizer)
            result = train(made, optimizer, model, tokens, arguments.steps or STEPS, device)
            recorder.results.append({**words, **result})
        except torch.OutOfMemoryError as error:
            recorder.leave_out(name, one_line(error), model=model_name)
        made = optimizer = None  # type: ignore[assignment]
        give_back_memory()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    shape: Model,
    tokens: Tensor,
    steps: int,
    device: torch.device,
) -> dict[str, Any]:
    """Train; returns what was measured."""
    generator = torch.Generator().manual_seed(0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))
    params = list(model.parameters())
    low = params[0].dtype == torch.bfloat16
    losses, seconds = [], []
    for first in range(0, steps, BLOCK_STEPS):
        count = min(BLOCK_STEPS, steps - first)
        inputs = [draw_batch(tokens, shape.batch, shape.time, generator)[0] for _ in range(count)]
        synchronize(device)
        begin = time.perf_counter()
        for batch in inputs:
            batch = batch.to(device)
            with contextlib.nullcontext() if low else torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.detach())
        synchronize(device)
        seconds.append((time.perf_counter() - begin) / count)
    per_step = shape.batch * shape.time
    timed = seconds[1:] or seconds  # the first block compiles and allocates
    numbers = [float(loss) for loss in losses]
    elements = sum(param.numel() for param in params)
    return {
        "parameters": elements,
        "steps": steps,
        "tokens": per_step,
        "tokens_per_s": statistic([per_step / one for one in timed]),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "state_bytes": sum(t.nbytes for t in state_tensors(optimizer) if t.dim()) / elements,
        "loss": statistics.mean(numbers[-LAST_STEPS:]),
        "first_loss": numbers[0],
    }


def tables(record: Record) -> list[Table]:
    """One table per model."""
    found = []
    for model in unique(record["results"], "model"):
        results = [result for result in record["results"] if result["model"] == model]
        first = results[0]
        title = (
            f"{model}: {first['parameters']:,} parameters, {first['steps']} steps of "
            f"{first['tokens']:,} tokens"
        )
        rows = [
            [
                r["optimizer"]
                + (", in backward" if r["in_backward"] else "")
                + (", state on the host" if r.get("state_device") else ""),
                r["weights"],
                spread(r["tokens_per_s"]),
                "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f}",
                exact_bytes(r["state_bytes"]),
                f"{r['loss']:.4f}",
            ]
            for r in results
        ]
        columns = ["optimizer", "weights", "tokens/s", "peak GB", "state B/param.", "loss"]
        found.append(Table(title, columns, [*rows]))
    return found
