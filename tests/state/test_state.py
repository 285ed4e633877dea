"""`optimizer.state` as its users leave it: what stands there is stepped on, where it is if that is
how it is stored.
"""

import copy
import weakref
from collections import defaultdict

import pytest
import torch
from state_entries import members, new, replace_all
from torch import nn
from training import results, same_bits, train

from fused_adam import FusedAdamW

BACKENDS = ["reference", "triton", "compiled"]
RECIPES = [
    (torch.float32, None),
    (torch.bfloat16, "split32-bf16"),
    (torch.bfloat16, "split24-int8"),
]


def tensors(optimizer):
    return [value for entry in optimizer.state.values() for value in entry.values()]


def addresses(optimizer):
    return [value.data_ptr() for value in tensors(optimizer)]


@pytest.mark.parametrize(("dtype", "precision"), RECIPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_are_put_there_are_used_where_they_are(backend, dtype, precision):
    """Of any length: behind the end of the user's memory nothing is read or written."""
    if backend == "compiled" and precision:
        pytest.skip("compiled steps know no recipes")
    plain, optimizer = (
        new(dtype, precision=precision, backend=backend),
        new(dtype, precision=precision, backend=backend),
    )
    train(plain, 2)
    train(optimizer, 2)
    buffers = []

    def into_a_buffer(value):
        buffer = torch.full((value.numel() + 32,), 77, dtype=value.dtype)
        part = buffer[16 : 16 + value.numel()].view(value.shape).copy_(value)
        buffers.append((buffer, part))
        return part

    replace_all(optimizer, into_a_buffer)
    before = addresses(optimizer)
    train(plain, 3, first=2)
    train(optimizer, 3, first=2)
    assert addresses(optimizer) == before
    assert same_bits(results(plain), results(optimizer))
    for buffer, part in buffers:
        assert (buffer[:16] == 77).all() and (buffer[16 + part.numel() :] == 77).all()


@pytest.mark.parametrize("flatten", [False, True])
def test_state_that_is_moved_away_leaves_its_memory_at_once(flatten):
    """And what comes back is stepped on where it is: nothing is held twice. (The host stands in for
    a device.)
    """
    plain, optimizer = (new(backend="triton", flatten=flatten) for _ in range(2))
    train(plain, 2)
    train(optimizer, 2)
    param_states = optimizer._engine.arena.param_states.values()
    segments = [weakref.ref(slot.segment) for home in param_states for slot in home.slots.values()]
    assert all(segment() is not None for segment in segments)
    replace_all(optimizer, torch.clone)
    assert all(segment() is None for segment in segments)
    before = addresses(optimizer)
    train(plain, 2, first=2)
    train(optimizer, 2, first=2)
    assert addresses(optimizer) == before
    assert same_bits(results(plain), results(optimizer))


def test_a_segment_lives_as_long_as_one_entry_uses_it():
    optimizer = new(backend="triton")
    train(optimizer, 1)
    first, *others = members(optimizer)
    segment = weakref.ref(optimizer._engine.arena.param_states[first].slots["exp_avg"].segment)
    for param in others:
        del optimizer.state[param]
    assert segment() is not None
    kept = optimizer.state[first]["exp_avg"]
    optimizer.state.clear()
    assert segment() is not None and (kept != 0).any()
    del kept
    assert segment() is None


@pytest.mark.parametrize(
    "count", [4, 40]
)  # with few tensors every address is read, with many one of each segment
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_loop_over_all_data_is_noticed(backend, count):
    """`value.data = value.data.to(device)`: dicts and tensors stay the same objects."""
    shapes = [(3,)] * count
    plain, optimizer = (new(shapes=shapes, backend=backend) for _ in range(2))
    train(plain, 2)
    train(optimizer, 2)
    for value in tensors(optimizer):
        value.data = value.data.clone()
    train(plain, 2, first=2)
    train(optimizer, 2, first=2)
    assert same_bits(results(plain), results(optimizer))


@pytest.mark.parametrize("dict_version", [True, False])
def test_state_is_compared_also_where_torch_numbers_no_dicts(dict_version, monkeypatch):
    from fused_adam import guards as watch

    if not dict_version:
        monkeypatch.setattr(watch, "guards", None)
    optimizer, expected = new(), new()
    for each in (optimizer, expected):
        train(each, 2)
        entries = list(each.state.values())
        train(each, 1, first=2)
        for entry in entries:
            entry["exp_avg"] = entry["exp_avg"] * 0.5
        if each is expected:
            each._engine.drop_plans()
        train(each, 1, first=3)
        each.state["a key of the user's"] = 3
        train(each, 1, first=4)
    assert same_bits(results(optimizer), results(expected))


def fill_data(entry):
    entry["step"].data.fill_(1)


def fill_array(entry):
    entry["step"].numpy()[...] = 1


def swap_data(entry):
    entry["step"].data = torch.tensor(1.0)


@pytest.mark.parametrize(
    "options", [{}, {"backend": "triton"}, {"flatten": True}, {"backend": "compiled"}], ids=str
)
@pytest.mark.parametrize(
    "change", [fill_data, fill_array, swap_data], ids=lambda change: change.__name__
)
def test_a_count_that_is_written_past_autograd_counts(change, options):
    """Neighbours that are stepped as one had the first one's count; a new memory was never counted
    up.
    """
    optimizer, expected = new(**options), new(**options)
    for each in (optimizer, expected):
        train(each, 5)
        entry = each.state[members(each)[1]]
        if each is expected:
            entry["step"] = torch.tensor(1.0)
        else:
            change(entry)
        train(each, 2, first=5)
    assert same_bits(results(optimizer), results(expected))
    assert [int(entry["step"]) for entry in optimizer.state.values()] == [7, 3, 7, 7]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.double(),
        lambda x: x.to(torch.bfloat16).float().to(torch.float64),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.t().contiguous().t(),
        lambda x: nn.Parameter(x.double(), requires_grad=False),
    ],
    ids=["float64", "rounded", "strided", "transposed", "parameter"],
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_is_stored_otherwise_is_copied(other, backend):
    optimizer, expected = (new(shapes=[(3, 4), (6, 2)], backend=backend) for _ in range(2))
    train(optimizer, 2)
    train(expected, 2)
    for each, change in ((optimizer, lambda x: x), (expected, lambda x: x.float().contiguous())):
        for entry in each.state.values():
            entry["exp_avg"] = change(other(entry["exp_avg"]))
    train(optimizer, 2, first=2)
    train(expected, 2, first=2)
    assert same_bits(results(optimizer), results(expected))


@pytest.mark.parametrize(("dtype", "precision"), RECIPES, ids=str)
@pytest.mark.parametrize("flatten", [False, True])
def test_init_state_makes_what_the_first_step_would(dtype, precision, flatten):
    optimizer, expected = (new(dtype, precision=precision, flatten=flatten) for _ in range(2))
    members(optimizer)[1].requires_grad_(False)
    optimizer.init_state()
    assert [optimizer.state[p]["step"].item() for p in members(optimizer) if p.requires_grad] == [
        0,
        0,
        0,
    ]
    assert members(optimizer)[1] not in optimizer.state
    members(optimizer)[1].requires_grad_(True)
    train(optimizer, 1)
    train(expected, 1)
    assert same_bits(results(optimizer), results(expected))
    before = results(optimizer)
    optimizer.init_state()  # what is there stays
    assert same_bits(results(optimizer), before)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("init", [True, False])
def test_torchs_checkpoint_tools_before_training(init, flatten):
    """`get_optimizer_state_dict` steps once where there is no state, and counts it; loading must
    restore all counts.
    """
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = nn.Linear(3, 2)
    optimizer = FusedAdamW(model.parameters(), lr=0.01, weight_decay=0.0, flatten=flatten)
    if init:
        optimizer.init_state()
        get_optimizer_state_dict(model, optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p, start in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(start - p, torch.full_like(p, 0.01))
        return
    for _ in range(11):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    fresh_model = nn.Linear(3, 2)
    fresh = FusedAdamW(fresh_model.parameters(), lr=0.01, flatten=flatten)
    set_optimizer_state_dict(fresh_model, fresh, saved)
    assert [entry["step"].item() for entry in fresh.state.values()] == [11, 11]
    for ours, theirs in zip(fresh.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


@pytest.mark.parametrize("flatten", [False, True])
def test_loading_fills_the_memory_that_is_there(flatten):
    """Moments and counters: who holds their addresses, such as a captured graph, goes on with what
    was loaded.
    """
    optimizer, source = (new(flatten=flatten) for _ in range(2))
    train(optimizer, 1)
    train(source, 4)
    before = addresses(optimizer)
    checkpoint = source.state_dict()
    optimizer.load_state_dict(checkpoint)
    assert addresses(optimizer) == before
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer), tensors(source), strict=True))
    for ours, theirs in zip(members(optimizer), members(source), strict=True):
        ours.data.copy_(theirs.data)
    train(optimizer, 1, first=4)
    saved = [value.clone() for entry in checkpoint["state"].values() for value in entry.values()]
    assert all(
        map(
            torch.equal,
            saved,
            [v for entry in checkpoint["state"].values() for v in entry.values()],
        )
    )
    train(source, 1, first=4)
    assert same_bits(results(optimizer), results(source))


def test_a_first_load_does_not_alias_what_it_loads():
    source, optimizer = new(), new()
    train(source, 2)
    checkpoint = copy.deepcopy(source.state_dict())
    before = copy.deepcopy(checkpoint)
    optimizer.load_state_dict(checkpoint)
    train(optimizer, 2)
    for entry, same in zip(checkpoint["state"].values(), before["state"].values(), strict=True):
        assert all(torch.equal(entry[key], same[key]) for key in entry)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step", "max_exp_avg_sq", "remainder"])
def test_an_entry_that_lost_something_is_refused_before_anything_changes(key):
    optimizer = new(torch.bfloat16, precision="split32", amsgrad=True)
    train(optimizer, 2)
    param = members(optimizer)[2]
    optimizer.state[param].pop(key)
    before = [p.detach().clone() for p in members(optimizer)]
    with pytest.raises(
        ValueError,
        match=rf"state of parameter 2 \(group 0\) has 'step'.*lacks '{key}'"
        if key != "step"
        else "lacks 'step'",
    ):
        optimizer.step()
    assert all(map(torch.equal, members(optimizer), before))
    optimizer.state[param] = {}  # as the text says
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_an_entry_of_another_optimizer_is_refused():
    optimizer = new()
    optimizer.state[members(optimizer)[0]] = {"momentum_buffer": torch.zeros(5)}
    with pytest.raises(
        ValueError, match="has 'momentum_buffer', but lacks 'step', 'exp_avg', 'exp_avg_sq'"
    ):
        train(optimizer, 1)
    optimizer.state[members(optimizer)[0]] = [1]
    with pytest.raises(ValueError, match="is list, but must be a dict"):
        train(optimizer, 1)


@pytest.mark.parametrize("kind", [dict, lambda x: defaultdict(dict, x)])
def test_state_may_be_any_dict(kind):
    optimizer, expected = new(), new()
    train(optimizer, 1)
    train(expected, 1)
    optimizer.state = kind(dict(reversed(optimizer.state.items())))
    train(optimizer, 2, first=1)
    train(expected, 2, first=1)
    assert same_bits(results(optimizer), results(expected))


def test_memory_that_runs_out_leaves_no_half_of_a_state(monkeypatch):
    """Loops catch that, and go on with less."""
    from fused_adam.state import arena

    optimizer, expected = new(), new()
    members(optimizer)[3].requires_grad_(False)
    train_some = [p for p in members(optimizer) if p.requires_grad]
    for each in (optimizer, expected):
        for number, param in enumerate(members(each)):
            param.grad = torch.ones_like(param) if number < 2 else None
        each.step()
    before = [{**optimizer.state[param]} for param in members(optimizer)[:2]]
    made = arena.segments

    def some(*args):
        if len(calls) == 1:
            raise MemoryError("no more")
        calls.append(1)
        return made(*args)

    calls = []
    monkeypatch.setattr(arena, "segments", some)
    for param in train_some:
        param.grad = torch.ones_like(param)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert [optimizer.state[param] for param in members(optimizer)[:2]] == before
    assert len(optimizer.state) == 2
    monkeypatch.undo()
    for param in members(expected)[:3]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    expected.step()
    assert same_bits(results(optimizer), results(expected))


def test_one_tensor_of_many_is_replaced():
    """Too many to read all addresses: the number of the entry's dict tells."""
    shapes = [(3,)] * 40
    optimizer, expected = (new(shapes=shapes) for _ in range(2))
    for each in (optimizer, expected):
        train(each, 2)
        entry = each.state[members(each)[17]]
        train(each, 1, first=2)
        entry["exp_avg"] = torch.full((3,), 0.5)
        if each is expected:
            each._engine.drop_plans()
        train(each, 1, first=3)
    assert same_bits(results(optimizer), results(expected))
