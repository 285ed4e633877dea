"""Checkpoints of precision recipes: exact and small, from one precision to another, and out to
float32.
"""

import copy
import io
import pickle

import pytest
import torch
from recipes import (
    BF16,
    FP16,
    FP32,
    RECOMMENDED,
    dtype_of,
    every_recipe,
    members,
    parameters,
    train,
    trained,
    weights,
    within_int8,
)
from torch import nn
from training import results, same_bits, through_a_file, values

from fused_adam import FusedAdam, FusedAdamW
from fused_adam.precision import NAMES, parse

SHAPES = [(), (40,), (5, 13), (0, 3)]

options = {"lr": 1e-2, "weight_decay": 0.1}


def successor(optimizer, dtype=None, **arguments):
    """An optimizer over copies of the parameters."""
    copies = [nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in members(optimizer)]
    return FusedAdamW(copies, **{**options, **arguments})


def decoded(optimizer):
    exported = optimizer.export_fp32()
    return [
        {"weight": weight, **exported["state"]["state"][i]}
        for i, weight in enumerate(exported["params"].values())
    ]


# The same recipe
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [False, True])
@every_recipe
def test_resuming_is_bit_equal_to_not_having_stopped(precision, flatten):
    optimizer = trained(precision, 3, SHAPES, seed=11, amsgrad=flatten)
    resumed = successor(optimizer, precision=precision, lr=7.0, flatten=flatten)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_bits(results(resumed), results(optimizer))
    assert (resumed.param_groups[0]["seed"], resumed.param_groups[0]["precision"]) == (
        11,
        precision,
    )
    for o in (optimizer, resumed):
        train(o, 2, first=3)
    assert same_bits(results(resumed), results(optimizer))


@pytest.mark.parametrize("precision", ["split24-int8", "master32-bf16"])
def test_resuming_on_the_kernel_what_the_reference_saved(precision):
    optimizer = trained(precision, 2, SHAPES)
    resumed = successor(optimizer, precision=precision, backend="triton")
    resumed.load_state_dict(optimizer.state_dict())
    for o in (optimizer, resumed):
        train(o, 1, first=2)
    assert same_bits(results(resumed), results(optimizer))


@pytest.mark.parametrize("precision", ["split24-int8", "split32-bf16"])
def test_the_order_of_elements_in_memory_may_change(precision):
    """8-bit groups follow the memory: another order is encoded anew, all else is exact."""
    a = nn.Parameter(values((2, 3, 4, 5), 1, BF16))
    first = FusedAdamW([a], precision=precision, **options)
    train(first, 3)
    b = nn.Parameter(a.detach().contiguous(memory_format=torch.channels_last))
    second = FusedAdamW([b], precision=precision, **options)
    second.load_state_dict(through_a_file(first.state_dict()))
    [got], [want] = decoded(second), decoded(first)
    assert torch.equal(got["weight"], want["weight"])
    assert second.state[b]["remainder"].stride() == b.stride()
    for key, tolerance in (("exp_avg", 0.02), ("exp_avg_sq", 0.02)):
        assert (got[key] - want[key]).abs().max() <= tolerance * want[key].abs().max()
        assert torch.equal(got[key], want[key]) or precision == "split24-int8"
    train(second, 1, first=3)
    back = FusedAdamW([nn.Parameter(b.detach().contiguous())], precision=precision, **options)
    back.load_state_dict(second.state_dict())
    train(back, 1, first=4)


@pytest.mark.parametrize("precision", RECOMMENDED)
def test_files_hold_what_is_stored_and_little_more(precision):
    optimizer = trained(precision, 1, [(16384,)])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    stored = 16384 * parse(precision).held_bytes(dtype_of(precision))
    assert stored < file.getbuffer().nbytes < stored + 4096
    entry = optimizer.state_dict()["state"][0]
    for value in entry.values():
        assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("precision", RECOMMENDED)
def test_copies_continue_alike(precision, copied):
    optimizer = trained(precision, 2, SHAPES, seed=5)
    other = copied(optimizer)
    for o in (optimizer, other):
        train(o, 2, first=2)
    assert same_bits(results(other), results(optimizer))
    other.add_param_group({"params": parameters(dtype_of(precision), [(3,)])})
    assert (other.param_groups[1]["precision"], other.param_groups[1]["seed"]) == (precision, 5)


def test_groups_carry_precision_and_seed_only_where_set():
    plain, theirs = (
        FusedAdamW(parameters(BF16), **options),
        torch.optim.AdamW(parameters(BF16), **options),
    )
    assert list(plain.param_groups[0]) == list(theirs.param_groups[0])
    mixed = FusedAdamW(
        [{"params": parameters(BF16)}, {"params": parameters(BF16), "precision": "sr"}], seed=4
    )
    assert [("precision" in g, g.get("seed")) for g in mixed.param_groups] == [
        (False, None),
        (True, 4),
    ]
    train(mixed, 1)
    # A checkpoint of theirs, or of another precision, does not change which keys there are.
    ours = FusedAdamW([{"params": parameters(BF16)}, {"params": parameters(BF16)}])
    ours.load_state_dict(mixed.state_dict())
    assert all("precision" not in g and "seed" not in g for g in ours.param_groups)
    mixed.load_state_dict(ours.state_dict())
    assert [("precision" in g, g.get("seed")) for g in mixed.param_groups] == [
        (False, None),
        (True, 4),
    ]
    explicit = FusedAdamW([{"params": parameters(BF16), "precision": None}], precision="split32")
    train(explicit, 1)
    explicit.load_state_dict(explicit.state_dict())
    assert explicit.param_groups[0]["precision"] is None and "seed" not in explicit.param_groups[0]


def test_the_checkpoints_seed_wins_and_the_constructors_precision():
    saved = trained("sr-bf16", 2, SHAPES, seed=11)
    resumed = successor(saved, precision="split24-int8", seed=12)
    resumed.load_state_dict(saved.state_dict())
    assert (resumed.param_groups[0]["precision"], resumed.param_groups[0]["seed"]) == (
        "split24-int8",
        11,
    )
    from_plain = successor(saved, precision="split24-int8", seed=12)
    plain = successor(saved)
    plain.load_state_dict(saved.state_dict())
    from_plain.load_state_dict(plain.state_dict())
    assert (from_plain.param_groups[0]["precision"], from_plain.param_groups[0]["seed"]) == (
        "split24-int8",
        12,
    )


# From one precision to another
# ------------------------------------------------------------------------------------------------


def close(got, want, states, weight_bits=24):
    """Equal to within one rounding to nearest of what `states` hold, and no second moment lost."""
    for x, y in zip(got, want, strict=True):
        assert x["step"] == y["step"]
        assert x.keys() == y.keys()
        if not y["weight"].numel():
            continue
        for key in y.keys() - {"step", "weight"}:
            error = (x[key] - y[key]).abs()
            if states == "fp32":
                assert torch.equal(x[key], y[key])
            elif states == "bf16" or key == "max_exp_avg_sq":
                assert (error <= y[key].abs() * 2**-8).all()
            else:
                assert within_int8(x, y)
        assert ((x["weight"] - y["weight"]).abs() <= y["weight"].abs() * 2.0**-weight_bits).all()


# A master weight halfway between two values of the parameter moves by its last place, 2^-23.
BITS = {"master32": 23, "split32": 24, "split24": 16, "sr": 8, "native": 8}


@every_recipe
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, FusedAdamW])
def test_an_fp32_checkpoint_loads_into_any_recipe(precision, optimizer_class):
    copies = [nn.Parameter(p.detach().float()) for p in parameters(BF16, SHAPES)]
    exact = optimizer_class(copies, amsgrad=True, **options)
    for step in range(3):
        for i, p in enumerate(copies):
            p.grad = values(p.shape, 10 * step + i, FP32)
        exact.step()
    dtype = dtype_of(precision)
    ours = FusedAdamW(
        [nn.Parameter(p.detach().to(dtype)) for p in copies], amsgrad=True, precision=precision
    )
    before = results(exact)
    ours.load_state_dict(through_a_file(exact.state_dict()))
    want = [{"weight": p.detach().to(dtype).float(), **exact.state[p]} for p in copies]
    close(decoded(ours), want, parse(precision).states)
    assert same_bits(results(exact), before)
    assert ours.param_groups[0]["lr"] == 1e-2 and ours.param_groups[0]["precision"] == precision
    train(ours, 1, first=3)
    for p in members(ours):
        assert ours.state[p].pop("step") == 4
        found = {key: (value.dtype, value.shape) for key, value in ours.state[p].items()}
        assert found == parse(precision).state(dtype, p.shape, True)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize(
    "source", ["master32", "split32-bf16", "split24-int8", "sr-bf16", "native-int8", "native"]
)
def test_from_any_recipe_to_any_other(source, target):
    first = trained(source, 3, SHAPES, dtype=BF16, amsgrad=True)
    second = successor(first, precision=target)
    second.load_state_dict(through_a_file(first.state_dict()))
    got, want = parse(target), parse(source)
    states = "fp32" if got.states == want.states == "bf16" else got.states
    close(decoded(second), decoded(first), states, BITS[got.weights])
    train(second, 1, first=3)
    assert all(second.state[p]["step"] == 4 for p in members(second))


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        (None, FP32),
        ("native-bf16", FP32),
        (None, FP16),
        ("master32", FP16),
        (None, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("source", ["split32", "split24", "split24-bf16", "split32-int8"])
def test_remainders_complete_no_weight_of_another_dtype(source, target, dtype):
    """A model that is trained on in another dtype: moments go on, its weights are its own."""
    saved = trained(source, 2, SHAPES)
    exported = saved.export_fp32()["state"]["state"]
    other = FusedAdamW(parameters(dtype, SHAPES), precision=target, **options)
    train(other, 1)
    other.load_state_dict(saved.state_dict())
    for number, param in enumerate(members(other)):
        entry = other.state[param]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[key], exported[number][key].to(entry[key].dtype))
        assert "remainder" not in entry
    train(other, 1, first=2)
    assert all(param.isfinite().all() for param in members(other))
    if target == "master32":
        assert all(map(torch.equal, [w.half() for w in weights(other)], members(other)))


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_split32_and_master32_exchange_exactly(states):
    """There and back again, in mid-training: the weights go on as if nothing had been changed."""
    plain = trained(f"split32-{states}", 3, SHAPES)
    there = successor(plain, precision=f"master32-{states}")
    there.load_state_dict(plain.state_dict())
    back = successor(there, precision=f"split32-{states}")
    back.load_state_dict(there.state_dict())
    for optimizer in (plain, there, back):
        train(optimizer, 2, first=3)
    want = decoded(plain)
    for optimizer in (there, back):
        assert same_bits(
            [{"w": x["weight"]} for x in decoded(optimizer)], [{"w": x["weight"]} for x in want]
        ) or (states == "int8")
        if states == "fp32":
            assert same_bits(decoded(optimizer), want)


@pytest.mark.parametrize(("source", "tie"), [("split24", -128), ("split32", -(2**15))])
def test_weights_halfway_between_two_values_keep_their_remainder(source, tie):
    """A split weight shows the one away from zero, and a master weight would round to the even."""
    split = trained(source, 1, [(8,)])
    [p] = members(split)
    with torch.no_grad():
        p.copy_(torch.tensor([1.0078125, -1.0078125]).repeat(4))
    split.state[p]["remainder"].fill_(tie)
    master = successor(split, precision="master32")
    master.load_state_dict(split.state_dict())
    [weight], [expected] = weights(master), weights(split)
    assert torch.equal(expected, torch.tensor([1.00390625, -1.00390625]).repeat(4))
    assert ((weight - expected).abs() <= 2.0**-23).all()


def test_loading_into_a_running_optimizer_of_another_recipe():
    source, running = trained("split32-bf16", 3, SHAPES), trained("split24-int8", 5, SHAPES)
    fresh = successor(source, precision="split24-int8")
    for p, q in zip(members(running), members(source), strict=True):
        p.data.copy_(q)
    for optimizer in (running, fresh):
        optimizer.load_state_dict(source.state_dict())
        train(optimizer, 2, first=3)
    assert same_bits(results(running), results(fresh))


# Out to float32
# ------------------------------------------------------------------------------------------------


@every_recipe
def test_export_is_what_is_stored(precision):
    optimizer = trained(precision, 3, SHAPES, amsgrad=True)
    before = results(optimizer)
    exported = optimizer.export_fp32()
    assert list(exported["params"]) == [0, 1, 2, 3]
    assert all(
        "precision" not in group and "seed" not in group
        for group in exported["state"]["param_groups"]
    )
    for i, p in enumerate(members(optimizer)):
        weight, entry = exported["params"][i], exported["state"]["state"][i]
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        assert all(
            value.dtype == FP32 and value.shape == p.shape
            for key, value in entry.items()
            if key != "step"
        )
        assert weight.dtype == FP32 and weight.shape == p.shape
        held = optimizer.state[p]
        if "master_weight" in held:
            assert torch.equal(weight, held["master_weight"])
        elif "remainder" not in held:
            assert torch.equal(weight, p.detach().float())
        assert ((weight - p.detach().float()).abs() <= weight.abs() * 2**-8).all()
        if "exp_avg" in held:
            assert torch.equal(entry["exp_avg"], held["exp_avg"].float())
        for value in (weight, *entry.values()):
            value.fill_(7)
    assert same_bits(results(optimizer), before)


@pytest.mark.parametrize("precision", RECOMMENDED)
def test_training_goes_on_in_torch(precision):
    optimizer = trained(precision, 3, SHAPES)
    exported = through_a_file(optimizer.export_fp32())
    theirs = torch.optim.AdamW([nn.Parameter(w) for w in exported["params"].values()], **options)
    theirs.load_state_dict(exported["state"])
    for i, (p, q) in enumerate(zip(members(theirs), members(optimizer), strict=True)):
        assert theirs.state[p]["exp_avg"].dtype == FP32 and theirs.state[p]["step"] == 3
        p.grad = values(p.shape, 4000 + i, q.dtype).float()
    theirs.step()
    train(optimizer, 1, first=3)
    exact = precision in ("split32", "master32")
    for p, weight in zip(members(theirs), weights(optimizer), strict=True):
        torch.testing.assert_close(
            p.detach(), weight, rtol=1e-6 if exact else 1e-2, atol=1e-6 if exact else 1e-2
        )


@pytest.mark.parametrize("precision", ["split32-bf16", "master32", "native-int8", None])
def test_export_before_the_first_step_and_with_names(precision):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(
        BF16 if precision != "native-int8" else FP32
    )
    optimizer = FusedAdamW(model.named_parameters(), precision=precision)
    exported = optimizer.export_fp32()
    assert exported["state"]["state"] == {}
    assert exported["params"].keys() == model.state_dict().keys()
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    other.load_state_dict(exported["params"])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.float(), q)
    torch.optim.AdamW(other.named_parameters()).load_state_dict(exported["state"])


def test_export_without_a_recipe():
    """Complex parameters keep both parts."""
    params = [nn.Parameter(torch.tensor([1 + 2j, 3 - 1j])), nn.Parameter(torch.ones(3, dtype=FP16))]
    optimizer = FusedAdam(params)
    for p in params:
        p.grad = torch.ones_like(p) * (1 if p.dtype == FP16 else 1j)
    optimizer.step()
    exported = optimizer.export_fp32()
    assert torch.equal(exported["params"][0], params[0].detach())
    entry = exported["state"]["state"][0]
    assert (
        torch.equal(entry["exp_avg"], optimizer.state[params[0]]["exp_avg"])
        and entry["exp_avg"].imag.all()
    )
    assert exported["params"][1].dtype == exported["state"]["state"][1]["exp_avg"].dtype == FP32


def test_export_of_what_a_user_wrote():
    """As the next step will see it."""
    optimizer = trained("master32", 2, [(8,)])
    members(optimizer)[0].data[3] = 5.0
    weight = weights(optimizer)[0]
    assert weight[3] == 5.0 and torch.equal(
        weight[:3], optimizer.state[members(optimizer)[0]]["master_weight"][:3]
    )


def test_export_keeps_weights_apart_that_have_one_name():
    """As two models in one optimizer have: those come by position."""
    models = nn.Linear(2, 3), nn.Linear(3, 4, bias=False)
    optimizer = FusedAdam([{"params": list(model.named_parameters())} for model in models])
    exported = optimizer.export_fp32()["params"]
    assert list(exported) == [0, "bias", 2]
    assert torch.equal(exported[0], models[0].weight) and torch.equal(exported[2], models[1].weight)
