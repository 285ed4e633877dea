"""Runs that the tests of public bug reports compare: ours, and torch's with the same script.

Each test does the same to our optimizer and to torch's, and compares all parameters and their
state. Where torch goes wrong or raises, it states the right outcome. The docstring has the thread.
`SETUPS` are the optimizers that every test runs on.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import nn
from training import MOMENTS, set_grad, values

import fused_adam
from bench.harness import oracle

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(5,), (3, 4), (40,), (7,)]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


class Setup(NamedTuple):
    """How the optimizer under test is built."""

    backend: str
    flatten: bool
    max_grad_norm: float | None
    precision: str | None = None

    def __str__(self) -> str:
        words = [
            self.backend,
            "flatten" * self.flatten,
            "clip" * (self.max_grad_norm is not None),
            self.precision,
        ]
        return "-".join(filter(None, words))


SETUPS = [
    *(Setup("reference", *choice) for choice in product((False, True), (None, 1.0))),
    # Exact float32 training of bfloat16 parameters: torch's numbers on float32 parameters.
    Setup("reference", False, 1.0, "split32"),
    # Triton's interpreter is slow: each choice once.
    Setup("triton", False, 1.0),
    Setup("triton", True, None, "split32"),
]


over_setups = pytest.mark.parametrize("setup", SETUPS, ids=str)


class Run:
    """One optimizer and its parameters. Gradients depend on a parameter's number and on the time,
    not on its place."""

    def __init__(self, setup: Setup, ours: bool, groups=None, **options) -> None:
        self.setup, self.ours, self.time = setup, ours, 0
        # Torch trains in float32 what a recipe stores in bfloat16: all inputs are bfloat16 numbers.
        self.dtype = BF16 if ours and setup.precision else FP32
        self.numbers: dict[torch.Tensor, int] = {}
        self.params = [self.param(shape) for shape in SHAPES]
        self.groups, self.options = groups, {**OPTIONS, **options}
        self.optimizer = self.build(self.params)

    def build(self, params):
        """Another optimizer of the same kind."""
        members = self.groups(params) if self.groups else params
        if not self.ours:
            return torch.optim.AdamW(members, **self.options)
        return fused_adam.FusedAdamW(members, **self.options, **self.setup._asdict())

    def number(self, param, number: int):
        self.numbers[param] = number
        return param

    def param(self, shape):
        """A new parameter, with a number of its own."""
        number = len(self.numbers)
        return self.number(nn.Parameter(values(shape, number, BF16).to(self.dtype)), number)

    def gradient(self, param):
        seed = 1000 * (self.time + 1) + self.numbers[param]
        return values(param.shape, seed, BF16).to(self.dtype)

    def update(self) -> None:
        """The optimizer's step, with torch's own clipping before it where ours clips inside."""
        if not self.ours and self.setup.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(members(self.optimizer), self.setup.max_grad_norm)
        self.optimizer.step()
        self.time += 1

    def step(self, times: int = 1, without=()) -> None:
        """Ordinary steps; the parameters in `without` get no gradient."""
        for _ in range(times):
            self.optimizer.zero_grad()
            for param in members(self.optimizer):
                if not any(param is other for other in without):
                    set_grad(param, self.gradient(param))
            self.update()

    @property
    def state(self):
        return self.optimizer.state

    def forget(self, params) -> None:
        """Round torch's weights as ours are without their state: a recipe keeps the rest of a
        weight there."""
        if not self.ours and self.setup.precision:
            for param in params:
                param.data = param.data.to(BF16).to(FP32)


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_equal_runs(ours: Run, theirs: Run) -> None:
    """Step counts are equal, and all values as near as rounding lets them be."""
    options = oracle.Options(lr=1e-2, weight_decay=0.1, decoupled=True)
    clip = ours.setup.max_grad_norm is not None  # torch rounds the norm, its inverse, the gradients
    roundings = (1, 8 if clip else 4)
    within = [oracle.tolerance(FP32, theirs.time, options, number) for number in roundings]
    mine, others = members(ours.optimizer), members(theirs.optimizer)
    assert [len(g["params"]) for g in ours.optimizer.param_groups] == [
        len(g["params"]) for g in theirs.optimizer.param_groups
    ]
    weights = mine
    if ours.setup.precision:
        weights = list(ours.optimizer.export_fp32()["params"].values())
    for param, weight, other in zip(mine, weights, others, strict=True):
        got, want = ours.state.get(param, {}), theirs.state.get(other, {})
        assert {key for key in got if key != "remainder"} == set(want)
        assert not want or got["step"] == want["step"]
        pairs = {
            "param": (weight, other),
            **{key: (got[key], want[key]) for key in MOMENTS if key in want},
        }
        for key, (a, b) in pairs.items():
            atol = sum(tolerance[key] for tolerance in within)
            torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=atol, check_dtype=True)


def assert_like_torch(setup: Setup, script: Callable[[Run], object], groups=None) -> None:
    """Run the script on our optimizer and on torch's: both end with the same numbers."""
    runs = [Run(setup, ours, groups) for ours in (True, False)]
    outcomes = [script(run) for run in runs]
    assert outcomes[0] == outcomes[1]
    assert_equal_runs(*runs)
