"""Fine-tune a small Llama with trl's SFTTrainer: `python examples/trl_sft.py`.

Writes checkpoints/ into the current folder.
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fused_adam import FusedAdamW, param_groups

# Made here, so that nothing is downloaded: take a model and its tokenizer from_pretrained instead.
words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "hello": 2}, unk_token="hello"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(
    vocab_size=3,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
trainer = SFTTrainer(
    model=model,
    # The weights are bfloat16, so autocast has nothing to do.
    args=SFTConfig("checkpoints", max_steps=4, save_steps=2, bf16=False),
    train_dataset=Dataset.from_dict({"text": ["hello"] * 32}),
    processing_class=tokenizer,
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
