"""param_groups: what decays and what does not, names, ties, frozen parameters; through FusedAdamW
and torch's AdamW. Norms and marks are in test_norms_and_marks.py.
"""

import numpy
import pytest
import torch
from decay import decayed
from torch import nn
from training import results, same_bits, train

from fused_adam import FusedAdamW, param_groups


class LlamaRMSNorm(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class Mine(LlamaRMSNorm):
    """Derives from a norm, and does not say so."""


class NormalizedLinear(nn.Linear):
    """Normalises what it is given, and is no norm."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 4)
        self.norms = nn.ModuleList(
            [nn.LayerNorm((2, 2)), nn.RMSNorm((2, 2)), nn.GroupNorm(1, 4), nn.BatchNorm1d(4)]
        )
        self.own = LlamaRMSNorm(4, 2)
        self.mine = Mine(4, 2)
        self.linear = NormalizedLinear(4, 3)
        self.attention = nn.MultiheadAttention(4, 1, add_bias_kv=True)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 7, bias=False)


def names(groups):
    return [[name for name, _ in group["params"]] for group in groups]


def test_matrices_decay_and_nothing_else():
    groups = param_groups(Model(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, others = names(groups)
    assert decayed == [
        "embedding.weight",
        "first.weight",
        "linear.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    ]
    assert others == [
        *(
            "scale",
            "first.bias",
            "norms.0.weight",
            "norms.0.bias",
            "norms.1.weight",
            "norms.2.weight",
            "norms.2.bias",
        ),
        "norms.3.weight",
        "norms.3.bias",
        "own.weight",
        "mine.weight",
        "linear.bias",
        *(
            "attention.in_proj_bias",
            "attention.bias_k",
            "attention.bias_v",
            "attention.out_proj.bias",
        ),
    ]
    assert names(param_groups(Model(), 0.1)) == names(groups)  # another model, the same order


def test_parametrizations_change_nothing():
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    assert decayed(linear) == ["parametrizations.weight.original"]
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    assert decayed(linear) == [
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    ]
    assert decayed(nn.utils.parametrizations.orthogonal(NormalizedLinear(4, 4))) == [
        "parametrizations.weight.original"
    ]
    norm = nn.LayerNorm((2, 2))
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    assert list(dict(norm.named_parameters())) == ["bias", "parametrizations.weight.original"]
    assert decayed(norm) == []


def test_dtypes_may_be_split():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[0].bfloat16()
    groups = param_groups(model, 0.1, split_dtypes=True)
    assert names(groups) == [
        ["0.weight"],
        ["2.weight"],
        ["0.bias"],
        ["1.weight", "1.bias", "2.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0, 0.0]
    for group in groups:
        group["precision"] = "split32" if group["params"][0][1].dtype == torch.bfloat16 else None
    optimizer = FusedAdamW(groups, lr=0.1)
    train(optimizer, 2)
    assert ["remainder" in optimizer.state[param] for param in model.parameters()] == [
        True,
        True,
        *[False] * 4,
    ]
    assert names(param_groups(model, 0.1)) == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias", "2.bias"],
    ]


def test_a_parameter_that_a_recipe_does_not_serve_is_named():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4))
    with pytest.raises(ValueError) as error:
        FusedAdamW(param_groups(model, 0.1), precision="split32")
    assert str(error.value) == (
        "precision='split32-fp32' is for bfloat16 parameters, and got one of float32 "
        "(parameter '1.weight' of param group 0): give each dtype param groups of its own, as "
        "param_groups(model, weight_decay, split_dtypes=True) does, and those of float32 another "
        "'precision', None for torch's semantics"
    )
    groups = [
        {"params": model[0].parameters()},
        {"params": [model[0].bias.clone().detach(), model[1].bias]},
    ]
    with pytest.raises(
        ValueError, match=r"one of float32 \(parameter 1 of param group 1\): give each dtype"
    ):
        FusedAdamW(groups, precision="split32")
    # The cure that the text names.
    groups = param_groups(model, 0.1, split_dtypes=True)
    for group in groups:
        if group["params"][0][1].dtype == torch.float32:
            group["precision"] = None
    optimizer = FusedAdamW(groups, precision="split32")
    assert [group["precision"] for group in optimizer.param_groups] == [
        "split32",
        None,
        "split32",
        None,
    ]


@pytest.mark.parametrize(
    "value", [numpy.float32(0.5), numpy.float64(0.5), numpy.array(0.5), numpy.array([0.5])]
)
def test_weight_decay_may_be_a_number_of_numpys(value):
    (group,) = param_groups(nn.Linear(4, 4, bias=False), value)
    assert group["weight_decay"] == 0.5 and type(group["weight_decay"]) is float


def test_each_parameter_is_taken_once():
    model = Model()
    taken = [param for group in param_groups(model, 0.1) for _, param in group["params"]]
    assert len(taken) == len(set(taken)) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_may_be_left_undecayed(kind):
    model = nn.Sequential(kind(7, 4), nn.Linear(4, 4, bias=False))
    assert names(param_groups(model, 0.1)) == [["0.weight", "1.weight"]]
    assert names(param_groups(model, 0.1, decay_embeddings=False)) == [["1.weight"], ["0.weight"]]


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_tied_weight_is_an_embedding_wherever_it_comes_first(embedding_first):
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(*((embedding, head) if embedding_first else (head, embedding)))
    assert names(param_groups(model, 0.1)) == [["0.weight"]]
    (group,) = param_groups(model, 0.1, decay_embeddings=False)
    assert group["weight_decay"] == 0 and names([group]) == [["0.weight"]]


def test_frozen_parameters_are_left_out_unless_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    assert names(param_groups(model, 0.1)) == [["1.weight"], ["1.bias"]]
    assert names(param_groups(model, 0.1, include_frozen=True)) == [
        ["0.weight", "1.weight"],
        ["0.bias", "1.bias"],
    ]


def test_an_empty_group_is_left_out():
    (group,) = param_groups(nn.Linear(4, 4, bias=False), 0.1)
    assert group["weight_decay"] == 0.1
    (group,) = param_groups(nn.LayerNorm(4), 0.1)
    assert group["weight_decay"] == 0


@pytest.mark.parametrize(
    ("error", "text", "model", "weight_decay"),
    [
        (TypeError, "model is a list", [], 0.1),
        (TypeError, "weight_decay='0.1' must be a number", nn.Linear(1, 1), "0.1"),
        (TypeError, "weight_decay=True must be a number", nn.Linear(1, 1), True),
        (TypeError, "weight_decay=array.* must be a number", nn.Linear(1, 1), numpy.ones(2)),
        (TypeError, "weight_decay=tensor.* must be a number", nn.Linear(1, 1), torch.ones(2)),
        (ValueError, "weight_decay=-0.1 must be at least 0", nn.Linear(1, 1), -0.1),
        (ValueError, "weight_decay=nan must be at least 0", nn.Linear(1, 1), float("nan")),
        (ValueError, "model has no parameters$", nn.ReLU(), 0.1),
        (
            ValueError,
            "no parameters that require gradients",
            nn.Linear(1, 1).requires_grad_(False),
            0.1,
        ),
        (ValueError, "'weight' of model has no shape yet", nn.LazyLinear(3), 0.1),
    ],
)
def test_errors(error, text, model, weight_decay):
    with pytest.raises(error, match=text):
        param_groups(model, weight_decay)


def test_the_optimizer_decays_the_first_group_alone():
    """With gradients of zero a step is the decay."""
    model = Model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    groups = param_groups(model, 0.5)
    decayed = set(names(groups)[0])
    optimizer = FusedAdamW(groups, lr=0.1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        same = torch.equal(param, before[name])
        # Some begin as zeros, which decay to zeros.
        assert same == (name not in decayed or not before[name].any())


@pytest.mark.parametrize("kind", [FusedAdamW, torch.optim.AdamW])
def test_state_dicts_carry_names_and_load(kind):
    def make():
        torch.manual_seed(0)
        return kind(param_groups(Model(), 0.1, decay_embeddings=False), lr=0.01)

    whole, half, rest = make(), make(), make()
    train(whole, 4)
    train(half, 2)
    saved = half.state_dict()
    assert [group["param_names"] for group in saved["param_groups"]] == names(
        param_groups(Model(), 0.1, decay_embeddings=False)
    )
    for param, other in zip(
        (p for group in rest.param_groups for p in group["params"]),
        (p for group in half.param_groups for p in group["params"]),
        strict=True,
    ):
        param.data.copy_(other.data)
    rest.load_state_dict(saved)
    train(rest, 2, first=2)
    assert same_bits(results(whole), results(rest))


def test_exports_carry_names():
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    optimizer = FusedAdamW(param_groups(model, 0.1), precision="split32")
    train(optimizer, 1)
    assert list(optimizer.export_fp32()["params"]) == ["weight", "bias"]
