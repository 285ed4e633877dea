"""Transformers' Trainer: given an optimizer or its class, clipping as by default, stopped, killed
and resumed.
"""

import os
import signal

import pytest
import torch
from ranks import context
from tiny import gpt2, llama, sequences
from training import results, same_bits
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.harness.oracle import Options, tolerance
from fused_adam import FusedAdamW, param_groups

STEPS, SAVED, LR = 6, 3, 1e-2
CASES = [
    ({}, torch.float32),
    ({"flatten": True}, torch.float32),
    ({"precision": "split32-bf16", "flatten": True}, torch.bfloat16),
    ({"precision": "split24-int8", "seed": 3}, torch.bfloat16),
]


class Killer(TrainerCallback):
    """Kills the process in the middle of a training, one step after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVED + 1:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(folder, model, handed_over, options, optimizer_class=FusedAdamW, **arguments):
    """A trainer of `model`; `handed_over`: the optimizer itself with a scheduler, its class and
    options, or these with param groups.
    """
    if handed_over == "optimizer":
        optimizer = optimizer_class(model.parameters(), lr=LR, weight_decay=0.1, **options)
        how = {
            "optimizers": (
                optimizer,
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            )
        }
    else:
        groups = {"params": param_groups(model, 0.1)} if handed_over == "groups" else {}
        how = {"optimizer_cls_and_kwargs": (optimizer_class, {**groups, "lr": LR, **options})}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=LR,
        weight_decay=0.1,
        warmup_steps=1,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **arguments,
    )
    return Trainer(model=model, args=arguments, train_dataset=sequences(24), **how)


def flat(run):
    """How many parameters lie in flat buffers."""
    buffers = run.optimizer.optimizer._engine.flat
    return sum(place.holds(param) for param, place in buffers.flat_params.items()) if buffers else 0


@pytest.mark.parametrize("handed_over", ["optimizer", "class", "groups"])
@pytest.mark.parametrize(("options", "dtype"), CASES, ids=str)
def test_resuming_from_a_checkpoint(options, dtype, handed_over, tmp_path):
    """Weights, state and step counters are those of a training that was never stopped, in bits."""
    whole = trainer(tmp_path / "whole", gpt2(dtype), handed_over, options)
    whole.train()
    norms = [entry["grad_norm"] for entry in whole.state.log_history if "grad_norm" in entry]
    assert (
        whole.args.max_grad_norm == 1.0 and len(norms) == STEPS and max(norms) > 1
    )  # the default clips here
    rest = trainer(tmp_path / "rest", gpt2(dtype), handed_over, options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert same_bits(results(rest.optimizer), results(whole.optimizer))
    assert all(entry["step"] == STEPS for entry in results(rest.optimizer))
    count = len(list(whole.model.parameters())) if "flatten" in options else 0
    assert flat(whole) == flat(rest) == count  # neither training nor loading moved them


@pytest.mark.parametrize("handed_over", ["class", "groups"])
def test_biases_and_norms_do_not_decay(handed_over, tmp_path):
    """In the Trainer's groups and in ours, which have names."""
    run = trainer(tmp_path, gpt2(), handed_over, {}, save_strategy="no")
    optimizer = run.create_optimizer()
    decaying, others = optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    named = dict(run.model.named_parameters())
    undecayed = {name for name in named if "ln_" in name or name.endswith("bias")}
    assert {id(param) for param in others["params"]} == {id(named[name]) for name in undecayed}
    assert ("param_names" in others) == (handed_over == "groups")
    if handed_over == "groups":
        assert set(optimizer.export_fp32()["params"]) == named.keys()


def train_in_a_process(folder, options, dtype, resume, callbacks, path):
    torch.set_num_threads(1)
    run = trainer(folder, gpt2(dtype), "class", options)
    for callback in callbacks:
        run.add_callback(callback)
    run.train(resume_from_checkpoint=resume)
    torch.save(results(run.optimizer), path)


@pytest.mark.parametrize(("options", "dtype"), [CASES[1], CASES[3]], ids=str)
def test_killed_and_resumed_in_another_process(options, dtype, tmp_path):
    codes = []
    for resume, callbacks in ((None, [Killer]), (True, [])):
        arguments = (tmp_path / "folder", options, dtype, resume, callbacks, tmp_path / "results")
        process = context.Process(target=train_in_a_process, args=arguments)
        process.start()
        process.join(120)
        process.kill()
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL, 0]
    whole = trainer(tmp_path / "whole", gpt2(dtype), "class", options, save_strategy="no")
    whole.train()
    assert same_bits(torch.load(tmp_path / "results"), results(whole.optimizer))


def weights(folder, optimizer_class, options, **arguments):
    run = trainer(
        folder, llama(), "class", options, optimizer_class, save_strategy="no", **arguments
    )
    run.train()
    return [param.detach() for param in run.model.parameters()]


ATOL = tolerance(torch.float32, STEPS, Options(lr=LR, weight_decay=0.1), roundings=4)["param"]


def test_near_torch(tmp_path):
    ours, theirs = (weights(tmp_path, cls, {}) for cls in (FusedAdamW, torch.optim.AdamW))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)


def test_clipping_inside_the_step_instead(tmp_path):
    """One of the two clips: with the Trainer's off, ours takes its place."""
    inside = weights(tmp_path, FusedAdamW, {"max_grad_norm": 1.0}, max_grad_norm=0)
    before = weights(tmp_path, FusedAdamW, {})
    torch.testing.assert_close(inside, before, rtol=0, atol=ATOL)
    never = weights(tmp_path, FusedAdamW, {}, max_grad_norm=0)
    assert max((a - b).abs().max() for a, b in zip(never, before, strict=True)) > 10 * ATOL
