"""trl's SFTTrainer and DPOTrainer, resumed from a checkpoint."""

import pytest
import torch
from datasets import Dataset
from tiny import llama, texts, tokenizer
from training import results, same_bits
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from fused_adam import FusedAdamW, param_groups

STEPS, SAVED, LR = 4, 2, 1e-2
CASES = [
    ({}, torch.float32),
    ({"flatten": True}, torch.float32),
    ({"precision": "split32-bf16"}, torch.bfloat16),
    ({"precision": "split24-int8", "seed": 3}, torch.bfloat16),
]


def common(folder):
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_device_train_batch_size": 2,
        "learning_rate": LR,
        "weight_decay": 0.1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": [],
    }


def sft(folder, dtype, options):
    """Given the class, and param groups in place of the trainer's."""
    model = llama(dtype)
    groups = param_groups(model, weight_decay=0.1)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**common(folder)),
        train_dataset=Dataset.from_list([{"text": text} for text in texts(16)]),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=(FusedAdamW, {"params": groups, "lr": LR, **options}),
    )


def dpo(folder, dtype, options):
    """Given the optimizer: DPOTrainer takes no class."""
    model = llama(dtype)
    pairs = zip(texts(32)[::2], texts(32)[1::2], strict=True)
    rows = [{"prompt": a[:9], "chosen": a[9:], "rejected": b[9:]} for a, b in pairs]
    return DPOTrainer(
        model=model,
        ref_model=llama(dtype),
        args=DPOConfig(**common(folder)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        optimizers=(FusedAdamW(param_groups(model, weight_decay=0.1), lr=LR, **options), None),
    )


@pytest.mark.parametrize(
    ("make", "options", "dtype"),
    [(sft, *case) for case in CASES] + [(dpo, *CASES[0]), (dpo, *CASES[2])],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_resuming_from_a_checkpoint(make, options, dtype, tmp_path):
    """Weights and state have the bits of a training that was never stopped."""
    whole = make(tmp_path / "whole", dtype, options)
    whole.train()
    rest = make(tmp_path / "rest", dtype, options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert same_bits(results(rest.optimizer), results(whole.optimizer))
    assert all(entry["step"] == STEPS for entry in results(rest.optimizer))
    assert [group["weight_decay"] for group in whole.optimizer.param_groups] == [0.1, 0.0]
    assert not same_bits(weights(whole.model), weights(llama(dtype)))


def weights(model):
    return [{"param": param.detach()} for param in model.parameters()]
