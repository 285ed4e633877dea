"""Whatever a program may do to an optimizer, its parameters and its state: random commands. Steps
are in Lockstep.
"""

from __future__ import annotations

import copy
import math
import warnings

import hypothesis.strategies as st
import numpy as np
import torch
from fuzz_lockstep import (
    BF16,
    FP16,
    FP32,
    FP64,
    INDEXES,
    LAYOUTS,
    MEMBERS,
    OPTIONS,
    SEEDS,
    VALUES,
    Lockstep,
    drawn,
)
from fuzz_model import Number, Weights, hides_weights
from fuzz_side import bits, laid_out, numbers
from hypothesis.stateful import precondition, rule
from torch import nn


class Optimizers(Lockstep):
    """All commands."""

    @precondition(lambda self: len(self.model.groups) < 3)
    @rule(
        options=OPTIONS,
        precision=st.runner().flatmap(lambda self: self.precisions),
        members=MEMBERS,
        seed=SEEDS,
    )
    def add_param_group(self, options, precision, members, seed):
        self._add(options, precision, members, seed)

    @precondition(lambda self: len(self.model.groups) > 1)
    @rule(source=INDEXES, goal=INDEXES, which=INDEXES, where=INDEXES)
    def move_to_another_group(self, source, goal, which, where):
        """Or within one."""
        groups = self.model.groups
        source, goal = source % len(groups), goal % len(groups)
        old, new = groups[source][1], groups[goal][1]
        which, where = which % len(old), where % (len(new) + 1)
        weights = self.model.weights
        if len(old) == 1 or weights[old[which]].precision != weights[new[0]].precision:
            return
        if source != goal and old.count(old[which]) > 1:
            return  # no constructor takes a parameter of two groups, so it could not be rebuilt
        new.insert(where, old.pop(which))
        for side in self.sides:
            lists = [group["params"] for group in side.optimizer.param_groups]
            lists[goal].insert(where, lists[source].pop(which))

    @rule(i=INDEXES)
    def freeze_or_unfreeze(self, i):
        i %= len(self.scales)
        self.frozen ^= {i}
        for side in self.sides:
            side.params[i].requires_grad_(i not in self.frozen)
            side.params[i].grad = None

    @rule(key=st.sampled_from(list(VALUES)), which=INDEXES, group=INDEXES)
    def change_a_value(self, key, which, group):
        self.set_value(group % len(self.model.groups), key, VALUES[key][which % len(VALUES[key])])

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        for side in self.sides:
            flat = side.optimizer._engine.flat
            places = flat.flat_params if flat else {}
            had = [p.grad is not None for p in side.params]
            in_buffers = [p in places and places[p].takes(p) for p in side.params]
            side.optimizer.zero_grad(set_to_none)
            for i, p in enumerate(side.params):
                assert (p.grad is not None) == (in_buffers[i] if set_to_none else had[i])
                assert p.grad is None or not p.grad.any()

    @rule(i=INDEXES)
    def refuse_a_sparse_gradient(self, i):
        i %= len(self.scales)
        for side in self.sides:
            param = side.params[i]
            if param.dim() == 0 or param.is_complex():
                return
            before = [side.snapshot(j) for j in range(len(self.scales))]
            param.grad = None
            param.grad_dtype = param.dtype
            param.grad = torch.zeros(param.shape, dtype=param.dtype).to_sparse()
            try:
                side.step()
            except RuntimeError as error:
                assert "sparse" in str(error)
            else:
                raise AssertionError("a sparse gradient was taken")
            param.grad = None
            assert before == [side.snapshot(j) for j in range(len(self.scales))]

    # State and memory
    # --------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["tensors", "data", "entries", "dict"]))
    def move_state(self, how):
        """To other memory, as it is: the next step has to follow."""
        for side in self.sides:
            state = side.optimizer.state
            for param, entry in list(state.items()):
                if how == "data":
                    for value in entry.values():
                        value.data = value.data.clone()
                elif how != "dict":
                    entry = {key: value.clone() for key, value in entry.items()}
                    state[param] = entry if how == "entries" else state[param]
                    state[param].update(entry)
            if how == "dict":
                side.optimizer.state = dict(reversed(state.items()))

    @rule(what=st.sampled_from(["write", "replace", "step", "average"]), i=INDEXES, seed=SEEDS)
    def edit_state(self, what, i, seed):
        i %= len(self.scales)
        w = self.model.weights[i]
        for side in self.sides:
            entry = dict.get(side.optimizer.state, side.params[i], {})
            if "exp_avg" not in entry:
                return
            entry = side.optimizer.state[side.params[i]]
            if what == "step":
                entry["step"].fill_(1 + seed % 50)
            elif what == "average":
                if "ema" in entry:
                    entry["ema"].mul_(0.5)
            elif what == "write":
                entry["exp_avg"].mul_(0.5)
            else:
                entry["exp_avg"] = entry["exp_avg"] * 0.5
        if what == "step":
            w.steps = 1 + seed % 50
        elif what == "average":
            if w.ema is not None:
                w.ema.set(w.ema.value * 0.5, w.ema.error * 0.5 + 2.0**-134)
        else:
            w.m.set(w.m.value * 0.5, w.m.error * 0.5 + 2.0**-25 * (w.dtype == FP16) + 2.0**-134)

    @rule()
    def swap_averages(self):
        """What parameters had comes back, bit for bit."""
        averaging = {
            i for o, members in self.model.groups if o["ema_decay"] is not None for i in members
        }
        if not averaging:
            return
        for side in self.sides:
            before = [side.snapshot(i) for i in range(len(self.scales))]
            with side.optimizer.swap_ema():
                for i, param in enumerate(side.params):
                    entry = dict.get(side.optimizer.state, param, {})
                    if i in averaging and "ema" in entry and not self._shares(i):
                        assert bits(param) == bits(entry["ema"].to(param.dtype))
                    elif not self._shares(i):
                        assert bits(param) == before[i]["param"]
            assert before == [side.snapshot(i) for i in range(len(self.scales))]

    @rule(i=INDEXES, layout=LAYOUTS, changed=st.booleans(), seed=SEEDS)
    def swap_data(self, i, layout, changed, seed):
        """`param.data = ...`: other memory, perhaps another layout, perhaps other values."""
        i %= len(self.scales)
        w = self.model.weights[i]
        rng = np.random.default_rng(seed)
        values = self.sides[0].params[i].detach().clone()
        if changed:
            values = drawn(rng, tuple(values.shape), values.dtype)
        for side in self.sides:
            data = laid_out(values, "guarded" if layout == "shared" else layout, side.guards)
            side.params[i].data = data
        w.p = w.p.copy()
        if changed:
            w.p = Number(numbers(values))
            if hides_weights(w.precision):
                w.p.error += (2.0**-8 if w.dtype == BF16 else 2.0**-11) * w.p.reach + 2.0**-25
        w.recoded()
        self._near()

    @rule(last=st.booleans())
    def change_memory_format(self, last):
        old = torch.contiguous_format if last else torch.channels_last
        params = self.sides[0].params
        chosen = [
            i for i, p in enumerate(params) if p.dim() == 4 and p.is_contiguous(memory_format=old)
        ]
        for side in self.sides:
            module = nn.ParameterList([side.params[i] for i in chosen])
            module.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        for i in chosen:
            self.model.weights[i].p = self.model.weights[i].p.copy()
            self.model.weights[i].recoded()

    @rule(dtype=st.sampled_from([FP32, BF16, FP64]))
    def change_dtype(self, dtype):
        chosen = [i for i, p in enumerate(self.sides[0].params) if not p.is_complex()]
        if any(dtype not in self.dtypes[self.model.weights[i].precision] for i in chosen):
            return
        for side in self.sides:
            for i in chosen:
                side.params[i].grad = None
                side.params[i].grad_dtype = None
            nn.ParameterList([side.params[i] for i in chosen]).to(dtype)
        for w in (self.model.weights[i] for i in chosen):
            if w.dtype != dtype:
                w.p = w.p.copy()
                w.stored_anew(dtype, w.precision)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how):
        for side in self.sides:
            side.copied(how)
        self.model.separate()
        self._new_optimizer()
        self._near()
        self._compare()

    def _new_optimizer(self):
        self.model.skipped, self.model.norm = 0, None

    @rule(flatten=st.booleans(), keep=st.booleans(), choice=st.integers(0, 11))
    def rebuild(self, flatten, keep, choice):
        """A new optimizer, flat or not, perhaps of other precisions, which loads the old one's
        state.
        """
        precisions = []
        for _, members in self.model.groups:
            old = self.model.weights[members[0]].precision
            dtypes = {self.sides[0].params[i].dtype for i in members}
            allowed = [
                p
                for p in self.dtypes
                if dtypes <= set(self.dtypes[p]) and not (p and any(map(self._shares, members)))
            ]
            precisions.append(old if keep or not allowed else allowed[choice % len(allowed)])
        for side, arguments in zip(self.sides, self._arguments(flatten), strict=True):
            side.rebuild(arguments, precisions)
        for (_, members), precision in zip(self.model.groups, precisions, strict=True):
            for i in set(members):
                w = self.model.weights[i]
                if w.precision != precision:
                    w.stored_anew(w.dtype, precision)
        self._new_optimizer()

    # Checkpoints
    # --------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.saved) < 3)
    @rule()
    def save(self):
        side = self.sides[0]
        self.saved.append(
            {
                "state_dict": copy.deepcopy(side.optimizer.state_dict()),
                "params": [p.detach().clone() for p in side.params],
                "weights": [w.copy() for w in self.model.weights],
                "groups": copy.deepcopy(self.model.groups),
                "bits": [side.snapshot(i) for i in range(len(self.scales))],
                "kinds": self._kinds(),
            }
        )

    def _kinds(self):
        """What a parameter's bits may depend on."""
        sides = self.sides[0].params
        return [
            (p.dtype, p.stride(), w.precision)
            for p, w in zip(sides, self.model.weights, strict=True)
        ]

    @precondition(lambda self: self.saved)
    @rule(which=INDEXES)
    def load(self, which):
        saved = self.saved[which % len(self.saved)]
        then, now = (
            [members for _, members in groups] for groups in (saved["groups"], self.model.groups)
        )
        if list(map(len, then)) != list(map(len, now)):
            self._refuse(saved["state_dict"])
        if then != now:  # by position it would be other parameters' state
            return
        for side in self.sides:
            with torch.no_grad():
                for p, value in zip(side.params, saved["params"], strict=True):
                    p.copy_(value)
            side.optimizer.load_state_dict(saved["state_dict"])
        kinds = self._kinds()
        for i, (w, old) in enumerate(
            zip(self.model.weights, map(Weights.copy, saved["weights"]), strict=True)
        ):
            if (old.dtype, old.precision) != (w.dtype, w.precision):
                old.stored_anew(w.dtype, w.precision)
            elif kinds[i] == saved["kinds"][i] and not old.pending:
                assert self.sides[0].snapshot(i) == saved["bits"][i], (
                    f"parameter {i} was saved with other bits"
                )
            else:
                old.recoded()
            w.p.set(old.p.value, old.p.error)
            w.m, w.v, w.v_max, w.steps, w.pending = old.m, old.v, old.v_max, old.steps, old.pending
            w.ratio, w.ema = old.ratio, old.ema
        self.model.groups = copy.deepcopy(saved["groups"])
        self._near()
        self._compare()

    def _refuse(self, state_dict):
        for side in self.sides:
            before = [side.snapshot(i) for i in range(len(self.scales))]
            try:
                side.optimizer.load_state_dict(state_dict)
            except ValueError:
                pass
            else:
                raise AssertionError("a checkpoint of other groups was taken")
            assert before == [side.snapshot(i) for i in range(len(self.scales))]

    @rule(steps=st.integers(1, 3), seed=SEEDS)
    def load_torchs(self, steps, seed):
        """A checkpoint of torch.optim.Adam over parameters like ours."""
        rng = np.random.default_rng(seed)
        clones = [nn.Parameter(p.detach().clone()) for p in self.sides[0].params]
        # Without decay moments do not depend on weights, which torch's float16 turns into NaN: its
        # eps is zero.
        decayless = {"weight_decay": 0.0}
        groups = [
            {**o, **decayless, "params": [clones[i] for i in members]}
            for o, members in self.model.groups
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*duplicate parameters", UserWarning)
            theirs = torch.optim.Adam(groups, foreach=False)
        for _ in range(steps):
            for i, p in enumerate(clones):
                p.grad = drawn(rng, tuple(p.shape), p.dtype) * self.scales[i]
            theirs.step()
        for group, (o, _) in zip(theirs.param_groups, self.model.groups, strict=True):
            group["weight_decay"] = o["weight_decay"]
        state_dict = theirs.state_dict()
        for side in self.sides:
            side.optimizer.load_state_dict(state_dict)
        for i, (clone, w) in enumerate(zip(clones, self.model.weights, strict=True)):
            if hides_weights(w.precision):  # theirs has no more than the parameter shows
                w.p = Number(numbers(self.sides[0].params[i]))
            entry = theirs.state[clone]
            w.steps, w.ratio, w.ema = int(entry["step"]), math.inf, None
            w.m, w.v = (Number(numbers(entry[key])) for key in ("exp_avg", "exp_avg_sq"))
            w.v_max = (
                Number(numbers(entry["max_exp_avg_sq"])) if "max_exp_avg_sq" in entry else None
            )
            p, w.p = w.p, w.p.copy()
            w.stored_anew(w.dtype, w.precision)
            w.p = p
        self._near()
        self._compare()
