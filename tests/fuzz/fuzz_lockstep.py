"""Two optimizers that promise the same bits, stepped together: each step is checked against the
model. Few commands.
"""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from fuzz_model import Model, Number, Weights, hides_weights
from fuzz_side import Side, bits, laid_out, numbers, real
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor

FP32, BF16, FP16, FP64, C64 = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.complex64,
)
# Recipes and the parameters they take.
DTYPES = {
    None: (FP32, BF16, FP64, FP16, C64),
    **dict.fromkeys(
        ("split32", "split32-bf16", "split24-bf16", "sr-bf16", "split24-int8"), (BF16,)
    ),
    "master32": (BF16, FP16),
    **dict.fromkeys(("native-bf16", "native-int8"), (FP32, BF16)),
}
OTHER = {FP32: BF16, BF16: FP32, FP16: FP32, FP64: FP32}  # gradients of another dtype
SHAPES = ((5,), (), (3, 4), (33,), (0,), (1,), (2, 3, 2, 2), (7, 1))
VALUES = {
    "lr": (1e-2, 1e-3, 0.0, 5e-2, "tensor"),
    "betas": ((0.9, 0.999), (0.0, 0.9), (0.8, 0.95)),
    "eps": (1e-8, 1e-3),
    "weight_decay": (0.0, 0.1),
    "amsgrad": (False, True),
    "maximize": (False, True),
    "decoupled_weight_decay": (False, True),
    "cautious": (False, True),
    "ema_decay": (None, 0.5, 0.0, 0.99, "tensor"),
}
OPTIONS = st.fixed_dictionaries(
    {}, optional={key: st.sampled_from(values) for key, values in VALUES.items()}
)
LAYOUTS = st.sampled_from(["own", "guarded", "transposed", "strided", "shared"])
PRECISIONS = st.sampled_from([None] * 5 + list(DTYPES))
MEMBERS = st.lists(
    st.tuples(st.sampled_from(SHAPES), st.integers(0, 4), LAYOUTS, st.sampled_from([1.0, 0.05])),
    min_size=1,
    max_size=3,
)
GRADS = (
    "own",
    "same",
    "guarded",
    "transposed",
    "strided",
    "expanded",
    "kept",
    "zeros",
    "other",
    "none",
)
PATTERN = st.lists(st.sampled_from(GRADS), min_size=1, max_size=4)
SEEDS, INDEXES = st.integers(0, 2**16), st.integers(0, 11)


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Sizes of 0.5 to 2, either sign, one in eight zero."""
    if dtype.is_complex:
        return torch.complex(drawn(rng, shape, FP32), drawn(rng, shape, FP32))
    x = rng.uniform(0.5, 2, shape) * rng.choice([-1, 1, 1, -1, -1, 1, -1, 0], shape)
    return torch.as_tensor(x).to(dtype)


class Lockstep(RuleBasedStateMachine):
    """Subclasses say what the second optimizer differs in."""

    steps_done = 0  # of all lives
    twins = st.sampled_from(["flatten", "forgetful"])
    longest = 20  # steps at a time
    precisions, dtypes = PRECISIONS, DTYPES

    @initialize(
        twin=st.runner().flatmap(lambda self: self.twins),
        flatten=st.booleans(),
        max_grad_norm=st.sampled_from([None, None, 1.0, 0.05]),
        skip_nonfinite=st.booleans(),
        skip_grad_norm=st.sampled_from([None, None, None, 2.0]),
        limit=st.sampled_from([0.0, 1 / 16]),
        options=OPTIONS,
        precision=st.runner().flatmap(lambda self: self.precisions),
        members=MEMBERS,
        seed=SEEDS,
    )
    def start(
        self,
        twin,
        flatten,
        max_grad_norm,
        skip_nonfinite,
        skip_grad_norm,
        limit,
        options,
        precision,
        members,
        seed,
    ):
        self.twin, self.limit = twin, limit
        self.guards = {
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "skip_grad_norm": skip_grad_norm,
            "seed": seed,
        }
        self.model = Model(
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            skip_grad_norm=skip_grad_norm,
        )
        self.scales: list[float] = []
        self.frozen: set[int] = set()
        self.saved: list[dict[str, Any]] = []
        self.sides = [
            Side(arguments, twin == "forgetful" and n == 1)
            for n, arguments in enumerate(self._arguments(flatten))
        ]
        self._add(options, precision, members, seed)

    def _arguments(self, flatten: bool) -> list[dict[str, Any]]:
        first = {**self.guards, "flatten": flatten}
        second = {**first, "flatten": flatten != (self.twin == "flatten")}
        if self.twin in ("compiled", "triton"):
            second["backend"] = self.twin
        if first["skip_grad_norm"] is not None:
            second["skip_grad_norm"] = torch.tensor(first["skip_grad_norm"])
        return [first, second]

    # Parameters and groups
    # --------------------------------------------------------------------------------------------

    def _add(self, options, precision, members, seed):
        """A param group of new parameters, on both sides and in the model; sometimes the first is
        listed twice.
        """
        rng = np.random.default_rng(seed)
        numbers_of_new = []
        for shape, kind, layout, scale in members:
            dtype = self.dtypes[precision][kind % len(self.dtypes[precision])]
            shared = self._shareable(precision) if layout == "shared" else None
            if shared:
                dtype = self.sides[0].params[shared[0]].dtype
            values = drawn(rng, shape, dtype)
            for side in self.sides:
                side.add(values, "guarded" if layout == "shared" else layout, shared)
            if shared:
                other = self.model.weights[shared[0]].p
                p = Number(other.value[shared[1] :], other.error[shared[1] :])
            else:
                p = Number(numbers(values))
            self.model.weights.append(Weights(p, real(values).dtype, precision))
            self.scales.append(1.0 if dtype == FP16 else scale)
            numbers_of_new.append(len(self.scales) - 1)
        if seed % 8 == 0:
            numbers_of_new.append(numbers_of_new[0])
        known = {key: values[0] for key, values in VALUES.items()} | options
        known["lr"] = 1e-2 if known["lr"] == "tensor" else known["lr"]
        known["ema_decay"] = 0.9 if known["ema_decay"] == "tensor" else known["ema_decay"]
        known["cautious"] = known["cautious"] and known["decoupled_weight_decay"]
        for side in self.sides:
            side.group({**known, "precision": precision}, numbers_of_new)
        self.model.groups.append((known, numbers_of_new))

    def _shareable(self, precision) -> tuple[int, int] | None:
        if precision is not None:
            return None
        for j, w in enumerate(self.model.weights):
            p = self.sides[0].params[j]
            if w.precision is None and p.is_contiguous() and p.numel() > 2 and not p.is_complex():
                return j, p.numel() // 3
        return None

    def _shares(self, i: int) -> bool:
        mine = self.model.weights[i].p.value
        return any(
            np.may_share_memory(mine, w.p.value) for j, w in enumerate(self.model.weights) if j != i
        )

    @rule(
        count=st.runner().flatmap(lambda self: st.integers(1, self.longest)),
        pattern=PATTERN,
        seed=SEEDS,
        guard=st.sampled_from(["", "", "", "scaled", "overflow", "poison"]),
    )
    def step(self, count, pattern, seed, guard):
        rng = np.random.default_rng(seed)
        for _ in range(count):
            self._step(rng, pattern, guard)
        self._compare()

    @rule(
        count=st.runner().flatmap(lambda self: st.integers(1, self.longest)),
        kind=st.sampled_from(GRADS[:-1]),
        lr=st.sampled_from([1e-3, 5e-2, None]),
        seed=SEEDS,
    )
    def step_all(self, count, kind, lr, seed):
        for group in range(len(self.model.groups) if lr else 0):
            self.set_value(group, "lr", lr)
        self.step(count, [kind], seed, "")

    def set_value(self, group, key, value):
        # Only decoupled decay can be cautious.
        if key == "cautious" and value:
            self.set_value(group, "decoupled_weight_decay", True)
        elif key == "decoupled_weight_decay" and not value:
            self.set_value(group, "cautious", False)
        for side in self.sides:
            side.optimizer.param_groups[group][key] = (
                torch.tensor(0.003) if value == "tensor" else value
            )
        self.model.groups[group][0][key] = (
            float(torch.tensor(0.003)) if value == "tensor" else value
        )

    @rule(count=st.runner().flatmap(lambda self: st.integers(1, self.longest)), seed=SEEDS)
    def keep_gradients(self, count, seed):
        self.step(count, ["kept"], seed, "")

    def _gradient(self, rng, i, kind, guards) -> Tensor | None:
        param = self.sides[0].params[i]
        if kind == "none" or i in self.frozen:
            return None
        values = drawn(rng, tuple(param.shape), param.dtype) * self.scales[i]
        if kind == "zeros":
            return torch.zeros_like(values)
        if kind == "same":
            return torch.empty_like(param).detach().copy_(values)
        if kind == "expanded" and param.dim():
            return values[:1].expand(param.shape)
        if kind == "other":
            return values.to(OTHER.get(param.dtype, param.dtype))
        return laid_out(
            values, kind if kind in ("guarded", "transposed", "strided") else "own", guards
        )

    def _step(self, rng, pattern, guard):
        kinds = [pattern[i % len(pattern)] for i in range(len(self.scales))]
        guards: list[Any] = []
        grads = [self._gradient(rng, i, kind, guards) for i, kind in enumerate(kinds)]
        may_skip = self.model.skip_nonfinite or self.model.skip_grad_norm is not None
        if guard == "poison" and may_skip:
            for i, grad in enumerate(grads):
                if grad is not None and grad.numel():
                    grads[i] = grad.clone()
                    grads[i][(-1,) * grad.dim()] = math.nan if rng.random() < 0.5 else math.inf
                    break
        for side in self.sides:
            for i, (grad, kind) in enumerate(zip(grads, kinds, strict=True)):
                side.set_grad(i, grad, kind == "kept")
            if guard == "scaled":
                side.optimizer.grad_scale = torch.tensor(8.0)
            side.optimizer.found_inf = torch.tensor(float(guard == "overflow"))
        listed = {i for _, members in self.model.groups for i in members}
        before = [self.sides[0].snapshot(i) for i in range(len(self.scales))]
        grads_before = [
            [None if p.grad is None else bits(p.grad) for p in side.params] for side in self.sides
        ]
        done = self.model.step(
            [None if grad is None else numbers(grad) for grad in grads],
            8.0 if guard == "scaled" else 1.0,
            guard == "overflow",
        )
        for side in self.sides:
            side.step()
            side.optimizer.grad_scale = side.optimizer.found_inf = None
        type(self).steps_done += 1
        assert grads_before == [
            [None if p.grad is None else bits(p.grad) for p in side.params] for side in self.sides
        ]
        assert all(g.intact() for g in guards), "memory around a gradient was written to"
        active = {i for i in listed if done and grads[i] is not None}
        self._unchanged(before, active, {i for i in listed if grads[i] is not None})
        self._near(active)

    def _unchanged(self, before, active, planned):
        """What may not change did not, in any bit."""
        still = set()  # active ones whose weights stay
        for o, members in self.model.groups:
            if o["lr"] == 0:
                still |= set(members)
        for i, was in enumerate(before):
            now = self.sides[0].snapshot(i)
            if i not in active:
                if self._shares(i):
                    was, now = ({**x, "param": b""} for x in (was, now))
                if (
                    i in planned
                ):  # skipped: what was missing may have been made, what was pending done
                    now = {
                        key: now[key]
                        for key in (("param",) if self.model.weights[i].pending else was)
                    }
                    was = {key: was[key] for key in now}
                assert now == was, f"parameter {i} was not to be stepped"
            elif i in still and not self._shares(i):
                for key in now.keys() & {"param", "remainder", "master_weight"} & was.keys():
                    assert now[key] == was[key], f"{key} of parameter {i} changed at lr = 0"

    def _near(self, stepped=()):
        """Compare the first with the model; where bounds are wide, the model continues from it."""
        groups = self.model.groups
        kept = {  # entries that not every step updates -> of which parameters it does
            "max_exp_avg_sq": {i for o, members in groups if o["amsgrad"] for i in members},
            "ema": {i for o, members in groups if o["ema_decay"] is not None for i in members},
        }
        side = self.sides[0]
        for i, w in enumerate(self.model.weights):
            found = side.read(i)
            entry = dict.get(side.optimizer.state, side.params[i], {})
            assert float(entry.get("step", 0)) == w.steps, (
                f"parameter {i} counts {entry.get('step', 0)}, not {w.steps}"
            )
            known = {name: number for name, number, _ in w.numbers()}
            assert known.keys() == found.keys(), (
                f"state of parameter {i}: {found.keys()}, not {known.keys()}"
            )
            for name, number in known.items():
                off = np.abs(found[name] - number.value)
                assert (off <= number.error).all(), (
                    f"{name} of parameter {i} is {found[name]} after {w.steps} steps, "
                    f"but must be {number.value} within {number.error}"
                )
                if i in stepped and i in kept.get(name, stepped):
                    wide = number.error > self.limit * np.abs(number.value)
                    number.set(
                        np.where(wide, found[name], number.value), np.where(wide, 0, number.error)
                    )
            visible = numbers(side.params[i])
            shown = 2.0**-8 if w.dtype == BF16 else 2.0**-11
            if hides_weights(w.precision):
                assert (
                    np.abs(visible - found["param"]) <= shown * np.abs(visible) + 2.0**-25
                ).all()
        if self.model.norm is not None and self.model.needs_norm:
            if side.optimizer.grad_norm is not None:
                assert np.isclose(
                    float(side.optimizer.grad_norm),
                    self.model.norm,
                    rtol=2**-22,
                    atol=0,
                    equal_nan=True,
                )
                assert int(side.optimizer.skipped_steps) == self.model.skipped

    def _compare(self):
        """Both sides have the same bits; nothing around the parameters changed; values of groups
        are as set.
        """
        first, second = self.sides
        for i in range(len(self.scales)):
            a, b = first.snapshot(i), second.snapshot(i)
            assert a == b, (
                f"parameter {i} differs between the two in {[k for k in a if a[k] != b.get(k)]}"
            )
        for side in self.sides:
            assert all(g.intact() for g in side.guards), "memory around a parameter was written to"
            for group, (o, _) in zip(side.optimizer.param_groups, self.model.groups, strict=True):
                assert {key: float(group[key]) if key == "lr" else group[key] for key in o} == o
