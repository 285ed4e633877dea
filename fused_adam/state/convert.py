"""One parameter's state entry, from one precision to another. No optimizer and no state_dict here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed import local, to_local
from ..numerics import codecs
from ..precision import ENTRIES, GROUP, Recipe
from .memory import align, dense_layout, is_dense


def parts_of_entry(entry: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """The entry with what is here of its tensors, where the parameter is a DTensor."""
    return {
        key: to_local(param, key, value) if key in ENTRIES and isinstance(value, Tensor) else value
        for key, value in entry.items()
    }


def same_storage(source: Recipe, target: Recipe, param: Tensor, entry: Mapping[str, Any]) -> bool:
    """Whether what was saved can be copied as it is: also the order of its elements, where groups
    rest on it.
    """
    code = entry.get("exp_avg_code")
    return source == target and (code is None or code.stride() == dense_layout(param)[1])


def reorder(entry: dict[str, Any], param: Tensor, recipe: Recipe) -> None:
    """Encode 8-bit moments anew if the parameter's elements lie in another order than they do."""
    part = local(param).detach()
    if "exp_avg_code" in entry and not same_storage(
        recipe, recipe, part, parts_of_entry(entry, param)
    ):
        moments = {key: value for key, value in entry.items() if key.endswith(("_code", "_scale"))}
        entry.update(convert(parts_of_entry(moments, param), part, recipe))


def _flat(value: Tensor, param: Tensor) -> Tensor:
    """The elements in the order in which the parameter's state holds them."""
    return (
        torch.empty(dense_layout(param)[0], dtype=value.dtype, device=value.device)
        .as_strided(*dense_layout(param))
        .copy_(value)
        .as_strided((value.numel(),), (1,))
    )


def widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)


def decode(entry: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """The float32 (or complex64) moments of an entry in any precision, and its master weight if it
    has one.
    """
    found = {key: widened(entry[key]) for key in ("exp_avg", "exp_avg_sq") if key in entry}
    for key, decoder in (("exp_avg", codecs.decode_m), ("exp_avg_sq", codecs.decode_v)):
        if f"{key}_code" in entry:
            code = entry[f"{key}_code"]
            flat = code.as_strided((code.numel(),), (1,)) if is_dense(code) else code.reshape(-1)
            whole = torch.nn.functional.pad(flat, (0, -code.numel() % GROUP))
            values = decoder(whole, entry[f"{key}_scale"])[: code.numel()]
            found[key] = (
                values.as_strided(code.shape, code.stride())
                if is_dense(code)
                else values.view(code.shape)
            )
    if "max_exp_avg_sq" in entry:  # last, as in torch
        found["max_exp_avg_sq"] = widened(entry["max_exp_avg_sq"])
    if "master_weight" in entry:
        found["master_weight"] = entry["master_weight"].float()
    elif "remainder" in entry:
        visible, remainder = param.detach(), entry["remainder"].to(param.device)
        weights = "split32" if remainder.dtype == torch.int16 else "split24"
        found["master_weight"] = codecs.load_weight(
            weights, visible.contiguous(), remainder.contiguous()
        )
    return found


def convert(entry: Mapping[str, Any], param: Tensor, target: Recipe) -> dict[str, Any]:
    """What was saved in one precision as it is stored in another, rounded to nearest.

    Remainders are of the weights as they are in the model: load those first.
    """
    if not any(key in entry for key in ENTRIES):
        return dict(entry)
    values = decode(entry, param)
    out = {key: value for key, value in entry.items() if key not in ENTRIES}
    # Half of what is rounded away: 16 bits of a second moment's chance, 8 of a weight.
    half = torch.full(
        (align(param.numel()),), 0x80000080 - (1 << 32), dtype=torch.int32, device="cpu"
    )
    for key in ("exp_avg", "exp_avg_sq"):
        if key in values and target.states == "int8":
            flat = torch.nn.functional.pad(_flat(values[key], param), (0, -param.numel() % GROUP))
            noise = codecs.state_noise(half[: flat.numel()]).to(flat.device)
            code, scale = (
                codecs.encode_m(flat) if key == "exp_avg" else codecs.encode_v(flat, noise)
            )
            out[f"{key}_code"] = code[: param.numel()].as_strided(*dense_layout(param))
            out[f"{key}_scale"] = scale
        elif key in values:
            out[key] = values[key]
    if "max_exp_avg_sq" in values:
        out["max_exp_avg_sq"] = values["max_exp_avg_sq"]
    weight = values.get("master_weight")
    if weight is not None and target.weights == "master32":
        out["master_weight"] = weight
    elif weight is not None and target.weights in ("split32", "split24"):
        words = half[: param.numel()].view(param.shape).to(weight.device)
        out["remainder"] = codecs.store_weight(target.weights, weight, words)[1]
    return out
