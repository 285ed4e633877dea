"""`optimizer.state` whose entries share memory or a dict: with each other, another optimizer, a
copy or another process.
"""

import copy
import multiprocessing
import pickle

import pytest
import torch
from state_entries import members, new, replace_all
from torch import nn
from training import results, same_bits, train

from fused_adam import FusedAdam, FusedAdamW


def test_two_entries_over_the_same_memory_are_parted():
    """Stepped in one launch they would race: all but the first are copied."""
    optimizer, expected = (new(shapes=[(5,), (5,), (5,)]) for _ in range(2))
    train(optimizer, 1)
    train(expected, 1)
    shared, step = torch.linspace(0, 1, 5), torch.tensor(7.0)
    for each in (optimizer, expected):
        for entry in each.state.values():
            own = each is expected
            entry["exp_avg_sq"], entry["step"] = (x.clone() if own else x for x in (shared, step))
    train(optimizer, 2, first=1)
    train(expected, 2, first=1)
    assert same_bits(results(optimizer), results(expected))
    first, *others = (
        optimizer.state[param]["exp_avg_sq"].data_ptr() for param in members(optimizer)
    )
    assert first == shared.data_ptr() and len({first, *others}) == 3


def test_an_entry_has_torchs_order_whatever_its_neighbours_lack():
    optimizer = new()
    train(optimizer, 1)
    first, second, *_ = members(optimizer)
    optimizer.state[first]["exp_avg_sq"] = torch.ones(5, dtype=torch.float64)  # to be copied
    del optimizer.state[second]
    train(optimizer, 1, first=1)
    assert list(optimizer.state[second]) == ["step", "exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize("lender", [0, 2])
def test_an_entry_that_borrows_from_a_neighbour_is_parted(lender):
    """What is ours stays where it is, whichever of the two comes first."""
    optimizer, expected = (new(shapes=[(5,), (5,), (5,)]) for _ in range(2))
    for each in (optimizer, expected):
        train(each, 2)
        lent = each.state[members(each)[lender]]["exp_avg"]
        each.state[members(each)[1]]["exp_avg"] = lent.clone() if each is expected else lent
        train(each, 2, first=2)
    assert same_bits(results(optimizer), results(expected))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_dict_that_parameters_share_is_parted(steps):
    """As `dict.fromkeys(params, {})` makes. It used to end in a KeyError, with half of the state
    made.
    """
    optimizer, expected = (new(shapes=[(5,), (5,), (5,)]) for _ in range(2))
    for each in (optimizer, expected):
        train(each, steps)
        first, second, third = members(each)
        entry = each.state[first]
        for param in (second, third):
            each.state[param] = (
                {key: value.clone() for key, value in entry.items()} if each is expected else entry
            )
        train(each, 2, first=steps)
    assert same_bits(results(optimizer), results(expected))
    assert len(set(map(id, optimizer.state.values()))) == 3


def _worker(model, optimizer, lock):
    with lock:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_state_in_shared_memory(method):
    """A3C's SharedAdam: three workers step one state. It used to end at a step of 0, and at moments
    of zero.
    """
    model = nn.Linear(3, 2)
    model.share_memory()
    optimizer = FusedAdam(model.parameters(), lr=0.1)
    optimizer.init_state()
    replace_all(optimizer, lambda value: value.clone().share_memory_())
    expected = copy.deepcopy(model)
    plain = torch.optim.Adam(expected.parameters(), lr=0.1)
    for _ in range(3):
        for param in expected.parameters():
            param.grad = torch.ones_like(param)
        plain.step()
    context = torch.multiprocessing.get_context(method)
    lock = context.Lock()
    workers = [context.Process(target=_worker, args=(model, optimizer, lock)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
        assert worker.exitcode == 0
    assert [entry["step"].item() for entry in optimizer.state.values()] == [3, 3]
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[ours][key], plain.state[theirs][key])
    assert multiprocessing.active_children() == []


def test_two_optimizers_may_step_one_state():
    """The state of one is given to another: both count, and neither takes the other's count for its
    own.
    """
    one = new(shapes=[(5,), (7,)])
    train(one, 1)
    other = FusedAdamW(members(one), lr=0.01, weight_decay=0.1)
    other.state = one.state
    expected = new(shapes=[(5,), (7,)])
    train(expected, 1)
    for number, optimizer in enumerate([other, one, other, other, one], start=1):
        train(optimizer, 1, first=number)
        train(expected, 1, first=number)
    assert same_bits(results(one), results(expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_state_of_a_copy_is_flat_again(copied):
    """Nobody put it there: it moves into segments, so that neighbours are stepped as one."""
    optimizer = new(flatten=True)
    train(optimizer, 2)
    twin, _ = copied((optimizer, members(optimizer)))
    train(twin, 1, first=2)
    segments = {
        id(slot.segment)
        for home in twin._engine.arena.param_states.values()
        for slot in home.slots.values()
    }
    assert len(segments) == 2
    train(optimizer, 1, first=2)
    assert same_bits(results(twin), results(optimizer))
