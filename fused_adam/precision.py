"""Precision recipes: names -> how weights and moments are stored, for which parameters, at what
cost. No arithmetic.
"""

from __future__ import annotations

import contextlib
import difflib
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

GROUP = 32  # elements of 8-bit state that share one scale; groups never straddle parameters

_BF16 = (torch.bfloat16,)
_HALF = (torch.float16, torch.bfloat16)
_ANY = (torch.float32, torch.bfloat16, torch.float16)

# Weights -> the parameters they serve, and what is stored beside the parameter: its name and dtype.
WEIGHTS: dict[str, tuple[tuple[torch.dtype, ...], dict[str, torch.dtype]]] = {
    "native": (_ANY, {}),
    "master32": (_HALF, {"master_weight": torch.float32}),
    "split32": (_BF16, {"remainder": torch.int16}),
    "split24": (_BF16, {"remainder": torch.int8}),
    "sr": (_BF16, {}),
}
# States -> what is stored per element of the parameter, and per group of 32.
# Codes are not called exp_avg: torch.optim would load them as if they were moments.
STATES: dict[str, tuple[dict[str, torch.dtype], dict[str, torch.dtype]]] = {
    "fp32": ({"exp_avg": torch.float32, "exp_avg_sq": torch.float32}, {}),
    "bf16": ({"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}, {}),
    "int8": (
        {"exp_avg_code": torch.int8, "exp_avg_sq_code": torch.uint8},
        {"exp_avg_scale": torch.bfloat16, "exp_avg_sq_scale": torch.bfloat16},
    ),
}
GROUPED = ("exp_avg_scale", "exp_avg_sq_scale")
# The maximum of AMSGrad is rounded to nearest, so that one that did not grow stays as it is; 8 bits
# are too few.
MAXIMUM = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
# Every name a recipe may give to an entry of the state, besides the step counter.
ENTRIES = (
    *("master_weight", "remainder", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    *("exp_avg_code", "exp_avg_sq_code", "exp_avg_scale", "exp_avg_sq_scale"),
)
NAMES = tuple(f"{weights}-{states}" for weights in WEIGHTS for states in STATES)


class EntrySpec(NamedTuple):
    """What one state entry of a parameter is stored as."""

    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights and moments are stored; made by `parse`.

    `weights` is a key of WEIGHTS and `states` of STATES, or both are None: torch's semantics,
    everything in the parameter's dtype.
    """

    weights: str | None
    states: str | None

    @property
    def name(self) -> str | None:
        """What `parse` takes, written out."""
        return None if self.weights is None else f"{self.weights}-{self.states}"

    @property
    def random(self) -> bool:
        """Whether a step takes random bits."""
        return self.weights in ("split24", "sr") or self.states in ("bf16", "int8")

    def check(self, dtype: torch.dtype, name: str = "") -> None:
        """Raises ValueError if parameters of this dtype cannot be stored so, and says what to do.

        Args:
            dtype: of the parameter.
            name: what the text calls the parameter, if anything.
        """
        if self.weights is None:
            return
        allowed = WEIGHTS[self.weights][0]
        if dtype not in allowed:
            names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            got = str(dtype).removeprefix("torch.") + (f" ({name})" if name else "")
            raise ValueError(
                f"precision={self.name!r} is for {names} parameters, and got one of {got}: give each dtype param "
                "groups of its own, as param_groups(model, weight_decay, split_dtypes=True) does, and those of "
                f"{str(dtype).removeprefix('torch.')} another 'precision', None for torch's semantics"
            )

    def state(self, dtype: torch.dtype, shape: torch.Size, amsgrad: bool) -> dict[str, EntrySpec]:
        """What is stored for a parameter of this dtype and shape, besides the step counter.

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
            per_element = {**WEIGHTS[self.weights][1], **per_element}
            maximum = MAXIMUM[self.states]
        groups = torch.Size([-(-shape.numel() // GROUP)])
        return {
            **{name: EntrySpec(kind, shape) for name, kind in per_element.items()},
            **{name: EntrySpec(kind, groups) for name, kind in per_group.items()},
            # Last, as in torch.
            **({"max_exp_avg_sq": EntrySpec(maximum, shape)} if amsgrad else {}),
        }

    def held_bytes(self, dtype: torch.dtype, amsgrad: bool = False) -> float:
        """State in memory per parameter element, beside the parameter and its gradient; padding
        apart.
        """
        shape = torch.Size([GROUP])
        return (
            sum(
                kind.itemsize * size.numel()
                for kind, size in self.state(dtype, shape, amsgrad).values()
            )
            / GROUP
        )

    def moved_bytes(self, dtype: torch.dtype, grad: torch.dtype, amsgrad: bool = False) -> float:
        """Bytes that a step reads and writes per parameter element: a gradient is read, all else
        read and written.
        """
        return 2 * dtype.itemsize + grad.itemsize + 2 * self.held_bytes(dtype, amsgrad)


def parse(precision: str | None) -> Recipe:
    """`"<weights>-<states>"`, `"<weights>"` for fp32 states, or None for torch's semantics.

    Raises:
        TypeError: `precision` is neither a string nor None.
        ValueError: there is no such recipe; the text says what is allowed, and names one that is
            close.
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
        f"precision={precision!r} is no recipe{_suggestion(precision)} A name is '<weights>-<states>', with weights of "
        f"{', '.join(WEIGHTS)} and states of {', '.join(STATES)}; None stores everything as torch does"
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
    """The seed as a Python int. Raises ValueError unless it is a whole number that 63 bits hold."""
    number = -1
    # A whole number of numpy's is one; a bool is none, whoever made it, and neither is 3.0.
    if not isinstance(seed, bool) and "bool" not in str(getattr(seed, "dtype", "")):
        with contextlib.suppress(TypeError):
            number = operator.index(seed)
    if not 0 <= number < 2**63:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
    return number
