"""Precision recipes: what is refused, by name and before anything changes."""

import pytest
import torch
from recipes import FP32, members, parameters, train, trained
from torch import nn
from training import results, same_bits

from fused_adam import FusedAdamW


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"precision": "splt32-bf16"},
            ValueError,
            "precision='splt32-bf16' is no recipe; did you mean 'split32-bf16'",
        ),
        ({"precision": 32}, TypeError, "precision=32 must be the name of a recipe, or None"),
        (
            {"precision": "split32"},
            ValueError,
            "precision='split32-fp32' is for bfloat16 .* and got one of float32",
        ),
        (
            {"precision": "master32-bf16"},
            ValueError,
            "is for float16 or bfloat16 parameters, and got one of float32",
        ),
        (
            {"precision": "native-bf16", "backend": "compiled"},
            ValueError,
            "precision='native-bf16' cannot be combined with backend='compiled'",
        ),
        (
            {"precision": "native-bf16", "differentiable": True},
            ValueError,
            "precision='native-bf16' cannot be combined with differentiable=True",
        ),
        ({"seed": -1}, ValueError, r"seed=-1 must be a whole number from 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, ValueError, "seed=9223372036854775808 must be a whole number"),
        ({"seed": 1.0}, ValueError, "seed=1.0 must be a whole number"),
        ({"seed": True}, ValueError, "seed=True must be a whole number"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        FusedAdamW([nn.Parameter(torch.zeros(3))], **options)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"precision": "sr16"}, ValueError, "precision='sr16' is no recipe; did you mean 'sr"),
        ({"precision": ["sr"]}, TypeError, "must be the name of a recipe"),
        (
            {"precision": "split24-int8"},
            ValueError,
            "precision='split24-int8' is for bfloat16 .* one of float32",
        ),
        ({"precision": "native-int8", "seed": -5}, ValueError, "seed=-5 must be a whole number"),
    ],
)
def test_a_bad_group_changes_nothing(group, error, message):
    optimizer = trained("split32-bf16", 1)
    before = results(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], **group})
    assert len(optimizer.param_groups) == 1 and same_bits(results(optimizer), before)
    train(optimizer, 1, first=1)
    assert same_bits(results(optimizer), results(trained("split32-bf16", 2)))


def test_a_group_of_another_dtype_may_have_its_own_recipe():
    optimizer = trained("split32-bf16", 1)
    optimizer.add_param_group({"params": parameters(FP32, [(40,)]), "precision": None})
    optimizer.add_param_group(
        {"params": parameters(FP32, [(40,)]), "precision": "native-int8", "seed": 3}
    )
    train(optimizer, 1, first=1)
    plain, coded = (optimizer.state[p] for p in members(optimizer)[-2:])
    assert (
        list(plain) == ["step", "exp_avg", "exp_avg_sq"]
        and coded["exp_avg_ratio"].dtype == torch.int8
    )


def test_another_recipe_in_mid_training_is_refused_where_bits_would_be_lost():
    for old, new in (
        ("split32", "split24"),
        ("split32", "sr"),
        ("sr-int8", "sr-bf16"),
        ("master32", "split32"),
    ):
        optimizer = trained(old, 1)
        before = results(optimizer)
        optimizer.param_groups[0]["precision"] = new
        with pytest.raises(ValueError, match=r"precision (does not store|stores)"):
            train(optimizer, 1, first=1)
        assert same_bits(results(optimizer), before)
        optimizer.param_groups[0]["precision"] = old
        train(optimizer, 1, first=1)
        assert same_bits(results(optimizer), results(trained(old, 2)))


def test_a_model_cast_in_mid_training_is_refused():
    optimizer = trained("split32", 1, [(5,)])
    [p] = members(optimizer)
    p.data = p.data.float()
    p.grad = torch.ones(5)
    with pytest.raises(
        ValueError,
        match="precision='split32-fp32' is for bfloat16 parameters, and got one of float32",
    ):
        optimizer.step()
