"""Parameters of a module -> param groups with and without weight decay, for any torch optimizer. No optimizer here."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# LayerNorm, BatchNorm2d, LlamaRMSNorm, LayerNormalization, layer_norm; not Normalize, Enormous or NormalizedLinear.
SAYS_NORM = re.compile(r"([Nn]orm|NORM)(alization)?(?![a-z])")


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises, by the name of its class or of one that it derives from."""
    return any(SAYS_NORM.search(kind.__name__) for kind in type(module).__mro__)


def param_groups(
    model: nn.Module, weight_decay: float | Tensor, *, decay_embeddings: bool = True, include_frozen: bool = False
) -> list[dict[str, Any]]:
    """Param groups in which weights decay, but neither biases nor the weights of norms do.

    Not decayed: parameters of fewer than two dimensions, those whose own name says bias (`bias`, `in_proj_bias`,
    `bias_k`), and those of modules whose class, or one that it derives from, has a name that says norm.

    Args:
        model: its parameters are taken by name (`named_parameters`), so that checkpoints and `export_fp32` have names.
            A weight that is tied is taken once, under its first name, and not decayed if any of its places says so:
            tied to an output layer, an embedding still is one.
        weight_decay: of the first group; the second one has 0.
        decay_embeddings: whether the weights of `nn.Embedding` and `nn.EmbeddingBag` decay.
        include_frozen: also take parameters that do not require gradients, to be unfrozen later: until then an
            optimizer skips them. Else they are left out, which `flatten=True` saves memory for.

    Returns one or two groups, what decays first, each in the model's order; a group without parameters is left out.

    Raises:
        TypeError: `model` is no module, or `weight_decay` no number.
        ValueError: `weight_decay` is negative, there is no parameter to take, or one has no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but must be a torch.nn.Module")
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float, Tensor)):
        raise TypeError(f"weight_decay={weight_decay!r} must be a number")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r} must be at least 0")
    exempt: set[Tensor] = set()
    for module in model.modules():
        whole = is_norm(module) or (not decay_embeddings and isinstance(module, EMBEDDINGS))
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        exempt.update(param for name, param in own if whole or "bias" in name.split("_"))
    decayed: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, param in model.named_parameters():
        if not (param.requires_grad or include_frozen):
            continue
        if is_lazy(param):
            raise ValueError(f"parameter {name!r} of model has no shape yet: run the model once before")
        (others if param.ndim < 2 or param in exempt else decayed).append((name, param))
    if not (decayed or others):
        frozen = any(True for _ in model.parameters())
        raise ValueError("model has no parameters" + (" that require gradients" if frozen else ""))
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
