"""Checkpoints of precision recipes that do not fit: refused before anything changes."""

import copy

import pytest
import torch
from recipes import members, train, trained
from training import results, same_bits

SHAPES = [(), (40,), (5, 13), (0, 3)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "exp_avg_ratio",
            torch.zeros(3, dtype=torch.int8),
            r"'exp_avg_ratio' of parameter 1 has shape \(3,\).*\(40,\)",
        ),
        (
            "exp_avg_ratio_scale",
            torch.zeros(3),
            r"'exp_avg_ratio_scale' of parameter 1 has shape \(3,\).*\(2,\)",
        ),
        (
            "exp_avg_ratio_scale",
            None,
            "state of parameter 1 has 'step', .*, but lacks 'exp_avg_ratio_scale'",
        ),
        ("exp_avg_ratio", None, "state of parameter 1 has 'step', .*, but lacks 'exp_avg_ratio'"),
        (
            "remainder",
            torch.zeros(40, dtype=torch.int16),
            "'remainder' of parameter 1 has dtype torch.int16, .* stores",
        ),
        (
            "exp_avg_ratio",
            torch.zeros(40),
            "'exp_avg_ratio' of parameter 1 has dtype torch.float32, .* torch.int8",
        ),
        (
            "exp_avg",
            torch.zeros(40),
            "state of parameter 1 has 'exp_avg', which its precision does not store",
        ),
        (
            "master_weight",
            torch.zeros(40),
            "state of parameter 1 has 'master_weight', which its precision does not",
        ),
        ("remainder", "x", "'remainder' of parameter 1 has str"),
    ],
)
@pytest.mark.parametrize("target", ["split24-int8", "split32-bf16"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(target, key, value, message):
    checkpoint = copy.deepcopy(trained("split24-int8", 3, SHAPES).state_dict())
    running = trained(target, 1, SHAPES)
    before, groups = results(running), copy.deepcopy(running.state_dict()["param_groups"])
    if value is None:
        del checkpoint["state"][1][key]
    else:
        checkpoint["state"][1][key] = value
    with pytest.raises(ValueError, match=message):
        running.load_state_dict(checkpoint)
    assert same_bits(results(running), before) and running.state_dict()["param_groups"] == groups


def companded(checkpoint):
    """8-bit moments as they were before codes became ratios and lattice steps."""
    names = {
        "exp_avg_ratio": "exp_avg_code",
        "exp_avg_sq_lattice": "exp_avg_sq_code",
        "exp_avg_ratio_scale": "exp_avg_scale",
        "exp_avg_sq_lattice_scale": "exp_avg_sq_scale",
    }
    for entry in checkpoint["state"].values():
        for new, old in names.items():
            entry[old] = entry.pop(new)
    return checkpoint


@pytest.mark.parametrize("target", ["split24-int8", "split32-bf16", "native-fp32"])
def test_8_bit_moments_of_an_earlier_version_are_refused_by_name(target):
    """They have the same shapes and dtypes, and would be misread."""
    checkpoint = companded(copy.deepcopy(trained("split24-int8", 3, SHAPES).state_dict()))
    running = trained(target, 1, SHAPES)
    before = results(running)
    with pytest.raises(
        ValueError,
        match=r"state of parameter 0 has 'exp_avg_code': 8-bit moments of an earlier fused-adam, "
        r".* load the checkpoint with that version, and save optimizer.export_fp32\(\)\['state'\]",
    ):
        running.load_state_dict(checkpoint)
    assert same_bits(results(running), before)


def test_8_bit_moments_of_an_earlier_version_put_into_the_state_are_refused():
    """As an optimizer unpickled from then has them."""
    optimizer = trained("split24-int8", 1, [(40,)])
    [p] = members(optimizer)
    optimizer.state[p]["exp_avg_code"] = optimizer.state[p].pop("exp_avg_ratio").clone()
    with pytest.raises(ValueError, match=r"state of parameter 0 .*has 'exp_avg_code': 8-bit"):
        train(optimizer, 1, first=1)


def test_a_checkpoint_of_an_unknown_precision_or_seed():
    checkpoint = trained("split24-int8", 1, SHAPES).state_dict()
    running = trained("split24-int8", 2, SHAPES)
    before = results(running)
    for key, value, message in (
        ("precision", "split16", "is no recipe"),
        ("seed", -1, "seed=-1 must be a whole number"),
    ):
        spoiled = copy.deepcopy(checkpoint)
        spoiled["param_groups"][0][key] = value
        with pytest.raises(ValueError, match=message):
            running.load_state_dict(spoiled)
        assert same_bits(results(running), before)


def test_an_entry_made_by_hand_must_fit_too():
    optimizer = trained("split24-int8", 1, [(40,)])
    [p] = members(optimizer)
    optimizer.state[p]["exp_avg_sq_lattice"] = torch.zeros(40)
    with pytest.raises(
        ValueError, match=r"'exp_avg_sq_lattice' of parameter 0 .* has dtype torch.float32"
    ):
        train(optimizer, 1, first=1)
    optimizer.state[p] = {}
    train(optimizer, 1)
    assert optimizer.state[p]["step"] == 1
