"""Train a small Llama with Transformers' Trainer: `python examples/transformers_trainer.py`.

Writes checkpoints/ into the current folder.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_adam import FusedAdamW, param_groups

config = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
tokens = torch.arange(12)
trainer = Trainer(
    model=model,
    args=TrainingArguments("checkpoints", max_steps=4, save_steps=2),
    train_dataset=[{"input_ids": tokens, "labels": tokens}] * 8,
    optimizer_cls_and_kwargs=(
        FusedAdamW,
        {
            "params": param_groups(model, weight_decay=0.1),
            "lr": 3e-4,
            "precision": "split32-bf16",
        },
    ),
)
trainer.train()  # after an interruption: trainer.train(resume_from_checkpoint=True)
