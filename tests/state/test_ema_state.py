"""Averages of weights in checkpoints, exports and copies, and in the model for a while."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from recipes import (
    BF16,
    FP32,
    RECOMMENDED,
    dtype_of,
    every_recipe,
    members,
    train,
    trained,
    weights,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from training import parameters, results, same_bits, through_a_file, values

from fused_adam import FusedAdam, FusedAdamW, step_in_backward
from fused_adam.backends import choose as backend
from fused_adam.state import offload

SHAPES = [(40,), (5, 13), ()]
OPTIONS = {"lr": 0.05, "weight_decay": 0.3}
DECAY = {"ema_decay": 0.9}


def successor(optimizer, dtype=None, **arguments):
    copies = [nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in members(optimizer)]
    return FusedAdamW(copies, **{**OPTIONS, **arguments})


def averages(optimizer):
    return [optimizer.state[p]["ema"].clone() for p in members(optimizer)]


def plain(steps=2, dtype=FP32, **arguments):
    optimizer = FusedAdamW(parameters(dtype, SHAPES), **{**OPTIONS, **arguments})
    train(optimizer, steps)
    return optimizer


# Checkpoints
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@every_recipe
def test_resuming_is_bit_equal_to_not_having_stopped(precision, how):
    optimizer = trained(precision, 3, SHAPES, amsgrad=True, **DECAY)
    if how == "state_dict":
        resumed = successor(optimizer, precision=precision, flatten=True)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        assert resumed.param_groups[0]["ema_decay"] == 0.9
    else:
        resumed = (
            copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        )
    assert same_bits(results(resumed), results(optimizer))
    for o in (optimizer, resumed):
        train(o, 2, first=3)
    assert same_bits(results(resumed), results(optimizer))


@pytest.mark.parametrize("source", ["torch", "off", "export"])
def test_without_averages_in_the_checkpoint_they_begin_as_the_weights(source):
    """The decay of the optimizer stays, and what it averaged before is gone."""
    saved = plain()
    if source == "torch":
        saved = torch.optim.AdamW(parameters(FP32, SHAPES), **OPTIONS)
        for i, p in enumerate(parameters(FP32, SHAPES)):
            saved.param_groups[0]["params"][i].grad = p.detach().clone()
        saved.step()
    state_dict = saved.export_fp32()["state"] if source == "export" else saved.state_dict()
    assert "ema_decay" not in state_dict["param_groups"][0]
    optimizer = plain(steps=3, ema_decay=0.75)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["ema_decay"] == 0.75
    assert all("ema" not in entry for entry in optimizer.state.values())
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 1)
    for average, p in zip(averages(optimizer), members(optimizer), strict=True):
        assert torch.equal(average, p.detach())


def test_averages_in_the_checkpoint_go_on_in_an_optimizer_without():
    """As the maximum of AMSGrad does: the checkpoint's group says that weights are averaged."""
    saved = plain(**DECAY)
    optimizer = successor(saved)
    optimizer.load_state_dict(through_a_file(saved.state_dict()))
    assert optimizer.param_groups[0]["ema_decay"] == 0.9
    for o in (saved, optimizer):
        train(o, 1, first=2)
    assert same_bits(results(optimizer), results(saved))


def test_a_tensor_stays_its_users_and_gets_the_saved_value():
    saved = plain(ema_decay=torch.tensor(0.75))
    decay = torch.tensor(0.0)
    optimizer = successor(saved, ema_decay=decay)
    optimizer.load_state_dict(through_a_file(saved.state_dict()))
    assert optimizer.param_groups[0]["ema_decay"] is decay and decay == 0.75
    other = successor(saved, ema_decay=0.5)
    other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["ema_decay"] == 0.75
    assert other.param_groups[0]["ema_decay"] is not saved.param_groups[0]["ema_decay"]


@pytest.mark.parametrize("target", [None, *RECOMMENDED])
@pytest.mark.parametrize("source", [None, *RECOMMENDED])
def test_averages_keep_their_bits_in_another_precision(source, target):
    saved = trained(source, 3, SHAPES, BF16, **DECAY)
    other = successor(saved, precision=target)
    other.load_state_dict(through_a_file(saved.state_dict()))
    assert all(map(torch.equal, averages(other), averages(saved)))
    train(other, 1, first=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema": torch.zeros(3)}, "'ema' of parameter 0 has shape"),
        ({"ema": 1.0}, "'ema' of parameter 0 has float"),
        ({"ema": torch.zeros(40, dtype=torch.complex64)}, "dense tensor with values of"),
    ],
)
def test_a_wrong_average_changes_nothing(change, message):
    optimizer = plain(**DECAY)
    before, state_dict = results(optimizer), copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0].update(change)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert same_bits(results(optimizer), before)
    del optimizer.state[members(optimizer)[0]]["ema"]
    with pytest.raises(ValueError, match="lacks 'ema'"):
        train(optimizer, 1, first=2)


def test_what_a_user_writes_is_averaged_from():
    optimizer = plain(steps=1, ema_decay=0.5)
    first, second, _ = members(optimizer)
    optimizer.state[first]["ema"].fill_(7.0)
    optimizer.state[second]["ema"] = torch.full((5, 13), 7.0, dtype=torch.float64)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 1, first=1)
    for p in (first, second):
        assert torch.equal(optimizer.state[p]["ema"], 7 + 0.5 * (p.detach() - 7))


@pytest.mark.parametrize("precision", RECOMMENDED)
def test_exports_hold_averages(precision):
    optimizer = trained(precision, 3, SHAPES, **DECAY)
    exported = optimizer.export_fp32()
    twin = FusedAdamW([nn.Parameter(w.clone()) for w in weights(optimizer)], **OPTIONS, **DECAY)
    twin.load_state_dict(through_a_file(exported["state"]))
    assert all(map(torch.equal, averages(twin), averages(optimizer)))
    for entry in exported["state"]["state"].values():
        assert entry["ema"].dtype == FP32
    torchs = torch.optim.AdamW([nn.Parameter(w.clone()) for w in weights(optimizer)])
    torchs.load_state_dict(exported["state"])
    for p in torchs.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    torchs.step()


def test_init_state_takes_weights_that_are_loaded_after_it():
    optimizer = FusedAdamW(parameters(BF16, SHAPES), precision="split32", lr=0.0, **DECAY)
    optimizer.init_state()
    for p in members(optimizer):
        assert torch.equal(optimizer.state[p]["ema"], p.detach().float())
        p.data.add_(1)
    own = members(optimizer)[1]
    optimizer.state[own]["ema"].fill_(7.0)  # somebody's own beginning
    train(optimizer, 2)
    for p in members(optimizer):
        if p is own:
            torch.testing.assert_close(optimizer.state[p]["ema"], 0.81 * 7 + 0.19 * p.float())
        else:
            assert torch.equal(optimizer.state[p]["ema"], p.detach().float())


def test_init_state_and_a_checkpoint():
    saved = plain(**DECAY)
    optimizer = successor(saved, **DECAY)
    optimizer.init_state()
    optimizer.load_state_dict(through_a_file(saved.state_dict()))
    for o in (saved, optimizer):
        train(o, 1, first=2)
    assert same_bits(results(optimizer), results(saved))


def test_another_dtype_takes_averages_along():
    optimizer = plain(**DECAY)
    before = averages(optimizer)
    for p in members(optimizer):
        p.data = p.data.double()
    optimizer.zero_grad()
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.param_groups[0]["ema_decay"] = torch.tensor(1.0)  # nothing moves
    train(optimizer, 1, first=2)
    for found, want in zip(averages(optimizer), before, strict=True):
        assert found.dtype == torch.float64 and torch.equal(found, want.double())


@pytest.mark.parametrize("precision", [None, "split24-int8"])
def test_averages_go_to_the_host_and_back(precision, monkeypatch):
    monkeypatch.setattr(offload, "host_memory", torch.empty_like)
    optimizer = trained(precision, 2, SHAPES, BF16, **DECAY)
    twin = trained(precision, 4, SHAPES, BF16, **DECAY)
    before = averages(optimizer)
    optimizer.offload()
    with optimizer.swap_ema():  # state stays where it is
        assert all(
            torch.equal(p, e.bfloat16()) for p, e in zip(members(optimizer), before, strict=True)
        )
        optimizer.reload()
        optimizer.offload()
    assert all(map(torch.equal, optimizer.ema_state_dict().values(), before))
    optimizer.reload()
    train(optimizer, 2, first=2)
    assert same_bits(results(optimizer), results(twin))


def test_steps_over_fake_tensors_make_averages():
    with FakeTensorMode():
        optimizer = FusedAdamW([nn.Parameter(torch.ones(40, dtype=BF16))], **OPTIONS, **DECAY)
        members(optimizer)[0].grad = torch.ones(40, dtype=BF16)
        optimizer.step()
        [entry] = optimizer.state.values()
        assert entry["ema"].dtype == FP32 and entry["ema"].shape == (40,)
        for call in (optimizer.ema_state_dict, optimizer.swap_ema().__enter__):
            with pytest.raises(RuntimeError, match="cannot be used under FakeTensorMode"):
                call()


# By name
# ------------------------------------------------------------------------------------------------


def test_averages_by_name():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    groups = [
        {"params": [*model[:2].named_parameters()]},
        {"params": [("norm", model[2].weight), ("norm", model[2].bias)], "ema_decay": None},
    ]
    optimizer = FusedAdamW(groups, **OPTIONS, **DECAY)
    assert optimizer.ema_state_dict() == {}
    train(optimizer, 2)
    found = optimizer.ema_state_dict()
    assert [*found] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    for name, param in model[:2].named_parameters():
        kept = optimizer.state[param]["ema"]
        assert torch.equal(found[name], kept) and found[name].data_ptr() != kept.data_ptr()
    model.load_state_dict(found, strict=False)
    assert torch.equal(model[0].weight, found["0.weight"])
    unnamed = plain(**DECAY)
    assert [*unnamed.ema_state_dict()] == [0, 1, 2]
    double = plain(dtype=torch.float64, **DECAY).ema_state_dict()
    assert {e.dtype for e in double.values()} == {torch.float64}


@pytest.mark.parametrize("name", ["ema_state_dict", "swap_ema"])
def test_what_cannot_be_read_says_why(name, monkeypatch):
    def read(optimizer):
        found = getattr(optimizer, name)()
        if name == "swap_ema":
            found.__enter__()

    with pytest.raises(RuntimeError, match=rf"{name}\(\) needs ema_decay, and no param group has"):
        read(plain())
    averaging = plain(**DECAY)
    monkeypatch.setattr(backend, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=rf"{name}\(\) cannot be captured in a CUDA graph"):
        read(averaging)


# In the model for a while
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("precision", [None, *RECOMMENDED])
def test_averages_are_in_the_model_and_leave_no_trace(precision, raises):
    optimizer = trained(precision, 3, SHAPES, dtype_of(precision) if precision else BF16, **DECAY)
    twin = trained(precision, 5, SHAPES, dtype_of(precision) if precision else BF16, **DECAY)
    before, addresses = results(optimizer), [p.data_ptr() for p in members(optimizer)]
    try:
        with optimizer.swap_ema():
            for p, average in zip(members(optimizer), averages(optimizer), strict=True):
                assert torch.equal(p, average.to(p.dtype))
            assert not same_bits(results(optimizer), before)
            members(optimizer)[0].data.fill_(3.0)  # a user's own writes go
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert same_bits(results(optimizer), before)
    assert [p.data_ptr() for p in members(optimizer)] == addresses
    optimizer._engine._build = None  # and no new plan
    train(optimizer, 2, first=3)
    assert same_bits(results(optimizer), results(twin))


def test_bits_come_back_that_no_number_has():
    p = nn.Parameter(torch.zeros(4, dtype=BF16))
    optimizer = FusedAdamW([p], **OPTIONS, **DECAY)
    p.grad = torch.ones_like(p)
    optimizer.step()
    bits = torch.tensor([0x7FC1, -0x8000, 0x7F80, 0x0001], dtype=torch.int16)  # NaN, -0.0, inf
    p.data.copy_(bits.view(BF16))
    with optimizer.swap_ema():
        assert p.isfinite().all()
    assert torch.equal(p.detach().view(torch.int16), bits)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_in_flat_buffers_and_in_inference_mode(flatten, inference):
    optimizer = trained(None, 2, SHAPES, BF16, flatten=flatten, **DECAY)
    before = results(optimizer)
    with torch.inference_mode(inference), optimizer.swap_ema():
        assert not same_bits(results(optimizer), before)
        optimizer.zero_grad()
    assert same_bits(results(optimizer), before)
    train(optimizer, 1, first=2)


def test_parameters_that_move_into_flat_buffers_meanwhile_come_back():
    optimizer = plain(**DECAY)
    copied = FusedAdamW(members(optimizer), flatten=True, **OPTIONS)
    copied.load_state_dict(optimizer.state_dict())
    moved = pickle.loads(pickle.dumps(copied))  # moves at its first use
    before = results(moved)
    with moved.swap_ema():
        moved.zero_grad()
    assert same_bits(results(moved), before)


def test_parameters_without_an_average_stay():
    params = parameters(FP32, [(40,), (33,), (5,)])
    groups = [{"params": params[:2]}, {"params": params[2:], "ema_decay": None}]
    optimizer = FusedAdamW(groups, **OPTIONS, **DECAY)
    with optimizer.swap_ema():  # before the first step
        assert all(map(torch.equal, params, parameters(FP32, [(40,), (33,), (5,)])))
    for i in (0, 2):
        params[i].grad = values(params[i].shape, 9, FP32)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    with optimizer.swap_ema():
        same = [torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert same == [False, True, True]
    # An average that no longer follows its weight is not shown.
    optimizer.param_groups[1]["ema_decay"] = 0.5
    optimizer.param_groups[0]["ema_decay"] = None
    with optimizer.swap_ema():
        assert all(map(torch.equal, params, before))
    assert optimizer.ema_state_dict() == {}


def test_memory_that_parameters_share_comes_back():
    memory = values((64,), 0, FP32)
    whole, part = nn.Parameter(memory), nn.Parameter(memory[16:48])
    optimizer = FusedAdamW([whole, part], **OPTIONS, **DECAY)
    for step in range(2):
        whole.grad, part.grad = values((64,), step, FP32), values((32,), 9 + step, FP32)
        optimizer.step()
    before = memory.clone()
    with optimizer.swap_ema():
        assert not torch.equal(memory, before)
    assert torch.equal(memory, before)


REFUSED = {
    "step": lambda optimizer: optimizer.step(),
    "step with a closure": lambda optimizer: optimizer.step(lambda: pytest.fail("called")),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict({}),
    "export_fp32": lambda optimizer: optimizer.export_fp32(),
    "init_state": lambda optimizer: optimizer.init_state(),
    "another swap_ema": lambda optimizer: optimizer.swap_ema().__enter__(),
    "a copy": copy.deepcopy,
    "or pickle": pickle.dumps,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_mix_averages_with_other_state_is_refused(what):
    optimizer = plain(**DECAY)
    before = results(optimizer)
    with optimizer.swap_ema():
        inside = results(optimizer)
        with pytest.raises(RuntimeError, match=r"cannot be used within swap_ema\(\)") as error:
            REFUSED[what](optimizer)
        assert what.split(" with")[0] in str(error.value)
        assert same_bits(results(optimizer), inside)
    assert same_bits(results(optimizer), before)
    optimizer.step()  # and is possible again
    optimizer.state_dict()


def test_backward_that_steps_is_refused():
    model = nn.Linear(4, 2)
    optimizer = FusedAdam(model.parameters(), **DECAY)
    step_in_backward(model, optimizer)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    before = results(optimizer)
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match=r"within swap_ema\(\)"):
        model(torch.ones(3, 4)).sum().backward()
    assert same_bits(results(optimizer), before)


def test_the_copies_are_freed():
    optimizer = plain(**DECAY)
    cloned = []
    clone = torch.Tensor.clone

    def noted(tensor, *args, **kwargs):
        result = clone(tensor, *args, **kwargs)
        cloned.append(weakref.ref(result))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", noted)
        with optimizer.swap_ema():
            held = sum(ref().nbytes for ref in cloned if ref() is not None)
            assert held == sum(p.nbytes for p in members(optimizer))
    gc.collect()
    assert all(ref() is None for ref in cloned)
