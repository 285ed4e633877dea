"""Parameters of a module -> param groups with and without weight decay, for any torch optimizer. No
optimizer here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .numerics.scalars import as_number, is_number

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# torch's layers whose weights are matrices: a class that derives from one is a layer, whatever its
# name.
LAYERS = (
    *(nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, *EMBEDDINGS),
    *(nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase),
)
# How the name of a norm's class ends, in lower case and without underscores: LayerNorm,
# LlamaRMSNorm, BatchNormAct2d, LayerNorm2dFp32, RMSNormGated, LayerNormalization, ConvNextV2GRN
# (global response normalization).
# Only words that say which kind of norm it is may follow: LayerNormLinear, LayerNormMLP, NormConv2d
# and PreNormBlock are layers that contain a norm. SpectralNorm and WeightNorm compute a layer's
# matrix from another one.
NORM_CLASS = re.compile(
    r"(?<!spectral)(?<!weight)(?<!linear)(?<!conv)(?<!conv\dd)(norm(ali[sz]ation)?|grn)"
    r"(\d+[dp]?|nd|act(ivation)?|gated|fp|bf|float|nobias|channels?(first|last))*$"
)
# Words in a parameter's own name: in_proj_bias, bias_k, gamma, layer_scale_1, scale_shift_table.
SCALES_AND_SHIFTS = {"bias", "gamma", "beta", "scale", "shift"}
# The scale of a norm that a layer contains: layer_norm_weight of TransformerEngine's
# LayerNormLinear.
NORM_SCALE = re.compile(r"norm(_(weight|gain|g|w))?$")


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises activations, by the name of its class or of one that it derives
    from.
    """
    if isinstance(module, LAYERS):
        return False
    return any(
        NORM_CLASS.search(kind.__name__.lower().replace("_", "")) for kind in type(module).__mro__
    )


def _says_scale_or_shift(name: str) -> bool:
    """Whether a parameter's own name says bias, scale or shift."""
    name = name.lower()
    words = {word.rstrip("0123456789") for word in name.split("_")}
    return not words.isdisjoint(SCALES_AND_SHIFTS) or NORM_SCALE.search(name) is not None


def _own_params(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own parameters by name, also those that a parametrization holds for it."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    if parametrize.is_parametrized(module):
        for name, held in module.parametrizations.items():  # type: ignore[union-attr, operator]
            yield from ((name, param) for param in held.parameters(recurse=False))


def _marked(module: nn.Module) -> Iterator[Tensor]:
    """What the module's `no_weight_decay` names, as timm's and Swin's models have it."""
    marks: Any = getattr(module, "no_weight_decay", None)
    if callable(marks) and not isinstance(marks, nn.Module):
        marks = marks()
    if isinstance(marks, str):
        marks = [marks]
    if not isinstance(marks, Iterable) or isinstance(marks, nn.Module):
        return
    patterns = list(marks)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"no_weight_decay of {type(module).__name__} has {pattern!r}, but must have names"
            )
    if not patterns:
        return
    for name, param in module.named_parameters(remove_duplicate=False):
        # A pattern may also be the name of a submodule: all in it is meant.
        if any(
            fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns
        ):
            yield param


def _undecayed(model: nn.Module, decay_embeddings: bool) -> set[Tensor]:
    """The parameters that some place in the model exempts from decay, whatever their shape."""
    exempt: set[Tensor] = set()
    for module in model.modules():
        whole = is_norm(module) or (not decay_embeddings and isinstance(module, EMBEDDINGS))
        for name, param in _own_params(module):
            if whole or _says_scale_or_shift(name) or getattr(param, "_no_weight_decay", False):
                exempt.add(param)
        exempt.update(_marked(module))
    return exempt


def param_groups(
    model: nn.Module,
    weight_decay: float | Tensor,
    *,
    decay_embeddings: bool = True,
    include_frozen: bool = False,
    split_dtypes: bool = False,
) -> list[dict[str, Any]]:
    """Param groups in which weights decay, but neither biases nor the scales and shifts of norms
    do.

    A parameter does not decay if one of these holds:

    - It has fewer than two dimensions.
    - Its own name has the word bias, gamma, beta, scale or shift, or ends in norm or norm_weight:
      `in_proj_bias`, `layer_norm_weight`.
    - It belongs to a norm, whatever its shape. A norm is a module whose class, or one that it
      derives from, has a name that ends in Norm, Normalization or GRN, maybe with its kind behind
      that: `LayerNorm`, `LlamaRMSNorm`, `LayerNorm2d`, `RMSNormGated`, `BatchNormAct2d`.
      Matrices do decay where another noun follows (`LayerNormLinear`, `NormConv2d`,
      `PreNormBlock`), in subclasses of torch's layers such as `Linear`, and in `SpectralNorm`,
      `WeightNorm`, `ConvNorm` and `LinearNorm`.
    - The model exempts it, by a true attribute `_no_weight_decay` of the parameter (mamba) or by
      its name in a module's `no_weight_decay()` (timm, Swin). Names are relative to that module.
      They may be patterns (`blocks.*.scale`) or name a submodule with all that is in it.

    Args:
        model: its parameters are taken by name (`named_parameters`), so that checkpoints and
            `export_fp32` have names. A weight that is tied is taken once, under its first name, and
            not decayed if any of its places says so: tied to an output layer, an embedding still is
            one.
        weight_decay: of the first group; the second one has 0.
        decay_embeddings: whether the weights of `nn.Embedding` and `nn.EmbeddingBag` decay.
        include_frozen: also take parameters that do not require gradients, to be unfrozen later:
            until then an optimizer skips them. Else they are left out, which `flatten=True` saves
            memory for.
        split_dtypes: give parameters of different dtypes groups of their own. A precision recipe
            serves some dtypes only: in a model of mixed dtypes set `group["precision"]` for each
            group, None where no recipe fits.

    Returns one or two groups (with `split_dtypes` up to two per dtype), what decays first, each in
    the model's order, dtypes in the order of their first parameter; a group without parameters is
    left out.

    Raises:
        TypeError: `model` is no module, `weight_decay` no number, or a `no_weight_decay()` returns
            something else than names.
        ValueError: `weight_decay` is negative, there is no parameter to take, or one has no shape
            yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but must be a torch.nn.Module")
    if isinstance(weight_decay, bool) or not is_number(weight_decay):
        raise TypeError(f"weight_decay={weight_decay!r} must be a number")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r} must be at least 0")
    if not isinstance(weight_decay, Tensor):
        weight_decay = as_number(weight_decay)
    exempt = _undecayed(model, decay_embeddings)
    members: dict[tuple[bool, torch.dtype | None], list[tuple[str, Tensor]]] = {}
    for name, param in model.named_parameters():
        if not (param.requires_grad or include_frozen):
            continue
        if is_lazy(param):
            raise ValueError(
                f"parameter {name!r} of model has no shape yet: run the model once before"
            )
        decays = param.ndim >= 2 and param not in exempt
        members.setdefault((decays, param.dtype if split_dtypes else None), []).append(
            (name, param)
        )
    if not members:
        frozen = any(True for _ in model.parameters())
        raise ValueError("model has no parameters" + (" that require gradients" if frozen else ""))
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0}
        for (decays, _), params in sorted(members.items(), key=lambda item: not item[0][0])
    ]
