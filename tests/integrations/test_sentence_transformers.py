"""sentence-transformers' trainer: given the class, resumed from a checkpoint."""

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny import bert, texts, tokenizer
from training import results, same_bits

from fused_adam import FusedAdamW

STEPS, SAVED, LR = 4, 2, 1e-2


def trainer(folder, dtype, options):
    bert(dtype).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    encoder = Transformer(str(folder / "base"), model_kwargs={"dtype": dtype})
    model = SentenceTransformer(modules=[encoder, Pooling(16)], device="cpu")
    anchors, positives = texts(32)[::2], texts(32)[1::2]
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(folder),
            max_steps=STEPS,
            save_steps=SAVED,
            per_device_train_batch_size=4,
            learning_rate=LR,
            weight_decay=0.1,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=MultipleNegativesRankingLoss(model),
        optimizer_cls_and_kwargs=(FusedAdamW, {"lr": LR, **options}),
    )


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"precision": "split32-bf16"}, torch.bfloat16),
        ({"precision": "split24-int8", "seed": 3}, torch.bfloat16),
    ],
    ids=str,
)
def test_resuming_from_a_checkpoint(options, dtype, tmp_path):
    """Weights and state have the bits of a training that was never stopped."""
    whole = trainer(tmp_path / "whole", dtype, options)
    whole.train()
    rest = trainer(tmp_path / "rest", dtype, options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert same_bits(results(rest.optimizer), results(whole.optimizer))
    trained = [entry for entry in results(rest.optimizer) if "step" in entry]
    # The pooler is of no use here and has no gradient.
    assert len(results(rest.optimizer)) - len(trained) == 2
    assert all(entry["step"] == STEPS for entry in trained)
    assert {entry["param"].dtype for entry in trained} == {dtype}
