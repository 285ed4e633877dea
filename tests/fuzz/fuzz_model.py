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


def lattice_step(v: Number) -> float:
    """A bound of how far 8-bit storage moves a second moment, relative to it: one step.

    A step is the smallest of 2^-6 to 2^-2 of a binade of which 252 span the group. A group has at
    most all elements, and a larger span has a larger step: so that of all serves every group.
    """
    least = np.min(np.maximum(v.value - v.error, 0), where=v.reach > 0, initial=math.inf)
    largest = float(v.reach.max(initial=0.0))
    if largest == 0:
        return 2.0**-6
    # Bits of floats run ahead of logarithms by 0.09 binades at most.
    binades = math.log2(largest / least) + 0.1 if least > 0 else math.inf
    return next((step for step in (2.0**-i for i in (6, 5, 4, 3)) if 252 * step >= binades), 0.25)


def coded(m: Number, v: Number, ratio: float) -> tuple[Array, Array]:
    """Errors of both moments stored in 8 bits: v as steps on a lattice, m as m / root(v).

    Args:
        ratio: a bound of |m| / sqrt(v), beside what the numbers say. The first moment's code counts
            1/126.9 of the group's largest ratio, rounded up to bfloat16.
    """
    step = lattice_step(v)
    # An element without momentum may be raised to 2^-15 of the group's largest, and a step more.
    largest = float(v.reach.max(initial=0.0))
    raised = np.where(v.value - v.error < largest * 2.0**-14, largest * 2.0**-14, 0.0)
    v_error = step * v.reach + raised
    # root is between the square root and 1.0607 of it; it moves by half as many bits as v.
    # Where v has underflowed, its root is down to half of what its square root was.
    subnormal = bool(((v.reach > 0) & (v.reach < 2.0**-110)).any())
    least = np.sqrt(np.maximum(v.value - v.error, 0))
    known = np.where(m.reach == 0, 0.0, m.reach / np.maximum(least, 1e-150))
    ratio = min(ratio, float(known.max(initial=0.0)))
    code = ratio / 126.9 * (1 + 2**-7) * (2 if subnormal else 1)
    m_error = code * 1.0607 * np.sqrt(v.reach + step * v.reach) + m.reach * (step / 2 + 2**-12)
    return np.minimum(m_error, 1e30) + 2.0**-140, v_error + 2.0**-131


FORMATS = {
    "float64": lambda x: rounded(torch.float64, x),
    "float32": lambda x: rounded(torch.float32, x),
    "float16": lambda x: rounded(torch.float16, x),
    "bfloat16": lambda x: rounded(torch.bfloat16, x),
    "random bfloat16": lambda x: rounded(torch.bfloat16, x, ulps=1),
    "24 bits": lambda x: (
        2.0**8 * rounded(torch.float32, x, ulps=1)
    ),  # the low 8 bits go, stochastically
}


# What storing the moments makes of a bound of |m| / sqrt(v): m up, v down by the last place.
STORED_RATIO = {
    "float64": 1 + 2.0**-51,
    "float32": 1 + 2.0**-22,
    "float16": 1 + 2.0**-9,
    "bfloat16": 1 + 2.0**-6,
    "random bfloat16": 1 + 2.0**-6,
}


def formats(precision: str | None, dtype: torch.dtype) -> tuple[str, str, str, str, str]:
    """What weights, first and second moments, the maximum and the average are stored in."""
    name = str(dtype).removeprefix("torch.")
    ema = "float64" if dtype == torch.float64 else "float32"
    if precision is None:
        return name, name, name, name, ema
    weights, _, states = precision.partition("-")
    weight = {"native": name, "split24": "24 bits", "sr": "random bfloat16"}.get(weights, "float32")
    m, v, v_max = {
        "": ("float32",) * 3,
        "fp32": ("float32",) * 3,
        "bf16": ("bfloat16", "random bfloat16", "bfloat16"),
        "int8": ("ratio codes", "lattice codes", "bfloat16"),
    }[states]
    return weight, m, v, v_max, ema


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
    ema: Number | None = None
    steps: int = 0
    pending: bool = False  # the next step stores the moments anew
    ratio: float = 0.0  # a bound of the implementation's |m| / sqrt(v); inf: nothing is known

    def numbers(self) -> Iterator[tuple[str, Number, str]]:
        """What is there: its name in torch's state, the number, its format."""
        names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema")
        kinds = formats(self.precision, self.dtype)
        for name, number, kind in zip(
            names, (self.p, self.m, self.v, self.v_max, self.ema), kinds, strict=True
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
        self._store("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ema")

    def recoded(self) -> None:
        """The parameter may lie in another order: 8-bit moments, whose groups follow the memory,
        are encoded anew.
        """
        self.pending = True
        self.decode()
        if "codes" in formats(self.precision, self.dtype)[1]:
            self._store("exp_avg", "exp_avg_sq")

    def _store(self, *names: str) -> None:
        """Round these numbers to their formats."""
        numbers = {name: (number, kind) for name, number, kind in self.numbers() if name in names}
        moments = [numbers[name] for name in ("exp_avg", "exp_avg_sq") if name in numbers]
        if moments and moments[0][1].endswith("codes"):
            (m, _), (v, _) = moments
            m_error, v_error = coded(m, v, self.ratio)
            m.error += m_error
            v.error += v_error
            # Up by a code of 126.9, and read back by a root of up to 1.0607 of the square root.
            self.ratio *= (1 + 1.01 / 126.9) * 1.0607
        elif moments:
            self.ratio *= STORED_RATIO[moments[1][1]]
            if moments[1][1] == "float16" and self.v is not None:
                # Squares that float16 has no normal number for may be stored as zero.
                small = (self.v.reach > 0) & (self.v.value - self.v.error < 2.0**-14)
                self.ratio = math.inf if small.any() else self.ratio
        for number, kind in numbers.values():
            if not kind.endswith("codes"):
                number.error += FORMATS[kind](number.reach)

    def copy(self) -> Weights:
        return Weights(
            self.p.copy(),
            self.dtype,
            self.precision,
            *(x and x.copy() for x in (self.m, self.v, self.v_max, self.ema)),
            self.steps,
            self.pending,
            self.ratio,
        )

    def begin(self, o: dict[str, Any]) -> None:
        """Zeros for what is not there yet; the weight itself for its average."""
        if self.m is None or self.v is None:
            self.m, self.v = (
                Number(np.zeros_like(self.p.value)),
                Number(np.zeros_like(self.p.value)),
            )
        if o["amsgrad"] and self.v_max is None:
            self.v_max = Number(np.zeros_like(self.p.value))
        if o["ema_decay"] is not None and self.ema is None:
            self.ema = self.p.copy()

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
        decays, unclear = np.ones(p.value.shape, bool), np.zeros(p.value.shape, bool)
        if o["cautious"]:  # arXiv 2510.12402; near zero, rounding decides which sign there is
            decays = update.value * p.value > 0
            unclear = (np.abs(update.value) <= update.error) | (np.abs(p.value) <= p.error)
        # Decay and update are rounded three times each before they meet p; the result once.
        value = p.value - update.value - np.where(decays, decoupled * p.value, 0)
        error = (
            np.where(decays, abs(1 - decoupled), 1) * p.error
            + np.where(unclear, decoupled * p.reach, 0)
            + update.error
            + 5 * u * (update.reach + decoupled * p.reach)
            + tiny
        )
        if lr != 0:
            error += u * (np.abs(value) + error)
            unrounded = Number(value, error)
            p.set(value, error + FORMATS[kinds[0]](np.abs(value) + error))
        else:
            unrounded = p
        if o["ema_decay"] is not None:
            self._average(unrounded, float(o["ema_decay"]), u, tiny)
        # Cauchy and Schwarz: (b1 m + (1 - b1) g)^2 <= (b1^2 m^2 / (b2 v) + (1 - b1)^2 / (1 - b2)) *
        # (b2 v + (1 - b2) g^2).
        kept = self.ratio * beta1 / math.sqrt(beta2) if beta1 > 0 and beta2 > 0 else 0.0
        self.ratio = math.hypot(kept, (1 - beta1) / math.sqrt(1 - beta2)) * (1 + 2.0**-18)
        if beta1 > 0 and beta2 == 0:
            self.ratio = math.inf
        m.set(new_m.value, new_m.error)
        v.set(new_v.value, new_v.error)
        if o["amsgrad"]:
            v_max.set(x.value, x.error)
        self._store("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if o["amsgrad"] else []))

    def _average(self, p: Number, decay: float, u: float, tiny: float) -> None:
        """ema + (1 - decay) * (p - ema): the difference is rounded, 1 - decay, product and sum."""
        ema = self.ema
        assert ema is not None
        value = decay * ema.value + (1 - decay) * p.value
        error = decay * ema.error + (1 - decay) * p.error
        error += 4 * u * (1 - decay) * (p.reach + ema.reach) + tiny
        ema.set(value, error + u * (np.abs(value) + error))

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
    skip_grad_norm: float | None = None
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
        if self.needs_norm:
            self.norm = (
                math.sqrt(sum(float(np.square(grads[i]).sum()) for _, i in listed)) / grad_scale
            )
            if self.max_grad_norm is not None:  # torch.nn.utils.clip_grad_norm_
                multiplier *= min(1.0, self.max_grad_norm / (self.norm + 1e-6))
                multiplier_error = 2.0**-53 * (
                    8 + sum(grads[i].size for _, i in listed)
                )  # a sum in any order
                if any((np.float32(grads[i]) == grads[i]).all() for _, i in listed):
                    # Of another dtype than float64: squares are rounded to float32, each by 2^-24
                    # of itself at most, and a root halves that.
                    multiplier_error += 2.0**-25
            limit = self.skip_grad_norm
            if self.skip_nonfinite or limit is not None:
                found_inf |= not math.isfinite(self.norm)
            found_inf |= limit is not None and self.norm > limit
            self.skipped += found_inf
        if found_inf:
            return False
        for o, i in listed:
            self.weights[i].step(grads[i], o, multiplier, multiplier_error)
        return True

    @property
    def needs_norm(self) -> bool:
        return (
            self.max_grad_norm is not None or self.skip_nonfinite or self.skip_grad_norm is not None
        )

    def separate(self) -> None:
        """Parameters no longer share memory."""
        for weights in self.weights:
            weights.p = weights.p.copy()
