"""Groups that users edit between steps, and what optimizers that share dicts, parameters or
wrappers owe each other.
"""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import gradient, parameters, results, same_bits, train

from fused_adam import FusedAdam, FusedAdamW, step_in_backward

SHAPES = [(5,), (3, 4), (40,), (64,)]


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def move(groups):
    groups[1]["params"].insert(0, groups[0]["params"].pop())


def swap(groups):
    first, second = groups[0]["params"], groups[1]["params"]
    first[0], second[0] = second[0], first[0]


def reverse(groups):
    groups.reverse()


def shift_border(groups):
    """The flat order stays, and so do all lengths but two."""
    groups[0]["params"].append(groups[1]["params"].pop(0))


def replace_lists(groups):
    for group in groups:
        group["params"] = list(reversed(group["params"]))


def drop_one(groups):
    del groups[1]["params"][0]


def split(groups):
    groups.append(
        {**groups[0], "params": [groups[0]["params"].pop()], "lr": 0.3, "betas": (0.5, 0.6)}
    )


def merge(groups):
    groups[0]["params"] += groups.pop()["params"]


EDITS = [move, swap, reverse, shift_border, replace_lists, drop_one, split, merge]


def pair(**options):
    """Ours and torch's, with groups that differ in everything a group may set."""
    optimizers = []
    for cls, extra in ((FusedAdamW, options), (torch.optim.AdamW, {"foreach": False})):
        params = parameters(torch.float32, SHAPES)
        groups = [
            {
                "params": params[:2],
                "lr": 1e-1,
                "betas": (0.8, 0.9),
                "eps": 1e-6,
                "weight_decay": 0.3,
            },
            {"params": params[2:], "lr": 1e-4, "maximize": True, "amsgrad": False},
        ]
        optimizers.append(cls(groups, **extra))
    return optimizers


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {"backend": "reference"},
        {"backend": "triton"},
        {"backend": "compiled"},
        {"flatten": True},
        {"flatten": True, "backend": "triton"},
        {"max_grad_norm": 1e9, "backend": "triton"},
    ],
    ids=str,
)
def test_groups_edited_between_steps(edit, options):
    ours, theirs = pair(**options)
    for optimizer in (ours, theirs):
        numbers = {param: i for i, param in enumerate(members(optimizer))}
        for step in range(6):
            if step == 3:
                edit(optimizer.param_groups)
            optimizer.zero_grad()
            for param in members(optimizer):
                param.grad = gradient(param, numbers[param], step)
            optimizer.step()
    for a, b in zip(members(ours), members(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
        assert ours.state[a]["step"] == theirs.state[b]["step"]


def test_a_parameter_that_moves_takes_the_learning_rate_of_its_new_group():
    for options in ({}, {"backend": "triton"}, {"flatten": True}):
        params = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
        optimizer = FusedAdam(
            [{"params": params[:2], "lr": 1e-1}, {"params": params[2:], "lr": 1e-4}], **options
        )
        move(optimizer.param_groups)
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
        torch.testing.assert_close(params[1].detach(), torch.full((3,), -1e-4))


def test_a_parameter_that_moves_to_a_precision_that_would_lose_bits_is_refused():
    """Nothing changes; where nothing is lost the step goes on."""
    params = parameters(torch.bfloat16, [(40,), (7,)])
    optimizer = FusedAdamW([{"params": params[:1], "precision": "split32"}, {"params": params[1:]}])
    train(optimizer, 2)
    before = results(optimizer)
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    with pytest.raises(
        ValueError,
        match=r"parameter 0 \(group 1\) has 'remainder', which its precision does not store",
    ):
        train(optimizer, 1, first=2)
    assert same_bits(results(optimizer), before)
    optimizer.param_groups[0]["params"] += optimizer.param_groups[1]["params"]
    optimizer.param_groups[1]["params"].clear()
    train(optimizer, 1, first=2)
    assert optimizer.state[params[1]]["remainder"].dtype == torch.int16


def test_a_group_made_by_hand_has_the_optimizers_precision():
    params = parameters(torch.bfloat16, [(40,), (7,)])
    optimizer = FusedAdamW(params[:1], precision="split24-bf16", seed=5)
    group = {
        key: value
        for key, value in optimizer.param_groups[0].items()
        if key not in ("precision", "seed")
    }
    optimizer.param_groups.append({**group, "params": params[1:]})
    train(optimizer, 1)
    assert optimizer.state[params[1]].keys() == optimizer.state[params[0]].keys()
    assert (optimizer.param_groups[1]["precision"], optimizer.param_groups[1]["seed"]) == (
        "split24-bf16",
        5,
    )


def test_a_parameter_that_a_recipe_cannot_store_is_named_when_its_group_is_edited():
    params = parameters(torch.bfloat16, [(40,), (7,)])
    optimizer = FusedAdamW(params, precision="split32")
    train(optimizer, 1)
    before = results(optimizer)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"parameter 2 of param group 0"):
        train(optimizer, 1)
    assert same_bits(results(optimizer)[:2], before)


@pytest.mark.parametrize("options", [{}, {"flatten": True}], ids=str)
def test_parameters_that_can_be_read_only_once_are_refused(options):
    """torch.optim reads them once, and steps nothing from then on."""
    params = parameters(torch.float32, [(40,), (7,)])
    optimizer = FusedAdamW([{"params": params[:1]}, {"params": params[1:]}], **options)
    train(optimizer, 1)
    before = results(optimizer)
    optimizer.param_groups[1]["params"] = (param for param in params[1:])
    with pytest.raises(
        TypeError, match=r"param_groups\[1\]\['params'\] is a generator, but must be a list"
    ):
        optimizer.step()
    optimizer.param_groups[1]["params"] = tuple(params[1:])
    assert same_bits(results(optimizer), before)
    train(optimizer, 1, first=1)
    assert [optimizer.state[param]["step"] for param in params] == [2, 2]


def test_an_export_after_parameters_were_edited_alone_goes_by_position():
    """Names that are left belong to nobody: the export used to raise."""
    params = parameters(torch.float32, SHAPES)
    named = list(zip("abcd", params, strict=True))
    optimizer = FusedAdamW([{"params": named[:2]}, {"params": named[2:]}])
    train(optimizer, 1)
    gone = optimizer.param_groups[0]["params"].pop(0)
    del optimizer.state[gone]
    exported = optimizer.export_fp32()
    assert list(exported["params"]) == [0, "c", "d"]
    assert all(map(torch.equal, exported["params"].values(), params[1:]))
    assert list(exported["state"]["state"]) == [0, 1, 2]


def test_dicts_given_to_two_optimizers_carry_no_precision():
    groups = [{"params": parameters(torch.bfloat16, [(40,)])}]
    FusedAdamW(groups, precision="split32", seed=7)
    assert not {"precision", "seed"} & groups[0].keys()
    other = FusedAdamW(groups)
    train(other, 1)
    assert "precision" not in other.param_groups[0]
    assert other.state[groups[0]["params"][0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    own = [{"params": groups[0]["params"], "precision": "native-bf16"}]
    assert FusedAdamW(own, precision="split32").param_groups[0]["precision"] == "native-bf16"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize(
    "edit", [move, swap, reverse, replace_lists, split, merge], ids=lambda edit: edit.__name__
)
def test_steps_in_backward_follow_the_groups(edit):
    """Positions used to be those of the start: an edit froze parameters without a word, and freed
    their gradients.
    """
    runs = []
    for in_backward in (False, True):
        module = model()
        params = list(module.parameters())
        optimizer = FusedAdamW(
            [{"params": params[:3], "lr": 1e-1}, {"params": params[3:], "lr": 1e-3}]
        )
        if in_backward:
            step_in_backward(module, optimizer, bucket_bytes=64)
        for step in range(5):
            if step == 2:
                edit(optimizer.param_groups)
            optimizer.zero_grad()
            module(torch.linspace(0, 1, 32).view(8, 4) + step).square().mean().backward()
            optimizer.step()
        assert [optimizer.state[param]["step"].item() for param in params] == [5] * 6
        runs.append([results(optimizer)[i] for i in range(6)])
    assert same_bits(*runs)


def test_steps_in_backward_leave_parameters_alone_that_left():
    module = model()
    first, *_ = params = list(module.parameters())
    optimizer = FusedAdamW(module.parameters())
    step_in_backward(module, optimizer)
    del optimizer.param_groups[0]["params"][0]
    before = first.detach().clone()
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(first, before) and first.grad is not None  # its gradient is not ours to free
    assert all(param.grad is None for param in params[1:])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x, use_reentrant):
        return checkpoint(
            self.last,
            checkpoint(self.first, x, use_reentrant=use_reentrant),
            use_reentrant=use_reentrant,
        )


def test_a_second_gradient_of_tied_weights_has_advice_that_works():
    torch.manual_seed(0)
    x, start = torch.ones(2, 4, requires_grad=True), Tied()
    expected = copy.deepcopy(start)
    plain = FusedAdamW(expected.parameters())
    expected(x, False).sum().backward()
    plain.step()

    module = copy.deepcopy(start)
    handle = step_in_backward(module, FusedAdamW(module.parameters()))
    with pytest.raises(RuntimeError, match="use_reentrant=False, or leave the parameter out"):
        module(x, True).sum().backward()
    handle.remove()

    for advice in ("use_reentrant=False", "left out"):
        module = copy.deepcopy(start)
        optimizer = FusedAdamW(module.parameters())
        tied = module.first.weight
        step_in_backward(
            [p for p in module.parameters() if advice != "left out" or p is not tied], optimizer
        )
        module(x, advice == "left out").sum().backward()
        optimizer.step()
        assert same_bits(results(optimizer), results(plain))


class Wrapper:
    """As frameworks wrap optimizers: a subclass of its class, with a copy of its __dict__."""

    def __new__(cls, optimizer):
        wrapped = object.__new__(type("Wrapped", (type(optimizer),), {}))
        wrapped.__dict__ = {
            key: value for key, value in optimizer.__dict__.items() if key != "step"
        }
        return wrapped


def test_what_methods_set_is_the_same_for_a_wrapper():
    module = model()
    optimizer = FusedAdamW(module.parameters(), max_grad_norm=1.0)
    wrapped = Wrapper(optimizer)
    train(optimizer, 1)
    wrapped.offload()
    with pytest.raises(RuntimeError, match="offloaded"):
        optimizer.step()
    optimizer.reload()
    train(wrapped, 1)
    wrapped.reduce_norm = torch.clone
    assert optimizer.reduce_norm is torch.clone
    assert torch.equal(optimizer.grad_norm, wrapped.grad_norm)

    plain = FusedAdamW(module.parameters())
    wrapped = Wrapper(plain)
    handle = step_in_backward(module, wrapped)
    for _ in range(3):  # the second round used to raise
        module(torch.ones(2, 4)).sum().backward()
        plain.step()
    handle.remove()
    assert plain._engine.in_backward is None


def test_the_norm_of_a_step_without_gradients_is_zero():
    for options in ({}, {"backend": "triton"}, {"flatten": True}):
        param = nn.Parameter(torch.ones(3))
        optimizer = FusedAdam([param], skip_nonfinite=True, **options)
        optimizer.step()
        assert optimizer.grad_norm == 0 and optimizer.skipped_steps == 0
        param.grad = torch.full((3,), torch.inf)
        optimizer.step()
        assert optimizer.grad_norm == torch.inf and optimizer.skipped_steps == 1
        param.grad = None
        optimizer.step()
        assert optimizer.grad_norm == 0 and optimizer.skipped_steps == 1


# Flat buffers and others
# ------------------------------------------------------------------------------------------------


def test_gradients_of_a_parameter_that_left_are_not_zeroed():
    mine, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    optimizer = FusedAdam([mine, theirs], flatten=True)
    train(optimizer, 2)
    optimizer.zero_grad()
    theirs.grad.fill_(5)
    del optimizer.param_groups[0]["params"][1]
    other = FusedAdam([theirs])
    optimizer.zero_grad()
    assert (theirs.grad == 5).all()
    before = theirs.detach().clone()
    other.step()
    assert (theirs < before).all()
    train(optimizer, 1)
    assert theirs.grad is not None


def test_buffers_of_parameters_that_were_replaced_are_freed():
    """As Accelerate does under FSDP2: other parameters take their places in the groups."""
    module = model()
    optimizer = FusedAdam(module.parameters(), flatten=True)
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    optimizer.zero_grad()
    flat = optimizer._engine.flat
    buffers = [
        weakref.ref(x)
        for x in (flat.grad_segments[0], next(iter(flat.flat_params.values())).param.segment)
    ]
    twin = copy.deepcopy(module)
    optimizer.param_groups[0]["params"] = list(twin.parameters())
    del module, flat, param
    optimizer.zero_grad()
    gc.collect()
    assert [buffer() for buffer in buffers] == [None, None]
    train(optimizer, 1)


def test_memory_that_others_see_is_not_moved():
    import numpy

    array = numpy.ones(3, numpy.float32)
    raw = bytearray(numpy.ones(3, numpy.float32).tobytes())
    lender = torch.ones(3)
    seen = [
        (lambda: torch.from_numpy(array), lambda: array[0]),
        (lambda: torch.as_tensor(array), lambda: array[0]),
        (
            lambda: torch.frombuffer(raw, dtype=torch.float32),
            lambda: numpy.frombuffer(raw, numpy.float32)[0],
        ),
        (lambda: torch.from_dlpack(lender), lambda: lender[0].item()),
    ]
    for make, look in seen:
        param = nn.Parameter(make().fill_(1))  # the only tensor over that memory that anybody holds
        optimizer = FusedAdam([param, nn.Parameter(torch.ones(3))], lr=0.1, flatten=True)
        assert param not in optimizer._engine.flat.flat_params
        for each in members(optimizer):
            each.grad = torch.ones(3)
        optimizer.step()
        assert abs(look() - 0.9) < 1e-6


def test_a_later_optimizer_moves_what_an_earlier_one_moved():
    module = model()
    first = FusedAdam(module.parameters(), flatten=True)
    train(first, 1)
    del first
    second = FusedAdam(module.parameters(), flatten=True)
    assert len(second._engine.flat.flat_params) == 6


@pytest.mark.parametrize("flatten", [False, True])
def test_sparse_gradients_raise(flatten):
    """Added to a buffer one would be dense, and would step every row."""
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = FusedAdam(embedding.parameters(), flatten=flatten)
    optimizer.zero_grad()
    for _ in range(2):
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()
        optimizer.zero_grad()


def test_copies_share_what_steps_them():
    optimizer = FusedAdam(parameters(torch.float32, SHAPES), flatten=True, max_grad_norm=1.0)
    twin = copy.copy(optimizer)
    expected = FusedAdam(parameters(torch.float32, SHAPES), max_grad_norm=1.0)
    for number, each in enumerate([optimizer, twin, twin, optimizer]):
        train(each, 1, first=number)
        train(expected, 1, first=number)
    assert same_bits(results(optimizer), results(expected))
    assert twin.state is optimizer.state and twin.param_groups is optimizer.param_groups
    assert twin._engine is optimizer._engine
