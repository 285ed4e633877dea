"""Whatever the model and the schedule: parameters and moments stay with torch.optim's, step by step
(hypothesis).
"""

import copy

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine with a GPU may lack it

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from training import MOMENTS, values

from bench.harness import oracle
from bench.harness.oracle import Options
from fused_adam import FusedAdam

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64])
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "offset"])
GRADS = st.sampled_from(["contiguous", "transposed", "expanded", "same", "none"])
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([1e-2, 1e-4, 0.0]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.95, 0.5)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
    },
)
GROUPS = st.lists(
    st.tuples(OPTIONS, st.lists(st.tuples(SHAPES, DTYPES, LAYOUTS), min_size=1, max_size=3)),
    min_size=1,
    max_size=3,
)
SCHEDULES = st.sampled_from([None, "OneCycleLR", "CosineAnnealingLR", "StepLR"])
STEPS = 4


def laid_out(tensor, layout):
    """The same values in another layout; `strided` and `offset` are windows on larger memory."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([torch.zeros(3, dtype=tensor.dtype), tensor.reshape(-1)])[3:].view(
            tensor.shape
        )
    return tensor


def random(shape, dtype, seed):
    if dtype == torch.complex64:
        return torch.complex(
            values(shape, seed, torch.float32), values(shape, seed + 1, torch.float32)
        )
    return values(shape, seed, dtype)


def gradient(param, seed, how):
    if how == "none":
        return None
    if how == "expanded" and param.dim():
        return random((1, *param.shape[1:]), param.dtype, seed).expand(param.shape)
    grad = random(param.shape, param.dtype, seed)
    return torch.empty_like(param).detach().copy_(grad) if how == "same" else laid_out(grad, how)


def make(cls, groups, schedule, **extra):
    made, seed = [], 0
    for options, members in groups:
        params = []
        for shape, dtype, layout in members:
            params.append(laid_out(random(shape, dtype, seed), layout).detach().requires_grad_())
            seed += 7
        made.append({"params": params, **options})
    optimizer = cls(made, **extra)
    arguments = {
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
        "CosineAnnealingLR": {"T_max": 5},
        "StepLR": {"step_size": 2},
    }
    scheduler = schedule and getattr(torch.optim.lr_scheduler, schedule)(
        optimizer, **arguments[schedule]
    )
    return optimizer, scheduler


def tolerance(dtype, optimizer):
    """What rounding takes two paths apart by: ours rounds stored values once, torch's up to four
    times.
    """
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    o = Options(
        lr=0.1, betas=(0.95, 0.99), weight_decay=decay
    )  # the largest that the strategies draw
    real = torch.float32 if dtype == torch.complex64 else dtype
    ours, torchs = (oracle.tolerance(real, STEPS, o, roundings) for roundings in (1, 4))
    return {key: ours[key] + torchs[key] for key in ours}


def assert_near(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    groups=GROUPS,
    schedule=SCHEDULES,
    flatten=st.booleans(),
    pattern=st.lists(GRADS, min_size=1, max_size=11),
    reload=st.integers(0, STEPS),
)
def test_lockstep_with_torch(groups, schedule, flatten, pattern, reload):
    """After each step all values agree within torch's tolerance between its own paths, then start
    equal again.
    """
    ours, our_scheduler = make(FusedAdam, groups, schedule, flatten=flatten)
    theirs, their_scheduler = make(torch.optim.Adam, groups, schedule)
    mine = [p for group in ours.param_groups for p in group["params"]]
    others = [p for group in theirs.param_groups for p in group["params"]]
    for step in range(STEPS):
        if step == reload:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for index, (p, q) in enumerate(zip(mine, others, strict=True)):
            how = pattern[(step * len(mine) + index) % len(pattern)]
            p.grad, q.grad = (gradient(t, 1000 * step + index, how) for t in (p, q))
        ours.step()
        theirs.step()
        if schedule:
            our_scheduler.step()
            their_scheduler.step()
        for p, q in zip(mine, others, strict=True):
            a, b = ours.state.get(p, {}), theirs.state.get(q, {})
            assert list(a) == list(b) and a.get("step") == b.get("step")
            within = tolerance(p.dtype, ours)
            assert_near(p, q, within["param"])
            with torch.no_grad():
                p.copy_(q)
                for key in MOMENTS:
                    if key in a:
                        assert a[key].stride() == b[key].stride() and a[key].dtype == b[key].dtype
                        assert_near(a[key], b[key], within[key])
                        a[key].copy_(b[key])
