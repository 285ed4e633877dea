"""Tiny random language models of Transformers, made from configs, and their tokens and texts. Knows
no optimizer.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TOKENS = 64


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Tied embeddings, biases, dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """No biases and no dropout: every gradient is a number of its own, none is a sum that cancels
    to rounding noise.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def bert(dtype: torch.dtype = torch.float32) -> BertModel:
    """An encoder with norms, biases and dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return BertModel(config).to(dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words are the tokens' numbers."""
    words = Tokenizer(WordLevel({str(i): i for i in range(TOKENS)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="2", eos_token="1", pad_token="0"
    )


def texts(count: int) -> list[str]:
    """`sequences` as words."""
    return [" ".join(map(str, each["input_ids"].tolist())) for each in sequences(count)]


def sequences(count: int) -> list[dict[str, Tensor]]:
    """`count` examples of 12 random tokens, which are their own labels."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, TOKENS, (count, 12), generator=generator)
    return [{"input_ids": each, "labels": each} for each in tokens]


def loss_of(model: torch.nn.Module, step: int) -> Tensor:
    """Of a batch of two, another one each step."""
    batch = torch.stack([each["input_ids"] for each in sequences(2 * step + 2)[-2:]])
    return model(input_ids=batch, labels=batch).loss
