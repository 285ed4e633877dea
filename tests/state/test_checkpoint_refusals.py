"""Checkpoints that do not fit or cannot be copied: refused before anything changes."""

import copy

import pytest
import torch
from training import parameters, results, same_bits, train

from fused_adam import FusedAdam

SHAPES = [(5,), (3, 4), (), (200,)]


def replaced(key, make):
    """A change of one tensor of parameter 3."""
    return lambda checkpoint: checkpoint["state"][3].update(
        {key: make(checkpoint["state"][3][key])}
    )


# Tensors of the right shape whose values cannot be copied: half of a load would be done before
# torch says so.
UNREADABLE = [
    (replaced(key, make), f"'{key}' of parameter 3 is a {got}")
    for key in ("exp_avg", "exp_avg_sq")
    for make, got in (
        (torch.Tensor.to_sparse, "torch.sparse_coo tensor"),
        (lambda t: t.to("meta"), "torch.strided tensor of torch.float32 on meta"),
        (lambda t: t.to(torch.complex64), "torch.strided tensor of torch.complex64"),
    )
]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: d["param_groups"].append({"params": []}),
            "different number of parameter groups",
        ),
        (
            lambda d: d["param_groups"][0]["params"].pop(),
            "doesn't match the size of optimizer's group",
        ),
        (
            lambda d: d["state"][3].update(exp_avg=torch.zeros(7)),
            r"'exp_avg' of parameter 3 has shape \(7,\).*\(200,\)",
        ),
        (lambda d: d["state"][3].update(exp_avg_sq="x"), "'exp_avg_sq' of parameter 3 has str"),
        (
            lambda d: d["state"][3].update(step=torch.zeros(2)),
            "'step' of parameter 3 .* one real number",
        ),
        (lambda d: d["state"][3].update(step=-1.0), "'step' of parameter 3 is -1.0, .* >= 0"),
        (
            lambda d: d["state"][3].update(step=torch.tensor(float("nan"))),
            "'step' of parameter 3 is nan",
        ),
        (lambda d: d["state"][3].update(step=float("inf")), "'step' of parameter 3 is inf"),
        (
            lambda d: d["state"][3].update(step="3"),
            "'step' of parameter 3 is '3', .* one real number",
        ),
        (
            lambda d: d["state"][3].update(step=torch.tensor(0.0, device="meta")),
            "'step' of parameter 3 .* real number",
        ),
        (lambda d: d["state"].update({3: 5}), "state of parameter 3 is int"),
        *UNREADABLE,
        (lambda d: d.clear(), "no 'param_groups'.* keys: none"),
        (lambda d: d.pop("state"), "no 'state'.* keys: 'param_groups'"),
        (lambda d: d.update(state=[1]), r"\['state'\] is list, but must be a dict"),
        (
            lambda d: d.update(param_groups={"lr": 1}),
            r"\['param_groups'\] is dict, but must be a list",
        ),
        (lambda d: d.update(param_groups=[3]), r"param_groups\[0\] .* is int"),
        (
            lambda d: d["param_groups"][0].update(params=3),
            "'params' in .* list of numbers or names, but is 3",
        ),
        (
            lambda d: d["param_groups"][0].update(params=[[i] for i in range(4)]),
            "'params' in .* list of numbers or",
        ),
        *(
            (
                lambda d, key=key: d["param_groups"][0].pop(key),
                rf"param_groups\[0\] .* has no '{key}'",
            )
            for key in ("params", "lr", "betas", "eps", "weight_decay")
        ),
        (
            lambda d: d["param_groups"][0].update(lr="fast"),
            "'lr' in .* must be a number, but is 'fast'",
        ),
        (
            lambda d: d["param_groups"][0].update(betas=(0.9,)),
            r"'betas' in .* two numbers, but is \(0.9,\)",
        ),
        (
            lambda d: d["param_groups"][0].update(betas=None),
            "'betas' in .* two numbers, but is None",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(spoil, message):
    a, b = (FusedAdam(parameters(torch.float32, SHAPES)) for _ in range(2))
    train(a, 3)
    train(b, 1)
    before, groups = results(b), copy.deepcopy(b.state_dict()["param_groups"])
    checkpoint = copy.deepcopy(a.state_dict())
    spoil(checkpoint)
    with pytest.raises(ValueError, match=message):
        b.load_state_dict(checkpoint)
    assert same_bits(results(b), before) and b.state_dict()["param_groups"] == groups


class Stubborn:
    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


def test_an_entry_that_cannot_be_copied_changes_nothing():
    a, b = (FusedAdam(parameters(torch.float32, SHAPES)) for _ in range(2))
    train(a, 3)
    train(b, 1)
    before = results(b)
    checkpoint = a.state_dict()
    checkpoint["state"][3]["mine"] = Stubborn()
    with pytest.raises(RuntimeError, match="one of a kind"):
        b.load_state_dict(checkpoint)
    assert same_bits(results(b), before)
