"""Accelerate: prepare, accumulate, clip, save_state and load_state, in one process and in two."""

import gc
import os
import weakref

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedType, set_seed
from ranks import run_ranks
from shards import whole_results
from test_ddp import STEPS, alone, loss_of, network
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from training import results, same_bits

from bench.harness.oracle import Options, tolerance
from fused_adam import FusedAdamW

LR, CLIP, PARTS, EPOCH = 1e-2, 0.05, 2, 12  # micro-batches per step, and in an epoch
ATOL = tolerance(torch.float32, EPOCH // PARTS, Options(lr=LR, weight_decay=0.01), roundings=4)[
    "param"
]


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerators of one process share their settings: the next test may have others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(options, optimizer_class=FusedAdamW, dtype=torch.float32, scaler=None, **settings):
    # A checkpoint does not have the order of other samplers over several processes.
    order = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=PARTS, dataloader_config=order, **settings
    )
    accelerator.scaler = scaler  # Accelerate itself makes one for a GPU alone
    set_seed(0)
    model = nn.Sequential(nn.Linear(6, 33), nn.GELU(), nn.Dropout(0.1), nn.Linear(33, 3)).to(dtype)
    optimizer = optimizer_class(model.parameters(), lr=LR, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    batches = DataLoader(torch.randn(2 * EPOCH, 6, dtype=dtype), batch_size=2, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, batches, scheduler)


def epoch(number, accelerator, model, optimizer, batches, scheduler, clip=True):
    """Train through all batches; returns the norms that Accelerate clipped."""
    norms = []
    batches.set_epoch(number)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            if clip and accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), CLIP)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return norms


@pytest.mark.parametrize(
    ("options", "dtype", "mixed"),
    [
        ({}, torch.float32, "no"),
        ({"flatten": True}, torch.float32, "no"),
        ({}, torch.float32, "bf16"),
        ({"precision": "split32-bf16", "flatten": True}, torch.bfloat16, "no"),
        ({"precision": "split24-int8", "seed": 3}, torch.bfloat16, "no"),
    ],
    ids=str,
)
def test_loading_a_state(options, dtype, mixed, tmp_path):
    """Weights, moments and learning rates have the bits of a training that was never stopped."""
    whole = prepared(options, dtype=dtype, mixed_precision=mixed)
    assert max(epoch(0, *whole)) > CLIP
    whole[0].save_state(tmp_path)
    epoch(1, *whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    rest = prepared(options, dtype=dtype, mixed_precision=mixed)
    rest[0].load_state(tmp_path)
    epoch(1, *rest)
    assert same_bits(results(rest[2]), results(whole[2]))
    assert rest[4].get_last_lr() == whole[4].get_last_lr() != [LR]
    assert all(entry["step"] == 2 * EPOCH / PARTS for entry in results(rest[2]))
    buffers = rest[2].optimizer._engine.flat
    assert buffers is None or all(buffers.find(param, param.grad) for param in rest[1].parameters())


def weights(optimizer_class, options, **how):
    parts = prepared(options, optimizer_class)
    epoch(0, *parts, **how)
    return [param.detach() for param in parts[1].parameters()]


def test_near_torch():
    torch.testing.assert_close(
        weights(FusedAdamW, {}), weights(torch.optim.AdamW, {}), rtol=0, atol=ATOL
    )


def test_clipping_inside_the_step_instead():
    inside = weights(FusedAdamW, {"max_grad_norm": CLIP}, clip=False)
    before, never = weights(FusedAdamW, {}), weights(FusedAdamW, {}, clip=False)
    torch.testing.assert_close(inside, before, rtol=0, atol=ATOL)
    assert max((a - b).abs().max() for a, b in zip(never, before, strict=True)) > 10 * ATOL


def trained_with(scaler, options, overflowing=1):
    """Without a scaler the step that overflows under one is left out; returns results, and which
    steps were skipped.
    """
    accelerator, model, optimizer, batches, _ = prepared(options, scaler=scaler)
    model.eval()  # no dropout: what is left out draws no numbers
    skipped = []
    for number, batch in enumerate(batches):
        overflows = number // PARTS == overflowing
        if overflows and scaler is None:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(
                model(batch).square().mean() * (float("inf") if overflows else 1.0)
            )
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            skipped.append(optimizer.step_was_skipped)
    return results(optimizer), skipped


# torch's own fused steps decide on the device too, so that Accelerate does not hear of it.
@pytest.mark.parametrize(
    ("options", "heard"), [({}, True), ({"fused": True}, False), ({"max_grad_norm": CLIP}, False)]
)
@pytest.mark.parametrize("flatten", [False, True])
def test_grad_scaler(options, heard, flatten):
    options = {**options, "flatten": flatten}
    scaled, skipped = trained_with(torch.amp.GradScaler("cpu", init_scale=1024.0), options)
    expected, _ = trained_with(None, options)
    assert same_bits(scaled, expected)
    assert skipped == [heard and step == 1 for step in range(EPOCH // PARTS)]


def in_two_processes(rank, options, folder):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        OMP_NUM_THREADS="1",
    )
    whole = prepared(options)
    assert (whole[0].num_processes, whole[0].process_index) == (2, rank)
    epoch(0, *whole)
    whole[0].save_state(folder)
    epoch(1, *whole)
    rest = prepared(options)
    rest[0].load_state(folder)
    epoch(1, *rest)
    return results(whole[2]), results(rest[2]), len(whole[3])


@pytest.mark.parametrize("options", [{}, {"flatten": True}], ids=str)
def test_two_processes(options, tmp_path):
    """Each sees half of the batches; both have the same bits, resumed or not."""
    ranks = run_ranks(2, in_two_processes, options, tmp_path)
    for whole, rest, batches in ranks:
        assert batches == EPOCH // 2
        assert same_bits(whole, ranks[0][0]) and same_bits(rest, whole)


def with_fsdp2(rank, options, efficient):
    """The optimizer is made for the whole model; Accelerate puts the shards into its groups."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        OMP_NUM_THREADS="1",
    )
    accelerator = Accelerator(cpu=True)
    # Accelerate takes its way of FSDP only where it finds a GPU; what it then does runs on CPUs,
    # too.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=efficient
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    model = network()
    optimizer = FusedAdamW(model.parameters(), lr=LR, **options)
    flat = optimizer._engine.flat
    slots = (
        [slot for place in flat.flat_params.values() for slot in (place.param, place.grad)]
        if flat
        else []
    )
    buffers = [weakref.ref(slot.segment) for slot in slots]
    del flat, slots
    model, prepared_optimizer = accelerator.prepare(model, optimizer)
    assert all(type(param) is DTensor for param in model.parameters())
    for step in range(STEPS):
        prepared_optimizer.zero_grad()
        gc.collect()
        assert all(buffer() is None for buffer in buffers)
        accelerator.backward(loss_of(model, rank, step))
        prepared_optimizer.step()
    assert not optimizer._engine.flat or not optimizer._engine.flat.flat_params
    return whole_results(optimizer), len(buffers)


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"flatten": True}, {"flatten": True, "max_grad_norm": CLIP}], ids=str
)
def test_fsdp2_replaces_the_parameters(options, efficient):
    """The flat buffers of those that left are let go at the first `zero_grad()`, and the bits are
    one process's.
    """
    expected = alone(options)
    for found, buffers in run_ranks(2, with_fsdp2, options, efficient):
        assert same_bits(found, expected)
        assert buffers == (8 if "flatten" in options else 0)
