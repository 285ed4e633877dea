"""Precision recipes: what is stored for a parameter, in which dtypes, and at what cost.

A recipe's name is "<weights>-<states>", such as "split32-bf16". No arithmetic here.
"""

from __future__ import annotations

import contextlib
import difflib
import operator
from typing import Any, NamedTuple

import torch

GROUP = 32  # elements of 8-bit state that share one scale; groups never straddle parameters

_BF16 = (torch.bfloat16,)
_HALF = (torch.float16, torch.bfloat16)
_ANY = (torch.float32, torch.bfloat16, torch.float16)


class Weights(NamedTuple):
    """How weights are stored."""

    params: tuple[torch.dtype, ...]  # dtypes of the parameters that this is for
    entries: dict[str, torch.dtype]  # what is stored next to the parameter


WEIGHTS: dict[str, Weights] = {
    "native": Weights(_ANY, {}),
    "master32": Weights(_HALF, {"master_weight": torch.float32}),
    "split32": Weights(_BF16, {"remainder": torch.int16}),
    "split24": Weights(_BF16, {"remainder": torch.int8}),
    "sr": Weights(_BF16, {}),
}
# States -> what is stored per element of the parameter, and per group of 32.
# Codes are not called exp_avg: torch.optim would load them as if they were moments. Their names say
# what they count: the first moment's the ratio m / sqrt(v), the second's steps on a lattice.
STATES: dict[str, tuple[dict[str, torch.dtype], dict[str, torch.dtype]]] = {
    "fp32": ({"exp_avg": torch.float32, "exp_avg_sq": torch.float32}, {}),
    "bf16": ({"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}, {}),
    "int8": (
        {"exp_avg_ratio": torch.int8, "exp_avg_sq_lattice": torch.uint8},
        {"exp_avg_ratio_scale": torch.bfloat16, "exp_avg_sq_lattice_scale": torch.bfloat16},
    ),
}
# Moment -> the entries of its 8-bit codes and of their scales, one per 32 elements.
CODED = {
    "exp_avg": ("exp_avg_ratio", "exp_avg_ratio_scale"),
    "exp_avg_sq": ("exp_avg_sq_lattice", "exp_avg_sq_lattice_scale"),
}
CODES_AND_SCALES = tuple(name for names in CODED.values() for name in names)
GROUPED = tuple(scale for _, scale in CODED.values())
# What 8-bit moments were called while codes were companded values: the same shapes and dtypes, but
# another meaning. They are refused by name, as nothing can tell how they would be misread.
COMPANDED = ("exp_avg_code", "exp_avg_sq_code", "exp_avg_scale", "exp_avg_sq_scale")
# The maximum of AMSGrad is rounded to nearest, so that one that did not grow stays as it is; 8 bits
# are too few.
MAXIMUM = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
# Every name a recipe may give to an entry of the state, besides the step counter.
ENTRIES = ("master_weight", "remainder", *CODED, "max_exp_avg_sq", *CODES_AND_SCALES, "ema")
NAMES = tuple(f"{weights}-{states}" for weights in WEIGHTS for states in STATES)


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """What averages of parameters of this dtype are stored in: the type that a step computes in."""
    return torch.promote_types(dtype, torch.float32)


class EntrySpec(NamedTuple):
    """What one state entry of a parameter is stored as."""

    dtype: torch.dtype
    shape: torch.Size


class Recipe(NamedTuple):
    """How weights and moments are stored; made by `parse`.

    Both names are None for torch's semantics: everything has the parameter's dtype.
    """

    weights: str | None  # a key of WEIGHTS
    states: str | None  # a key of STATES

    @property
    def name(self) -> str | None:
        """What `parse` takes, written out."""
        return None if self.weights is None else f"{self.weights}-{self.states}"

    @property
    def random(self) -> bool:
        """Whether a step needs random bits."""
        return self.weights in ("split24", "sr") or self.states in ("bf16", "int8")

    def check(self, dtype: torch.dtype, name: str = "") -> None:
        """Raise ValueError if the recipe is not for parameters of this dtype.

        Args:
            dtype: the parameter's.
            name: what the error calls the parameter, if anything.
        """
        if self.weights is None:
            return
        allowed = WEIGHTS[self.weights].params
        if dtype not in allowed:
            names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            got = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"precision={self.name!r} is for {names} parameters, and got one of {got}"
                + (f" ({name})" if name else "")
                + ": give each dtype param groups of its own, as param_groups(model, weight_decay, "
                f"split_dtypes=True) does, and those of {got} another 'precision', None for "
                "torch's semantics"
            )

    def state(
        self, dtype: torch.dtype, shape: torch.Size, amsgrad: bool, ema: bool = False
    ) -> dict[str, EntrySpec]:
        """What is stored for a parameter of this dtype and shape, besides the step counter.

        Args:
            amsgrad: with the maximum of the second moment.
            ema: with the average of the weights.

        Raises ValueError as `check` does.

        Example:
            >>> parse("sr-bf16").state(torch.bfloat16, torch.Size([3]), amsgrad=False)["exp_avg"]
            EntrySpec(dtype=torch.bfloat16, shape=torch.Size([3]))
        """
        self.check(dtype)
        if self.weights is None or self.states is None:
            per_element, maximum = {"exp_avg": dtype, "exp_avg_sq": dtype}, dtype
            per_group: dict[str, torch.dtype] = {}
        else:
            per_element, per_group = STATES[self.states]
            per_element = {**WEIGHTS[self.weights].entries, **per_element}
            maximum = MAXIMUM[self.states]
        groups = torch.Size([-(-shape.numel() // GROUP)])
        return {
            **{name: EntrySpec(kind, shape) for name, kind in per_element.items()},
            **{name: EntrySpec(kind, groups) for name, kind in per_group.items()},
            # After the others, as in torch.
            **({"max_exp_avg_sq": EntrySpec(maximum, shape)} if amsgrad else {}),
            **({"ema": EntrySpec(average_dtype(dtype), shape)} if ema else {}),
        }

    def held_bytes(self, dtype: torch.dtype, amsgrad: bool = False, ema: bool = False) -> float:
        """Bytes of state per parameter element, without padding and step counters.

        Example:
            >>> parse("master32").held_bytes(torch.bfloat16)  # three float32: weight and moments
            12.0
        """
        entries = self.state(dtype, torch.Size([GROUP]), amsgrad, ema).values()
        return sum(entry.dtype.itemsize * entry.shape.numel() for entry in entries) / GROUP

    def moved_bytes(
        self, dtype: torch.dtype, grad: torch.dtype, amsgrad: bool = False, ema: bool = False
    ) -> float:
        """Bytes that a step reads and writes per parameter element.

        moved = 2 * parameter + gradient + 2 * state, as gradients are only read.
        """
        return 2 * dtype.itemsize + grad.itemsize + 2 * self.held_bytes(dtype, amsgrad, ema)


def parse(precision: str | None) -> Recipe:
    """The recipe of a name: the only place that takes names apart.

    Args:
        precision: "<weights>-<states>", "<weights>" for fp32 states, or None for torch's semantics.

    Raises:
        TypeError: `precision` is neither a string nor None.
        ValueError: there is no such recipe. The text says what is allowed, and names one that is
            close.

    Example:
        >>> parse("split32-bf16")
        Recipe(weights='split32', states='bf16')
    """
    if precision is None:
        return Recipe(None, None)
    if not isinstance(precision, str):
        raise TypeError(
            f"precision={precision!r} must be the name of a recipe, or None for torch's semantics"
        )
    weights, _, states = precision.partition("-")
    if weights in WEIGHTS and (states in STATES or precision == weights):
        return Recipe(weights, states or "fp32")
    raise ValueError(
        f"precision={precision!r} is no recipe{_suggestion(precision)} A name is "
        f"'<weights>-<states>', with weights of {', '.join(WEIGHTS)} and states of "
        f"{', '.join(STATES)}; None stores everything as torch does"
    )


def _suggestion(precision: str) -> str:
    """The end of "... is no recipe": a name that is close to what was written, if there is one."""
    written = precision.strip().lower().replace("_", "-").strip("-")
    close = difflib.get_close_matches(written, [*WEIGHTS, *NAMES, *STATES], n=1, cutoff=0.6)
    if not close:
        return "."
    # States alone leave the weights as they are.
    name = f"native-{close[0]}" if close[0] in STATES else close[0]
    return f"; did you mean {name!r}?"


def as_seed(seed: Any) -> int:
    """The seed as a Python int. Raises ValueError unless 0 <= seed < 2**63 and it is whole."""
    number = -1
    # numpy's integers are seeds, too. A bool is not, whoever made it, and neither is 3.0.
    if not isinstance(seed, bool) and "bool" not in str(getattr(seed, "dtype", "")):
        with contextlib.suppress(TypeError):
            number = operator.index(seed)
    if not 0 <= number < 2**63:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
    return number
