"""One parameter's state entry, from one precision to another. Knows no optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..distributed import local, to_local
from ..numerics import codecs
from ..precision import CODED, CODES_AND_SCALES, ENTRIES, GROUP, STATES, WEIGHTS, Recipe
from .arena import Arena
from .memory import align, as_flat, dense_layout, is_dense

# In place of 32 random bits: half of the high 16, which round moments, and half of the low 8, which
# round weights. Stochastic rounding with half of its range rounds to nearest.
HALF = 0x80000080 - (1 << 32)


def parts_of_entry(entry: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """The entry with this rank's part of each tensor, if the parameter is a DTensor."""
    return {
        key: to_local(param, key, value) if key in ENTRIES and isinstance(value, Tensor) else value
        for key, value in entry.items()
    }


def same_storage(source: Recipe, target: Recipe, param: Tensor, entry: Mapping[str, Any]) -> bool:
    """Whether what was saved can be copied as it is.

    The 32 elements that share a scale are neighbours in memory. So codes can be copied only if
    their elements have the order of the parameter's.
    """
    code = entry.get(CODED["exp_avg"][0])
    return source == target and (code is None or code.stride() == dense_layout(param)[1])


def reorder(entry: dict[str, Any], param: Tensor, recipe: Recipe) -> None:
    """Encode 8-bit moments anew if the parameter's elements lie in another order than they do."""
    if CODES_AND_SCALES[0] not in entry:
        return
    part = local(param).detach()
    if not same_storage(recipe, recipe, part, parts_of_entry(entry, param)):
        moments = {key: entry[key] for key in CODES_AND_SCALES}
        entry.update(convert(parts_of_entry(moments, param), part, recipe))


def keep_dtype_of_moments(group: dict[str, Any], state: Mapping[Any, Any], arena: Arena) -> None:
    """Give a group without a precision the recipe of the moments that others put into `state`.

    A hook may make bfloat16 moments for float32 parameters before the first step (torchtitan's
    "fused_opt_states_bf16"). Without a recipe they would become float32, and take the memory that
    they were meant to save.

    Args:
        group: gets a "precision" if the state of all its parameters asks for the same one.
        state, arena: the optimizer's. Moments that it has stepped, or that were unpickled, are left
            alone: they follow their parameter's dtype, as after `model.float()`.
    """
    if group.get("precision") is not None or arena.unpickled:
        return
    asked_for: str | None = None
    for param in group["params"]:
        entry = state.get(param)
        if not entry:
            continue
        param_state = arena.param_states.get(param)
        stepped = param_state is not None and param_state.counters is not None
        name = None if stepped else _recipe_of_moments(param, entry)
        if name is None or asked_for not in (None, name):
            return
        asked_for = name
    if asked_for is not None:
        group["precision"] = asked_for


def _recipe_of_moments(param: Tensor, entry: Any) -> str | None:
    """The recipe that stores both moments as they are; None if the parameter's dtype does."""
    if not isinstance(entry, dict) or param.dtype not in WEIGHTS["native"].params:
        return None
    dtypes = {getattr(entry.get(key), "dtype", None) for key in CODED}
    for states in ("fp32", "bf16"):
        if dtypes == {*STATES[states][0].values()} != {param.dtype}:
            return f"native-{states}"
    return None


def widened(tensor: Tensor) -> Tensor:
    """The values as float32, or as complex64 if they are complex."""
    return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)


def decode(entry: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
    """The values of an entry in any precision, under torch's names.

    Returns:
        float32 (or complex64) moments and average, and `master_weight` if the entry has one or a
        remainder that completes the parameter, all of the parameter's shape.
    """
    values = {key: widened(entry[key]) for key in ("exp_avg", "exp_avg_sq") if key in entry}
    if CODED["exp_avg"][0] in entry:
        codes = [entry[code] for code, _ in CODED.values()]
        # `as_flat` reads memory without gaps. A user's own tensor may have some.
        codes = [code if is_dense(code) else code.contiguous() for code in codes]
        scales = [entry[scale] for _, scale in CODED.values()]
        moments = codecs.decode_moments(*(_whole_groups(as_flat(code)) for code in codes), *scales)
        for key, code, flat in zip(CODED, codes, moments, strict=True):
            values[key] = flat[: code.numel()].as_strided(code.shape, code.stride())
    if "max_exp_avg_sq" in entry:  # last, as in torch
        values["max_exp_avg_sq"] = widened(entry["max_exp_avg_sq"])
    if "ema" in entry:
        values["ema"] = widened(entry["ema"])
    if "master_weight" in entry:
        values["master_weight"] = entry["master_weight"].float()
    elif "remainder" in entry and param.dtype in WEIGHTS["split32"].params:
        high = param.detach().contiguous()
        remainder = entry["remainder"].to(param.device).contiguous()
        weights = codecs.weights_of(remainder)
        values["master_weight"] = codecs.load_weight(weights, high, remainder)
    return values


def convert(entry: Mapping[str, Any], param: Tensor, target: Recipe) -> dict[str, Any]:
    """The entry as `target` stores it, every value rounded to nearest.

    Args:
        entry: in any precision, this rank's part. Entries that are not state are kept as they are.
        param: this rank's part. Remainders complete the weights that are in it, so load those
            before the state. In another dtype than the one they were cut from, they are lost.
        target: the recipe to store it in.
    """
    if not any(key in entry for key in ENTRIES):
        return dict(entry)
    values = decode(entry, param)
    out = {key: value for key, value in entry.items() if key not in ENTRIES}
    # On the host whatever the user's default device, and enough for whole groups.
    half = torch.full((align(param.numel()),), HALF, dtype=torch.int32, device="cpu")
    moments = {key: values[key] for key in CODED if key in values}
    if moments and target.states == "int8":
        m, v = (_whole_groups(_in_order_of(param, moment)) for moment in moments.values())
        bits = half[: m.numel()].to(m.device)
        m_code, v_code, *scales = codecs.store_moments("int8", m, v, bits)
        for names, code, scale in zip(CODED.values(), (m_code, v_code), scales, strict=True):
            out[names[0]] = code[: param.numel()].as_strided(*dense_layout(param))
            out[names[1]] = scale
    else:
        out.update(moments)
    if "max_exp_avg_sq" in values:
        out["max_exp_avg_sq"] = values["max_exp_avg_sq"]
    if "ema" in values:
        out["ema"] = values["ema"]
    weight = values.get("master_weight")
    if weight is not None and target.weights == "master32":
        # Halfway between two values a split weight shows the one away from zero, but a master
        # weight rounds to the even one, and would count as overwritten. Its last place settles it.
        shown = param.detach().to(weight.device)  # a checkpoint may be on the host
        nearer = torch.nextafter(weight, shown.float())
        tie = (weight.to(param.dtype) != shown) & (nearer.to(param.dtype) == shown)
        out["master_weight"] = torch.where(tie, nearer, weight)
    elif weight is not None and target.weights in ("split32", "split24"):
        bits = half[: param.numel()].view(param.shape).to(weight.device)
        out["remainder"] = codecs.store_weight(target.weights, weight, bits)[1]
    # Other recipes store no more of a weight than its parameter does: the rest is lost.
    return out


def _whole_groups(flat: Tensor) -> Tensor:
    """The elements, and zeros up to the end of the last group."""
    return pad(flat, (0, -flat.numel() % GROUP))


def _in_order_of(param: Tensor, value: Tensor) -> Tensor:
    """The elements as one dimension, in the order in which the parameter's state holds them."""
    memory = torch.empty_strided(*dense_layout(param), dtype=value.dtype, device=value.device)
    return as_flat(memory.copy_(value))
