"""DeepSpeed with this optimizer as the client optimizer: ZeRO stages 0 to 3, saved and resumed.

A stage of 1 or more steps flat shards of its own, one per param group.
"""

import logging
import os

import deepspeed
import pytest
import torch
from ranks import run_ranks
from torch import nn
from training import same_bits

from bench.harness.oracle import Options, tolerance
from fused_adam import FusedAdamW

STEPS, SAVED, LR, CLIP = 6, 3, 1e-2, 0.1
# DeepSpeed keeps float32 weights of its own, which are what the optimizer sees.
MASTER_BY_DEEPSPEED = {"bf16": {"enabled": True}}
# DeepSpeed keeps bfloat16 weights alone: a recipe stores the rest of their bits.
MASTER_BY_RECIPE = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
}
RECIPES = [{"precision": "split32-bf16"}, {"precision": "split24-int8", "seed": 3}]


def initialize(stage, dtype, config, options, optimizer_class=FusedAdamW):
    logging.disable(logging.WARNING)
    # Its operator for several processes on one machine would be compiled here, under a lock that a
    # killed run leaves behind for good. There is one process.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = "0"  # as its launcher sets it; its process group is there already
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)).to(dtype)
    optimizer = optimizer_class(model.parameters(), lr=LR, weight_decay=0.1, **options)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            **config,
        },
    )
    return engine, optimizer


def train(engine, dtype, first, last):
    for step in range(2 * first, 2 * last):
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        engine.backward(engine(batch).square().mean())
        engine.step()


def results(engine, optimizer):
    """The model's weights, and the state in the order in which it was made."""
    weights = [{"param": param.detach().clone()} for param in engine.module.parameters()]
    return weights + [dict(entry) for entry in optimizer.state.values()]


def resumed(rank, folder, stage, cases):
    """Per case: results without a stop, results with one, and the learning rates of both."""
    found = []
    for number, case in enumerate(cases):
        dtype = case[0]
        whole, optimizer = initialize(stage, *case)
        train(whole, dtype, 0, STEPS)
        first, _ = initialize(stage, *case)
        train(first, dtype, 0, SAVED)
        first.save_checkpoint(f"{folder}/{number}")
        rest, resumed_optimizer = initialize(stage, *case)
        rest.load_checkpoint(f"{folder}/{number}")
        train(rest, dtype, SAVED, STEPS)
        found.append(
            (
                results(whole, optimizer),
                results(rest, resumed_optimizer),
                (whole.get_lr(), rest.get_lr()),
            )
        )
    return found


@pytest.mark.parametrize("stage", range(4))
def test_resuming_from_a_checkpoint(stage, tmp_path):
    """Weights, state and learning rates have the bits of a training that was never stopped."""
    cases = [
        (torch.float32, {}, {}),
        (torch.float32, {}, {"flatten": True}),
        (torch.bfloat16, MASTER_BY_DEEPSPEED, {}),
        (torch.bfloat16, MASTER_BY_DEEPSPEED, {"precision": "native-bf16"}),
    ]
    if stage > 0:  # the setting is for sharded weights
        cases += [(torch.bfloat16, MASTER_BY_RECIPE, options) for options in RECIPES]
    [found] = run_ranks(1, resumed, str(tmp_path), stage, cases)
    for case, (whole, rest, learning_rates) in zip(cases, found, strict=True):
        assert same_bits(rest, whole), case
        assert learning_rates[0] == learning_rates[1] == [pytest.approx(LR * 0.9**STEPS)]
        entries = [entry for entry in whole if "step" in entry]
        assert len(entries) == (4 if stage == 0 else 1)
        # There DeepSpeed takes a step without gradients first, which stays counted.
        dummy_steps = int(stage == 0 and case[0] == torch.bfloat16)
        assert all(entry["step"] == dummy_steps + STEPS for entry in entries)
        recipe = case[2].get("precision", "")
        assert ("remainder" in entries[0]) == recipe.startswith("split")
        assert ("exp_avg_ratio" in entries[0]) == recipe.endswith("int8")


def refused(rank):
    """A recipe for bfloat16 weights, where DeepSpeed gives it float32 ones."""
    case = (torch.bfloat16, MASTER_BY_DEEPSPEED, RECIPES[0])
    try:
        engine, _ = initialize(1, *case)
        train(engine, torch.bfloat16, 0, 1)
    except ValueError as error:
        return str(error)


def test_a_recipe_for_weights_that_deepspeed_replaces_is_refused():
    [text] = run_ranks(1, refused)
    assert "precision='split32-bf16' is for bfloat16 parameters, and got one of float32" in text


def after(rank, optimizer_class):
    engine, optimizer = initialize(2, torch.float32, {}, {}, optimizer_class)
    train(engine, torch.float32, 0, STEPS)
    return results(engine, optimizer)[:4]


def test_near_torch():
    [ours], [theirs] = (run_ranks(1, after, cls) for cls in (FusedAdamW, torch.optim.AdamW))
    atol = tolerance(torch.float32, STEPS, Options(lr=LR, weight_decay=0.1), roundings=4)["param"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
