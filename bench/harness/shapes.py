"""Parameter shapes of known models, from the few numbers of their architectures. No weights, no
tensors here.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]


def gpt2(
    width: int, blocks: int, vocabulary: int = 50257, context: int = 1024, inner: int | None = None
) -> list[Shape]:
    """Radford et al. 2019; the output layer shares the embedding's weight."""
    inner = inner or 4 * width
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, inner), (inner,), (inner, width), (width,)]
    return [
        (vocabulary, width),
        (context, width),
        *[*norm, *attention, *norm, *mlp] * blocks,
        *norm,
    ]


def llama(
    width: int,
    blocks: int,
    inner: int,
    vocabulary: int,
    heads: int,
    kv_heads: int,
    head: int | None = None,
    tied: bool = False,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> list[Shape]:
    """Touvron et al. 2023, and what followed its layout: Mistral, Qwen."""
    head = head or width // heads
    q, kv = heads * head, kv_heads * head
    attention: list[Shape] = [(q, width), (kv, width), (kv, width), (width, q)]
    attention += [(q,), (kv,), (kv,)] if qkv_bias else []
    attention += [(width,)] if out_bias else []
    attention += [(head,), (head,)] if qk_norm else []
    mlp: list[Shape] = [(inner, width), (inner, width), (width, inner)]
    mlp += [(inner,), (inner,), (width,)] if mlp_bias else []
    block = [*attention, *mlp, (width,), (width,)]
    return [
        (vocabulary, width),
        *block * blocks,
        (width,),
        *([] if tied else [(vocabulary, width)]),
    ]


def vit(
    width: int,
    blocks: int,
    patch: int = 16,
    image: int = 224,
    inner: int | None = None,
    classes: int = 1000,
) -> list[Shape]:
    """Dosovitskiy et al. 2021, with torchvision's fused projection of queries, keys and values."""
    inner = inner or 4 * width
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(inner, width), (inner,), (width, inner), (width,)]
    tokens = (image // patch) ** 2 + 1
    start = [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width)]
    return [*start, *[*norm, *attention, *norm, *mlp] * blocks, *norm, (classes, width), (classes,)]


def resnet(blocks: Sequence[int] = (3, 4, 6, 3), classes: int = 1000) -> list[Shape]:
    """He et al. 2016 with bottlenecks: 50 layers by default."""

    def conv(out: int, into: int, size: int) -> list[Shape]:
        return [(out, into, size, size), (out,), (out,)]  # and its batch norm

    shapes, into = conv(64, 3, 7), 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for number in range(count):
            shapes += conv(width, into, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if number == 0:
                shapes += conv(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (classes, into), (classes,)]


def many_small() -> list[Shape]:
    """2000 tensors of 1 to 4096 elements."""
    sizes = random.Random(0)
    return [(sizes.randint(1, 4096),) for _ in range(2000)]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "gpt2": lambda: gpt2(768, 12),
    "gpt2-xl": lambda: gpt2(1600, 48),
    "llama-3-8b": lambda: llama(4096, 32, 14336, 128256, 32, 8),
    "resnet50": resnet,
    "vit-b16": lambda: vit(768, 12),
    "many-small": many_small,
    "one-big": lambda: [(1_000_000_000,)],
}
ALLOWED = f"{', '.join(MODELS)}; each with /N for the first of N FSDP shards, as in llama-3-8b/64"


def shard(shapes: Sequence[Shape], ranks: int) -> list[Shape]:
    """What FSDP2 leaves on the first of `ranks` ranks: the first of equal parts of dimension 0 of
    every parameter.
    """
    return [(-(-shape[0] // ranks), *shape[1:]) for shape in shapes]


def shapes_of(name: str) -> list[Shape]:
    """Of a model by name, `/N` behind it for one of N shards. Raises ValueError that says what is
    allowed.
    """
    model, slash, ranks = name.partition("/")
    if model not in MODELS or (slash and not (ranks.isdecimal() and 1 <= int(ranks) <= 1 << 20)):
        raise ValueError(f"{name!r} is not known; allowed: {ALLOWED}")
    shapes = MODELS[model]()
    return shard(shapes, int(ranks)) if slash else shapes


def numel(shapes: Sequence[Shape]) -> int:
    """How many elements in all."""
    return sum(map(math.prod, shapes))


def read_shapes(path: Path) -> list[Shape]:
    """From a JSON file: a list of shapes, or an object of shapes by name. Raises ValueError, naming
    the file.
    """
    content = read_json(path)
    found = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(found, list) or not found or not all(map(is_shape, found)):
        raise ValueError(
            f"{str(path)!r} must hold a list (or an object) of shapes, as in [[768, 3072], [768]]"
        )
    return [tuple(shape) for shape in found]


def is_shape(value: object) -> bool:
    """A list of whole numbers from 0."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def read_json(path: Path) -> Any:
    """Raises ValueError, naming the file, if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not a JSON file: {error}") from None


def _hf_gpt2(c: Mapping[str, Any]) -> list[Shape]:
    return gpt2(c["n_embd"], c["n_layer"], c["vocab_size"], c["n_positions"], c.get("n_inner"))


def _hf_llama(c: Mapping[str, Any]) -> list[Shape]:
    kind, heads = c["model_type"], c["num_attention_heads"]
    bias = bool(c.get("attention_bias", False))
    return llama(
        c["hidden_size"],
        c["num_hidden_layers"],
        c["intermediate_size"],
        c["vocab_size"],
        heads,
        c.get("num_key_value_heads") or heads,
        head=c.get("head_dim"),
        tied=bool(c.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=bool(c.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
    )


def _hf_vit(c: Mapping[str, Any]) -> list[Shape]:
    classes = len(c["id2label"]) if "id2label" in c else 1000
    sizes = (
        c["hidden_size"],
        c["num_hidden_layers"],
        c["patch_size"],
        c["image_size"],
        c["intermediate_size"],
    )
    return vit(*sizes, classes=classes)


HF_TYPES: dict[str, Callable[[Mapping[str, Any]], list[Shape]]] = {
    "gpt2": _hf_gpt2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _hf_llama),
    "vit": _hf_vit,
}


def read_hf_config(path: Path) -> list[Shape]:
    """From a Hugging Face config.json, or the folder that holds it. Raises ValueError that says
    what is allowed.
    """
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--hf-config {str(path)!r} is not a file that is there")
    config = read_json(path)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in HF_TYPES:
        raise ValueError(f"{str(path)!r} has model_type {kind!r}; allowed: {', '.join(HF_TYPES)}")
    try:
        return HF_TYPES[kind](config)
    except KeyError as error:
        raise ValueError(
            f"{str(path)!r} lacks {error.args[0]!r}, which model_type {kind!r} needs"
        ) from None
