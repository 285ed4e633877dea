"""Sorts a module's parameters into param groups with and without weight decay.

The groups serve any torch optimizer; nothing here is FusedAdam's own.
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
from .torch_private import ConvNd

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# torch's layers whose weights are matrices. A class that derives from one is a layer, whatever its
# name.
LAYERS = (
    nn.Linear,
    nn.Bilinear,
    ConvNd,
    *EMBEDDINGS,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
# How the name of a norm's class ends, in lower case and without underscores: LayerNorm,
# LlamaRMSNorm, BatchNormAct2d, LayerNorm2dFp32, RMSNormGated, LayerNormalization, ConvNextV2GRN
# (global response normalization). Only words that say which kind of norm it is may follow:
# LayerNormLinear, LayerNormMLP, NormConv2d and PreNormBlock are layers that contain a norm.
# SpectralNorm and WeightNorm compute a layer's matrix from another one.
NORM_CLASS = re.compile(
    r"(?<!spectral)(?<!weight)(?<!linear)(?<!conv)(?<!conv\dd)(norm(ali[sz]ation)?|grn)"
    r"(\d+[dp]?|nd|act(ivation)?|gated|fp|bf|float|nobias|channels?(first|last))*$"
)
# Words in a parameter's own name: in_proj_bias, bias_k, gamma, layer_scale_1, scale_shift_table.
SCALES_AND_SHIFTS = {"bias", "gamma", "beta", "scale", "shift"}
# The scale of a norm within a layer: layer_norm_weight of TransformerEngine's LayerNormLinear.
NORM_SCALE = re.compile(r"norm(_(weight|gain|g|w))?$")


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises activations, judged by the names of its class and its bases."""
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
    """Yield the module's own parameters by name, also those that a parametrization holds."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    if parametrize.is_parametrized(module):
        for name, held in module.parametrizations.items():  # type: ignore[union-attr, operator]
            yield from ((name, param) for param in held.parameters(recurse=False))


def _marked(module: nn.Module) -> Iterator[Tensor]:
    """Yield what the module's `no_weight_decay` names, as in the models of timm and Swin."""
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
    for name, param in module.named_parameters(remove_duplicate=False):
        # The name of a submodule stands for all that is in it.
        if any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns):
            yield param


def _undecayed(model: nn.Module, decay_embeddings: bool) -> set[Tensor]:
    """Return the parameters that are exempt from decay for another reason than their shape.

    A tied parameter is exempt if any of its places says so.
    """
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
    """Return param groups in which weights decay, but not biases or the scales and shifts of norms.

    A parameter does not decay if one of these holds:

    - It has fewer than two dimensions.
    - Its own name has the word bias, gamma, beta, scale or shift, or ends in norm or norm_weight:
      `in_proj_bias`, `layer_norm_weight`.
    - It belongs to a norm, whatever its shape. A norm is a module whose class, or a base of it, has
      a name that ends in Norm, Normalization or GRN. Words for a kind of norm may follow:
      `LlamaRMSNorm`, `LayerNorm2d`, `RMSNormGated`, `BatchNormAct2d`. Matrices do decay where
      another noun follows (`LayerNormLinear`, `NormConv2d`, `PreNormBlock`), in subclasses of
      torch's layers such as `Linear`, and in `SpectralNorm`, `WeightNorm`, `ConvNorm` and
      `LinearNorm`.
    - The model exempts it. Either the parameter has a true attribute `_no_weight_decay` (mamba), or
      a module's `no_weight_decay()` returns its name (timm, Swin). Names are relative to that
      module, and may be patterns (`blocks.*.scale`) or name a whole submodule.

    Args:
        model: parameters are taken with their names, which checkpoints and `export_fp32` then have.
            A tied weight is taken once, under its first name, and does not decay if any of its
            places says so.
        weight_decay: of the first group, at least 0. The second group has 0.
        decay_embeddings: whether the weights of `nn.Embedding` and `nn.EmbeddingBag` decay.
        include_frozen: also take parameters that do not require gradients, to be unfrozen later.
            An optimizer skips them until then, and `flatten=True` leaves them where they are.
        split_dtypes: give each dtype groups of its own, because a precision recipe serves some
            dtypes only. Set `group["precision"]` for each, None where no recipe fits.

    Returns:
        One or two groups (per dtype, with `split_dtypes`), those that decay first.

    Raises:
        TypeError: `model` is no module, `weight_decay` no number, or `no_weight_decay()` no names.
        ValueError: `weight_decay` is negative, there is no parameter to take, or one has no shape
            yet.

    Example:
        >>> optimizer = FusedAdamW(param_groups(model, weight_decay=0.1), lr=3e-4)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but must be a torch.nn.Module")
    weight_decay = _checked_decay(weight_decay)
    exempt = _undecayed(model, decay_embeddings)
    members: dict[tuple[bool, torch.dtype | None], list[tuple[str, Tensor]]] = {}
    for name, param in _taken(model, include_frozen):
        decays = param.ndim >= 2 and param not in exempt
        kind = (decays, param.dtype if split_dtypes else None)
        members.setdefault(kind, []).append((name, param))
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0}
        for (decays, _), params in sorted(members.items(), key=lambda item: not item[0][0])
    ]


def _taken(model: nn.Module, include_frozen: bool) -> list[tuple[str, Tensor]]:
    """Return the parameters to take, by name; raise if there are none or one has no shape yet."""
    named: Iterable[tuple[str, Tensor]] = model.named_parameters()
    params = [(name, param) for name, param in named if param.requires_grad or include_frozen]
    for name, param in params:
        if is_lazy(param):
            raise ValueError(
                f"parameter {name!r} of model has no shape yet: run the model once before"
            )
    if not params:
        frozen = any(True for _ in model.parameters())
        raise ValueError("model has no parameters" + (" that require gradients" if frozen else ""))
    return params


def _checked_decay(weight_decay: float | Tensor) -> float | Tensor:
    """Return the weight decay as a float or tensor; raise unless it is a number of at least 0."""
    if isinstance(weight_decay, bool) or not is_number(weight_decay):
        raise TypeError(f"weight_decay={weight_decay!r} must be a number")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r} must be at least 0")
    return weight_decay if isinstance(weight_decay, Tensor) else as_number(weight_decay)
