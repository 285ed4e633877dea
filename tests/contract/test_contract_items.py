"""torch's contract item by item: the same action on both classes has the same outcome, error texts
included.

A constructor, B param groups, C flags, D state, E gradients, H step and hooks, I checkpoints. What
is deliberately different is tested in test_contract_differences.py;
G (AMP) is in test_amp.py, and the arithmetic (F) in test_parity.py and test_accuracy.py.
"""

import copy
import inspect
import unittest.mock

import pytest
import torch
from actions import (
    after,
    fresh_pickle,
    grad_mode_of_closure,
    grouped,
    groups_of,
    hooks,
    inf,
    late_group,
    listed_twice,
    nan,
    options,
    outcome,
    p,
    reloaded,
    snapshot,
    stepped,
    steps_as,
    strided,
    with_grad,
    without,
)
from torch import nn
from training import through_a_file

from fused_adam import FusedAdam, FusedAdamW

ONE = torch.tensor(1e-2)
BETAS = [
    *(
        (1.0, 0.9),
        (-0.1, 0.9),
        (0.9, 1.0),
        (0.9, nan),
        (0, 0.9),
        (0.9,),
        [0.9, 0.99],
        (0.9, 0.99, 0.5),
    ),
    (torch.tensor(0.9), 0.99),
    (torch.tensor(0.9), torch.tensor(0.99)),
    (torch.ones(2) / 2, torch.tensor(0.9)),
    (torch.tensor([[0.9]]), torch.tensor([0.99])),
]
ITEMS = {
    "A1-unknown keyword": options(foo=1),
    "A1-seventh positional": lambda cls: cls([p(2)], 1e-3, (0.9, 0.99), 1e-8, 0, False, True),
    "A3-defaults and their order": lambda cls: list(cls([p(2)]).defaults),
    "A3-keys of a group": lambda cls: list(cls([p(2)]).param_groups[0]),
    **{
        f"A4-lr {lr!r}": options(lr=lr)
        for lr in (-1.0, nan, inf, 0, 1, "a", torch.tensor(-1.0), torch.ones(2), ONE)
    },
    **{f"A4-eps {eps}": options(eps=eps) for eps in (-1e-8, nan, 0, 1)},
    **{f"A4-betas {betas!r}": options(betas=betas) for betas in BETAS},
    **{
        f"A4-weight_decay {wd!r}": options(weight_decay=wd)
        for wd in (-0.1, nan, 0, 1, torch.tensor(0.1))
    },
    "A4-tensor lr and foreach": options(lr=ONE, foreach=True),
    "A4-tensor lr and foreach capturable": options(lr=ONE, foreach=True, capturable=True),
    "A4-tensor betas and foreach": options(
        betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=True
    ),
    "A5-fused and foreach": options(fused=True, foreach=True),
    "A5-fused and differentiable": options(fused=True, differentiable=True),
    "A5-foreach and differentiable": options(foreach=True, differentiable=True),
    "A6-a group's values are not checked": grouped(
        lambda: [{"params": [p(2)], "lr": -5.0, "fused": True}]
    ),
    **{f"A7-lr of shape {s}": stepped(p(2), lr=torch.full(s, 0.1)) for s in ((), (1,), (1, 1))},
    "A8-fused and capturable": stepped(p(2), fused=True, capturable=True),
    "B1-a tensor": lambda cls: cls(p(2)),
    "B1-none": lambda cls: cls(None),
    "B1-empty": lambda cls: cls([]),
    "B1-an empty group": grouped([{"params": []}]),
    "B2-a tensor in a group": grouped(lambda: [{"params": p(2)}]),
    "B2-a generator": grouped(lambda: (q for q in [p(2), p(3)])),
    "B2-a set": lambda cls: cls([{"params": {p(2)}}]),
    "B2-no params": lambda cls: cls([{"lr": 0.1}]),
    "B2-not a dict": after(lambda o: o.add_param_group([p(2)])),
    "B3-not a tensor": lambda cls: cls(["x"]),
    "B3-not a leaf": lambda cls: cls([p(2) * 2]),
    "B3-integers at construction": lambda cls: len(
        cls([torch.ones(2, dtype=torch.int64)]).param_groups
    ),
    "B4-duplicates in a group": listed_twice,
    "B5-names": grouped(lambda: nn.Linear(2, 2).named_parameters()),
    "B5-names for some": lambda cls: cls([("a", p(2)), p(3)]),
    "B5-names in one group only": lambda cls: cls([{"params": [("a", p(2))]}, {"params": [p(3)]}]),
    "B5-names twice": grouped(lambda: [("a", p(2)), ("a", p(3))]),
    "B6-extra keys": grouped(lambda: [{"params": p(2), "mine": 1}]),
    "B9-mixed dtypes": stepped(
        p(2),
        p(3, dtype=torch.bfloat16),
        p(4, dtype=torch.float64),
        steps=2,
        lr=0.25,
        weight_decay=0,
    ),
    "B10-a group after steps": after(late_group),
    "B11-repr": lambda cls: repr(cls([p(2)], lr=0.1)),
    "C4-foreach false": stepped(p(2), foreach=False),
    "C4-foreach": stepped(p(2), foreach=True),
    "C4-fused": stepped(p(2), p(0), fused=True),
    "D1-state appears with the first gradient": stepped(p(2), p(3, grad=False)),
    "D2-keys in order": after(lambda o: [list(entry) for entry in o.state.values()]),
    "D3-strided": stepped(strided(), steps=2),
    "D3-transposed": stepped(
        with_grad(torch.ones(3, 2).t().requires_grad_(), torch.ones(2, 3)), steps=2
    ),
    "D3-channels_last": stepped(
        with_grad(
            p(2, 3, 4, 5, grad=False).to(memory_format=torch.channels_last).detach(),
            torch.ones(2, 3, 4, 5),
        )
    ),
    "D4-step": after(
        lambda o: [(e["step"].dtype, e["step"].shape, e["step"].device) for e in o.state.values()]
    ),
    "D6-complex": stepped(p(2, 3, dtype=torch.complex64), p(2), steps=2),
    **{f"D7-shape {s}": stepped(p(*s), steps=2) for s in ((), (1,), (0,), (0, 3))},
    "E1-no gradient is not a zero gradient": stepped(
        p(2, grad=False), with_grad(p(2), torch.zeros(2)), weight_decay=0.1
    ),
    "E2-sparse": lambda cls: cls([with_grad(p(3), torch.ones(3).to_sparse())]).step(),
    "E5-expanded gradient": stepped(with_grad(p(3, 4), torch.ones(1, 4).expand(3, 4)), steps=2),
    "E5-transposed gradient": stepped(
        with_grad(p(3, 4), torch.arange(12.0).view(4, 3).t()), steps=2
    ),
    "E7-maximize": stepped(p(3), maximize=True, weight_decay=0.5, lr=0.1),
    "E8-nan with amsgrad": stepped(
        with_grad(p(19), torch.full((19,), nan)), amsgrad=True, steps=2, foreach=False
    ),
    "H1-closure's value": after(lambda o: (o.step(), o.step(lambda: 3.0))),
    "H1-closure runs with gradients": after(grad_mode_of_closure),
    "H4-hooks": after(hooks),
    "H8-attributes": lambda cls: sorted(
        name for name in vars(cls([p(2)])) if not name.startswith("_")
    ),
    "I1-keys": after(lambda o: [(list(o.state_dict()[key])) for key in ("state", "param_groups")]),
    "I1-weights_only": reloaded(through_a_file),
    "I2-fewer groups": reloaded(lambda saved: saved["param_groups"].clear()),
    "I4-options come from the checkpoint": reloaded(
        lambda s: s["param_groups"][0].update(lr=0.3, fused=True, eps=0.1)
    ),
    "I6-older": reloaded(
        without("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")
    ),
    "I6-older than decoupled decay": reloaded(without("decoupled_weight_decay")),
    "I6-step as a number": reloaded(steps_as(float)),
    "I6-step as an integer": reloaded(steps_as(int)),
    "I9-pickle": after(fresh_pickle),
}


def item(name):
    """Add an action that takes more than one expression."""

    def add(action):
        ITEMS[name] = action
        return action

    return add


@item("A7-lr keeps its identity")
def _(cls):
    optimizer = cls([p(2)], lr=ONE)
    return optimizer.param_groups[0]["lr"] is optimizer.defaults["lr"] is ONE


@item("B3-a non-leaf that retains its gradient")
def _(cls):
    param = p(2) * 2
    param.retain_grad()
    return len(cls([param]).param_groups)


@item("B4-duplicates across groups")
def _(cls):
    param = p(2)
    return cls([{"params": param}, {"params": param}])


@item("B6-the dict is the user's own")
def _(cls):
    group = {"params": [p(2)]}
    return cls([group]).param_groups[0] is group


@item("B7-options changed between steps")
def _(cls):
    optimizer = cls([p(2)])
    optimizer.step()
    optimizer.param_groups[0].update(
        lr=0.5, betas=(0.5, 0.9), eps=0.1, weight_decay=0.2, maximize=True
    )
    optimizer.step()
    return snapshot(optimizer)


@item("B8-amsgrad turned off")
def _(cls):
    optimizer = cls([p(2)], amsgrad=True)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.step()
    return snapshot(optimizer)


@item("C5-a step that requires grad")
def _(cls):
    param = with_grad(p(2) * 1, torch.ones(2))
    optimizer = cls([param], differentiable=True)
    optimizer.step()
    optimizer.state[param]["step"].requires_grad_()
    optimizer.step()


@item("C7-grad mode after a step")
def _(cls):
    cls([p(2)]).step()
    return torch.is_grad_enabled()


@item("D2-keys with amsgrad")
def _(cls):
    optimizer = cls([p(2)], amsgrad=True)
    optimizer.step()
    return [list(entry) for entry in optimizer.state.values()]


@item("D8-own counters")
def _(cls):
    optimizer = cls([p(2), p(3)])
    optimizer.step()
    optimizer.param_groups[0]["params"][0].grad = None
    optimizer.step()
    return snapshot(optimizer)


@item("D9-string keys in state")
def _(cls):
    optimizer = cls([p(2)])
    optimizer.state["note"]["a"] = 1
    optimizer.step()
    return optimizer.state["note"]


@item("D9-the user writes the step")
def _(cls):
    optimizer = cls([p(2)])
    optimizer.step()
    for entry in optimizer.state.values():
        entry["step"] = torch.tensor(10.0)
    optimizer.step()
    return snapshot(optimizer)


@item("H6-a scheduler reads and writes")
def _(cls):
    optimizer = cls([p(2)])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    return groups_of(optimizer)


@item("H7-zero_grad")
def _(cls):
    optimizer = cls([p(2)])
    optimizer.zero_grad(set_to_none=False)
    zeroed = optimizer.param_groups[0]["params"][0].grad.tolist()
    optimizer.zero_grad()
    return zeroed, optimizer.param_groups[0]["params"][0].grad


@item("I1-moments are not copied")
def _(cls):
    param = p(2)
    optimizer = cls([param])
    optimizer.step()
    return (
        optimizer.state_dict()["state"][0]["exp_avg"].data_ptr()
        == optimizer.state[param]["exp_avg"].data_ptr()
    )


@item("I2-fewer parameters")
@reloaded
def _(saved):
    saved["param_groups"][0]["params"].pop()


@item("I3-other dtypes")
@reloaded
def _(saved):
    for entry in saved["state"].values():
        entry.update(exp_avg=entry["exp_avg"].double(), exp_avg_sq=entry["exp_avg_sq"].bfloat16())


@item("I5-names stay where the checkpoint has none")
def _(cls):
    optimizer = cls([("a", p(2))])
    optimizer.load_state_dict(cls([p(2)]).state_dict())
    return groups_of(optimizer)


@item("I8-deepcopy")
def _(cls):
    optimizer = cls([p(2)])
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.step()
    public = [
        sorted(name for name in vars(o) if not name.startswith("_")) for o in (optimizer, twin)
    ]
    return snapshot(twin), public[0] == public[1]


@item("C3-parameters that get their values after construction")
def _(cls):
    param = torch.ones(2, device="meta", requires_grad=True)
    optimizer = cls([param])
    torch.utils.swap_tensors(param, p(2))
    optimizer.step()
    return snapshot(optimizer)


@item("D5-a counter stops at 2^24")
def _(cls):
    optimizer = cls([p(2)])
    optimizer.step()
    for entry in optimizer.state.values():
        entry["step"].fill_(2**24 - 1)
    optimizer.step()
    optimizer.step()
    return snapshot(optimizer)


@item("E6-gradients of a strided convolution")
def _(cls):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = cls(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return snapshot(optimizer)


@item("E9-inference tensors")
def _(cls):
    with torch.inference_mode():
        param = torch.ones(2)
        param.grad = torch.ones(2)
        optimizer = cls([param])
        optimizer.step()
        return snapshot(optimizer)


@item("H2-capture without capturable")
def _(cls):
    with unittest.mock.patch("torch.accelerator.is_available", return_value=True):
        with unittest.mock.patch("torch.cuda.is_available", return_value=True):
            with unittest.mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
                return cls([p(2)]).step()


@item("H3-the name in a profile, once")
def _(cls):
    optimizer = cls([p(2)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    return sorted(event.name for event in profile.events() if event.name.startswith("Optimizer."))


@item("H5-hooks around checkpoints")
def _(cls):
    optimizer = cls([p(2)])
    optimizer.step()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: seen.append(sorted(saved)))
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: seen.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    return seen


@pytest.mark.parametrize(
    ("ours", "theirs"), [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)]
)
@pytest.mark.parametrize("item", ITEMS)
def test_item(item, ours, theirs):
    assert outcome(ITEMS[item], ours) == outcome(ITEMS[item], theirs)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)]
)
def test_a1_signature_begins_with_torchs(ours, theirs):
    mine, others = (
        [(q.name, q.default, q.kind) for q in inspect.signature(cls.__init__).parameters.values()]
        for cls in (ours, theirs)
    )
    assert mine[: len(others)] == others
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, _, kind in mine[len(others) :])


def test_a2_classes():
    assert issubclass(FusedAdamW, (FusedAdam)) and issubclass(FusedAdamW, torch.optim.AdamW)
    assert "decoupled_weight_decay" not in inspect.signature(FusedAdamW).parameters
