"""Moments that a hook or a user puts into `optimizer.state` before the first step keep their
dtype.
"""

import copy
import pickle

import pytest
import torch
from recipes import parameters, train
from training import results, same_bits

from fused_adam import FusedAdamW

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def fill(optimizer, dtype):
    """Empty moments of this dtype for every parameter that has none, as torchtitan makes them."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param, dtype=dtype),
                    "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
                }


def make(dtype, moments=None, **options):
    optimizer = FusedAdamW(parameters(dtype), lr=1e-2, **options)
    if moments is not None:
        optimizer.register_step_pre_hook(lambda self, *_: fill(self, moments))
    return optimizer


def dtypes_of(optimizer):
    entries = optimizer.state.values()
    return {entry[key].dtype for entry in entries for key in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("dtype", "moments", "precision"),
    [(FP32, BF16, "native-bf16"), (FP16, BF16, "native-bf16"), (BF16, FP32, "native-fp32")],
    ids=str,
)
def test_a_step_has_the_bits_of_the_recipe(dtype, moments, precision, backend):
    by_hook, by_name = make(dtype, moments, backend=backend), make(dtype, precision=precision)
    for optimizer in (by_hook, by_name):
        train(optimizer, 3)
    assert same_bits(results(by_hook), results(by_name))
    assert dtypes_of(by_hook) == {moments}
    assert by_hook.param_groups[0]["precision"] == precision


def test_init_state_keeps_them():
    optimizer = make(FP32)
    fill(optimizer, BF16)
    optimizer.init_state()
    assert dtypes_of(optimizer) == {BF16}


def test_saved_and_resumed():
    whole, first, rest = (make(FP32, BF16) for _ in range(3))
    train(whole, 4)
    train(first, 2)
    fill(rest, BF16)
    rest.init_state()
    rest.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for mine, its in zip(
        first.param_groups[0]["params"], rest.param_groups[0]["params"], strict=True
    ):
        its.data.copy_(mine.detach())
    train(rest, 2, first=2)
    assert same_bits(results(rest), results(whole))
    assert dtypes_of(rest) == {BF16}


def test_copies_keep_them():
    optimizer = make(FP32, BF16)
    train(optimizer, 1)
    twin = copy.deepcopy(optimizer)
    train(twin, 1, first=1)
    assert dtypes_of(twin) == {BF16}


# --- Where they do not decide


def test_a_precision_that_was_asked_for_decides():
    optimizer = make(FP32, BF16, precision="native-fp32")
    train(optimizer, 1)
    assert dtypes_of(optimizer) == {FP32}


def test_a_model_that_changes_its_dtype_takes_its_moments_along():
    optimizer = make(BF16)
    train(optimizer, 1)
    for param in optimizer.param_groups[0]["params"]:
        param.grad, param.data = None, param.data.float()
    train(optimizer, 1, first=1)
    assert dtypes_of(optimizer) == {FP32}
    assert "precision" not in optimizer.param_groups[0]


@pytest.mark.parametrize("moments", [FP32, torch.float64], ids=str)
def test_moments_that_no_recipe_stores_become_the_parameters(moments):
    optimizer = make(FP32, moments)
    train(optimizer, 1)
    assert dtypes_of(optimizer) == {FP32}
    assert "precision" not in optimizer.param_groups[0]


def test_groups_decide_apart_and_as_a_whole():
    """A group of two kinds of moments has no recipe for both."""
    first, second, third, fourth = parameters(FP32)
    optimizer = FusedAdamW([{"params": [first, second]}, {"params": [third, fourth]}])
    fill(optimizer, BF16)
    optimizer.state[fourth] = {key: value.float() for key, value in optimizer.state[fourth].items()}
    train(optimizer, 1)
    assert [group.get("precision") for group in optimizer.param_groups] == ["native-bf16", None]
    assert optimizer.state[third]["exp_avg"].dtype == FP32
