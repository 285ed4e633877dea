"""What makes a plan be made anew, with torch's guard and without it."""

import pytest
import torch
from training import gradient, parameters, results, same_bits

from fused_adam import FusedAdam
from fused_adam import guards as watch
from fused_adam.engine import MAX_CACHED_ROWS
from fused_adam.guards import LayoutGuard


@pytest.fixture(params=["guards", "python"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(watch, "guards", None)
    else:
        assert watch.guards is not None


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(4, 6, dtype=torch.float64),
        torch.ones(6, 4),
        torch.ones(6, 4).t(),
        torch.ones(1, 6).expand(4, 6),
        torch._neg_view(torch.ones(4, 6)),
        None,
    ],
)
def test_layouts_differ(other):
    kept = LayoutGuard([torch.ones(3), torch.ones(4, 6)])
    assert kept.hold([torch.zeros(3), torch.zeros(4, 6)])
    assert not kept.hold([torch.zeros(3), other])
    twice = torch.ones(2)
    assert LayoutGuard([twice, twice]).hold([twice, twice])


class Plans:
    """Counts how often an optimizer decides anew."""

    def __init__(self, optimizer):
        self.count = 0
        build = optimizer._engine._build

        def counted(*args):
            self.count += 1
            return build(*args)

        optimizer._engine._build = counted


def step(optimizer, number, skip=()):
    for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = None if index in skip else gradient(p, index, number)
    optimizer.step()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_one_plan_serves_whatever_does_not_move_memory(backend):
    optimizer = FusedAdam(parameters(torch.float32, [(5,), (7, 3)]), backend=backend)
    plans, kept = Plans(optimizer), []
    for number in range(8):
        step(optimizer, number)
        kept += [
            p.grad for p in optimizer.param_groups[0]["params"]
        ]  # so that gradients have new addresses
        group = optimizer.param_groups[0]
        group.update(
            lr=group["lr"] / 2,
            betas=(0.8, 0.9),
            weight_decay=0.1 * number,
            eps=1e-6,
            maximize=number > 4,
        )
        optimizer.zero_grad()
    assert plans.count == 1


@pytest.mark.parametrize("flatten", [False, True])
def test_each_change_makes_one_new_plan(flatten):
    optimizer = FusedAdam(parameters(torch.float32, [(5,), (7, 3)]), flatten=flatten)
    plans = Plans(optimizer)
    params = optimizer.param_groups[0]["params"]

    def replace_second():
        optimizer.state.pop(params[1])
        params[1] = parameters(torch.float32, [(7, 3)])[0]

    changes = [
        lambda: None,
        lambda: optimizer.add_param_group({"params": parameters(torch.float32, [(2,)])}),
        lambda: optimizer.param_groups[0].update(amsgrad=True),
        lambda: setattr(params[0], "data", params[0].data.clone()),
        lambda: optimizer.state[params[0]].update(exp_avg=torch.zeros(5)),
        replace_second,
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ]
    for number, change in enumerate(changes):
        change()
        step(optimizer, 2 * number)
        step(optimizer, 2 * number + 1)
        assert plans.count == number + 1


def test_plans_are_kept_for_patterns_of_gradients_that_come_back():
    """Experts take turns: after the first round nothing is decided anew, and every one counts its
    own steps.
    """
    optimizers = [
        FusedAdam(parameters(torch.float32, [(5,), (7, 3), (2,)]), flatten=True) for _ in range(2)
    ]
    plans = Plans(optimizers[0])
    twin = optimizers[1]
    for number in range(9):
        skip = ((), (0,), (1, 2))[number % 3]
        for optimizer in optimizers:
            optimizer.zero_grad()
            step(optimizer, number, skip)
        twin._engine.drop_plans()  # decides anew every time
    assert plans.count == 3 + 1  # what the first plan updated as one has come apart
    assert same_bits(results(optimizers[0]), results(twin))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_kept_plans_notice_state_that_moved_under_another_one(backend):
    optimizers = [
        FusedAdam(parameters(torch.float32, [(5,), (7, 3)]), backend=backend) for _ in range(2)
    ]
    for number, skip in enumerate([(), (1,), (1,), ()]):
        for optimizer in optimizers:
            if number == 2:
                first = optimizer.param_groups[0]["params"][0]
                optimizer.state[first]["exp_avg"] = torch.ones(5)
            step(optimizer, number, skip)
        optimizers[1]._engine.drop_plans()
    assert same_bits(*map(results, optimizers))


def test_memory_for_kept_plans_is_bounded():
    optimizer = FusedAdam(parameters(torch.float32, [(2,)] * 6))
    for number in range(40):
        step(optimizer, number, skip=[i for i in range(6) if number + 1 >> i & 1])
    kept = [len(plan.param_states) for plan in optimizer._engine.plans.values()]
    assert 1 < len(kept) and sum(kept) <= MAX_CACHED_ROWS * 6


def test_a_sparse_gradient_after_an_expanded_one_is_refused_by_its_name():
    param = parameters(torch.float32, [(5,)])[0]
    optimizer = FusedAdam([param])
    param.grad = torch.ones(1).expand(5)
    optimizer.step()
    before = results(optimizer)
    param.grad = torch.zeros(5).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert same_bits(results(optimizer), before)
