"""Adam in float64, and how far rounding may take an implementation from it, step by step. Imports
no fused_adam.

Running error analysis (Wilkinson 1963; Higham, Accuracy and Stability of Numerical Algorithms, ch.
3): every number is carried with a bound of what an implementation's number may be away from it. An
implementation rounds each operation once (u per operation, in any order), and each stored value
once to its format. Nothing here is fitted to results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

GROUP = 32  # elements of 8-bit state that share a scale
Array = np.ndarray


class Number:
    """Values of some elements, and bounds of how far an implementation's values are from them."""

    def __init__(self, value: Array, error: Array | None = None) -> None:
        self.value = value
        self.error = np.zeros_like(value) if error is None else error

    @property
    def reach(self) -> Array:
        """No magnitude of the implementation's is larger."""
        return np.abs(self.value) + self.error

    def set(self, value: Array, error: Array) -> None:
        """In place: parameters may share memory, and so do their models."""
        self.value[...] = value
        self.error[...] = error

    def copy(self) -> Number:
        return Number(self.value.copy(), self.error.copy())


# Formats: how far from x a stored x may be. x: magnitudes, or upper bounds of them
# ------------------------------------------------------------------------------------------------


def rounded(dtype: torch.dtype, x: Array, ulps: float = 0.5) -> Array:
    """To nearest: half a unit of the last place; stochastically: a whole one."""
    info = torch.finfo(dtype)
    return ulps * (info.eps * x + info.tiny * info.eps)


def signed_codes(x: Array) -> Array:
    """8 bits, values scale * (c / 127)^2, to nearest: half of the largest distance between codes
    around x.

    The scale is at most the largest x, rounded up to bfloat16. A group has at most all elements,
    and a larger scale
    has larger distances: so the largest of all serves every group.
    """
    unit = _scale(x) / 127**2
    return ((np.sqrt(x / unit) + 1) + 0.5) * unit * (1 + 2**-20)


def unsigned_codes(x: Array) -> Array:
    """8 bits, values scale * (c / 255)^4, to one of the two values around x."""
    unit = _scale(x) / 255**4
    c = (x / unit) ** 0.25
    return ((c + 1) ** 4 - c**4) * unit * (1 + 2**-20)


def _scale(x: Array) -> float:
    return max(float(x.max(initial=0.0)) * (1 + 2**-7), 2.0**-92)


FORMATS = {
    "float64": lambda x: rounded(torch.float64, x),
    "float32": lambda x: rounded(torch.float32, x),
    "float16": lambda x: rounded(torch.float16, x),
    "bfloat16": lambda x: rounded(torch.bfloat16, x),
    "random bfloat16": lambda x: rounded(torch.bfloat16, x, ulps=1),
    "24 bits": lambda x: (
        2.0**8 * rounded(torch.float32, x, ulps=1)
    ),  # the low 8 bits go, stochastically
    "signed codes": signed_codes,
    "unsigned codes": unsigned_codes,
}


def formats(precision: str | None, dtype: torch.dtype) -> tuple[str, str, str, str]:
    """What weights, first and second moments and the maximum are stored in."""
    name = str(dtype).removeprefix("torch.")
    if precision is None:
        return name, name, name, name
    weights, _, states = precision.partition("-")
    weight = {"native": name, "split24": "24 bits", "sr": "random bfloat16"}.get(weights, "float32")
    m, v, v_max = {
        "": ("float32",) * 3,
        "fp32": ("float32",) * 3,
        "bf16": ("bfloat16", "random bfloat16", "bfloat16"),
        "int8": ("signed codes", "unsigned codes", "bfloat16"),
    }[states]
    return weight, m, v, v_max


def hides_weights(precision: str | None) -> bool:
    """Whether more of a weight is stored than the parameter shows."""
    return precision is not None and precision.partition("-")[0] in (
        "master32",
        "split32",
        "split24",
    )


# Adam
# ------------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """One parameter: flat float64 numbers (two for a complex one). `dtype` is that of the real
    numbers.
    """

    p: Number
    dtype: torch.dtype
    precision: str | None = None
    m: Number | None = None
    v: Number | None = None
    v_max: Number | None = None
    steps: int = 0
    pending: bool = False  # the next step stores the moments anew

    def numbers(self) -> Iterator[tuple[str, Number, str]]:
        """What is there: its name in torch's state, the number, its format."""
        names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        kinds = formats(self.precision, self.dtype)
        for name, number, kind in zip(
            names, (self.p, self.m, self.v, self.v_max), kinds, strict=True
        ):
            if number is not None:
                yield name, number, kind

    def decode(self) -> None:
        """What reading 8-bit codes as float32 rounds: three times."""
        for _, number, kind in self.numbers():
            if kind.endswith("codes"):
                number.error += 4 * 2.0**-24 * number.reach

    def stored_anew(self, dtype: torch.dtype, precision: str | None) -> None:
        """The same numbers in other formats, or in the same ones once more."""
        self.decode()
        if hides_weights(self.precision) and (dtype != self.dtype or not hides_weights(precision)):
            self.p.error += rounded(
                self.dtype, self.p.reach
            )  # only what the parameter shows goes on
        if dtype != self.dtype:
            self.p.error += rounded(dtype, self.p.reach)
        self.dtype, self.precision, self.pending = dtype, precision, True
        for _, number, kind in self.numbers():
            number.error += FORMATS[kind](number.reach)

    def recoded(self) -> None:
        """The parameter may lie in another order: 8-bit moments, whose groups follow the memory,
        are encoded anew.
        """
        self.pending = True
        self.decode()
        for name, number, kind in self.numbers():
            if name != "param" and kind.endswith("codes"):
                number.error += FORMATS[kind](number.reach)

    def copy(self) -> Weights:
        return Weights(
            self.p.copy(),
            self.dtype,
            self.precision,
            *(x and x.copy() for x in (self.m, self.v, self.v_max)),
            self.steps,
            self.pending,
        )

    def begin(self, o: dict[str, Any]) -> None:
        """Zeros for what is not there yet."""
        if self.m is None or self.v is None:
            self.m, self.v = (
                Number(np.zeros_like(self.p.value)),
                Number(np.zeros_like(self.p.value)),
            )
        if o["amsgrad"] and self.v_max is None:
            self.v_max = Number(np.zeros_like(self.p.value))

    def step(
        self, grad: Array, o: dict[str, Any], multiplier: float = 1.0, multiplier_error: float = 0.0
    ) -> None:
        """One step of Adam: Kingma & Ba 2015, algorithm 1; Reddi et al. 2018; Loshchilov & Hutter
        2019.

        Args:
            grad: as it is in memory.
            o: the param group's values, named as in torch.
            multiplier, multiplier_error: what gradients are multiplied by before anything else, and
                its relative error.
        """
        self.begin(o)
        self.decode()
        self.steps += 1
        self.pending = self.pending and self.v_max is not None and not o["amsgrad"]
        p, m, v, v_max, t = self.p, self.m, self.v, self.v_max, self.steps
        assert m is not None and v is not None
        lr, (beta1, beta2), eps, decay = (
            float(o["lr"]),
            map(float, o["betas"]),
            o["eps"],
            o["weight_decay"],
        )
        coupled = 0.0 if o["decoupled_weight_decay"] else decay
        decoupled = lr * decay if o["decoupled_weight_decay"] else 0.0
        kinds = formats(self.precision, self.dtype)
        double = self.dtype == torch.float64
        u = 2.0**-52 if double else 2.0**-24  # in float64 this model rounds, too: twice 2^-53
        tiny = 2.0**-1070 if double else 2.0**-146  # of results that are not normal numbers

        g = Number(grad * (-multiplier if o["maximize"] else multiplier))
        g.error += multiplier_error * g.reach
        error = g.error + coupled * p.error + 3 * u * (g.reach + coupled * p.reach) + tiny
        g = Number(g.value + coupled * p.value, error)

        # m + (1 - beta1) * (g - m): g goes through four roundings, one of them that of 1 - beta1
        # itself; so does m in the difference, and through one where it stands alone.
        new_m = Number(
            beta1 * m.value + (1 - beta1) * g.value,
            beta1 * m.error
            + (1 - beta1) * g.error
            + 5 * u * (m.reach + (1 - beta1) * g.reach)
            + tiny,
        )
        new_v = Number(
            beta2 * v.value + (1 - beta2) * g.value**2,
            beta2 * v.error
            + (1 - beta2) * g.error * (2 * np.abs(g.value) + g.error)
            + 5 * u * (beta2 * v.reach + (1 - beta2) * g.reach**2)
            + tiny,
        )
        x = new_v
        if o["amsgrad"]:
            assert v_max is not None
            x = Number(np.maximum(v_max.value, new_v.value), np.maximum(v_max.error, new_v.error))

        update = self._update(new_m, x, t, (lr, beta1, beta2, eps), u, tiny)
        # Decay and update are rounded three times each before they meet p; the result once.
        value = p.value - update.value - decoupled * p.value
        error = (
            abs(1 - decoupled) * p.error
            + update.error
            + 5 * u * (update.reach + decoupled * p.reach)
            + tiny
        )
        if lr != 0:
            error += u * (np.abs(value) + error)
            p.set(value, error + FORMATS[kinds[0]](np.abs(value) + error))
        stored = zip(
            (m, v, v_max) if o["amsgrad"] else (m, v), (new_m, new_v, x), kinds[1:], strict=False
        )
        for old, new, kind in stored:
            old.set(new.value, new.error + FORMATS[kind](new.reach))

    @staticmethod
    def _update(
        m: Number, x: Number, t: int, o: tuple[float, float, float, float], u: float, tiny: float
    ) -> Number:
        """lr * m_hat / (sqrt(x_hat) + eps)."""
        lr, beta1, beta2, eps = o
        bc1, bc2 = 1 - beta1**t, 1 - beta2**t
        # Powers by t multiplications in float64, and what 1 - power makes of their error.
        powers = sum(
            2.0**-53 * (2 * t * beta**t + 2) / bc for beta, bc in ((beta1, bc1), (beta2, bc2))
        )
        root = np.sqrt(x.value)
        # |sqrt a - sqrt b| is at most sqrt|a - b|, and |a - b| / sqrt(a).
        root_error = np.minimum(np.sqrt(x.error), x.error / np.maximum(root, 1e-300))
        below = root / math.sqrt(bc2) + eps
        below_error = root_error / math.sqrt(bc2) + (5 * u + powers) * (
            below + root_error / math.sqrt(bc2)
        )
        least = np.maximum(below - below_error, eps * (1 - 5 * u))
        value = lr / bc1 * m.value / below
        error = lr / bc1 * (m.error + np.abs(m.value) / below * below_error) / least
        return Number(value, error + (4 * u + powers) * (np.abs(value) + error) + tiny)


@dataclass
class Model:
    """An optimizer's parameters by number, and its param groups: their values, and which parameters
    they list.
    """

    weights: list[Weights] = field(default_factory=list)
    groups: list[tuple[dict[str, Any], list[int]]] = field(default_factory=list)
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    skipped: int = 0
    norm: float | None = None

    def step(
        self, grads: list[Array | None], grad_scale: float = 1.0, found_inf: bool = False
    ) -> bool:
        """Step all parameters that have a gradient; says whether the step was done or skipped."""
        listed = [(o, i) for o, members in self.groups for i in members if grads[i] is not None]
        for o, i in listed:
            self.weights[i].begin(o)
        multiplier, multiplier_error = 1 / grad_scale, 0.0
        if self.max_grad_norm is not None or self.skip_nonfinite:
            self.norm = (
                math.sqrt(sum(float(np.square(grads[i]).sum()) for _, i in listed)) / grad_scale
            )
            if self.max_grad_norm is not None:  # torch.nn.utils.clip_grad_norm_
                multiplier *= min(1.0, self.max_grad_norm / (self.norm + 1e-6))
                multiplier_error = 2.0**-53 * (
                    8 + sum(grads[i].size for _, i in listed)
                )  # a sum in any order
            found_inf |= self.skip_nonfinite and not math.isfinite(self.norm)
            self.skipped += found_inf
        if found_inf:
            return False
        for o, i in listed:
            self.weights[i].step(grads[i], o, multiplier, multiplier_error)
        return True

    def separate(self) -> None:
        """Parameters no longer share memory."""
        for weights in self.weights:
            weights.p = weights.p.copy()
