"""param_groups: what decays and what does not, names, ties, frozen parameters; through FusedAdamW
and torch's AdamW.
"""

import numpy
import pytest
import torch
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


def with_params(name, base=nn.Module, arguments=(), **shapes):
    """A module of a class of this name, with parameters of its own."""
    module = type(name, (base,), {})(*arguments)
    for key, shape in shapes.items():
        setattr(module, key, nn.Parameter(torch.ones(shape)))
    return module


def decayed(module):
    """Names of the parameters that decay."""
    return [
        name
        for group in param_groups(module, 0.1)
        if group["weight_decay"]
        for name, _ in group["params"]
    ]


@pytest.mark.parametrize(
    ("name", "shapes", "matrices"),
    [
        # TransformerEngine's names.
        (
            "LayerNormLinear",
            {"layer_norm_weight": (4,), "layer_norm_bias": (4,), "weight": (8, 4)},
            ["weight"],
        ),
        (
            "LayerNormMLP",
            {
                "layer_norm_weight": (4,),
                "fc1_weight": (8, 4),
                "fc1_bias": (8,),
                "fc2_weight": (4, 8),
            },
            ["fc1_weight", "fc2_weight"],
        ),
        ("LayerNormLinear", {"layer_norm_weight": (2, 2), "weight": (8, 4)}, ["weight"]),
        ("NormLinear", {"weight": (4, 3)}, ["weight"]),
        ("NormLinear", {"weight": (1, 3)}, ["weight"]),
        (
            "NormConv2d",
            {"weight": (4, 3, 3, 3), "beta": (1, 4, 1, 1), "gamma": (1, 4, 1, 1)},
            ["weight"],
        ),
        ("SpectralNorm", {"weight_bar": (4, 3), "bias": (4,)}, ["weight_bar"]),
        ("Spectral_Norm", {"weight_orig": (4, 3)}, ["weight_orig"]),
        ("WeightNorm", {"weight_v": (4, 3)}, ["weight_v"]),
        ("ConvNorm", {"weight": (4, 3, 3)}, ["weight"]),
        ("Conv2dNorm", {"weight": (4, 3, 3, 3)}, ["weight"]),
        ("LinearNorm", {"weight": (4, 3)}, ["weight"]),
        ("PreNormBlock", {"qkv": (12, 4), "norm_weight": (4,)}, ["qkv"]),
        ("RobertaPreLayerNormLMHead", {"decoder": (4, 3)}, ["decoder"]),
        ("LayerNormConvLayer", {"kernel": (4, 3, 3)}, ["kernel"]),
        ("NormFreeBlock", {"w": (4, 3)}, ["w"]),
        ("NormedEmbedding", {"table": (7, 3)}, ["table"]),
        ("NormEMAVectorQuantizer", {"codes": (7, 3)}, ["codes"]),
        ("Normal", {"covariance": (3, 3)}, ["covariance"]),
        ("MLP", {"prenorm_matrix": (3, 3), "upscale": (3, 3)}, ["prenorm_matrix", "upscale"]),
    ],
)
def test_matrices_decay_in_classes_whose_name_has_norm_in_it(name, shapes, matrices):
    assert decayed(with_params(name, **shapes)) == matrices


@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1), (4, 1, 1), (2, 2)])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "LayerNorm",
            "LayerNorm2d",
            "LayerNorm2dFp32",
            "LayerNormFp32",
            "LayerNormAct2d",
            "LayerNorm_channels_first",
        ),
        *(
            "RMSNorm",
            "LlamaRMSNorm",
            "RMSNormGated",
            "HunyuanVideo15RMS_norm",
            "AutoformerLayernorm",
            "BatchNormAct2d",
        ),
        *(
            "GroupNorm1",
            "GroupNorm1NoBias",
            "NemotronLayerNorm1P",
            "EvoNorm2D",
            "FP32LayerNorm",
            "LayerNormalization",
        ),
        *(
            "ConvNextLayerNorm",
            "KimiLinearRMSNorm",
            "PatchTSMixerBatchNorm",
            "ConvNextV2GRN",
            "ActNorm",
            "_BatchNorm",
        ),
    ],
)
def test_scales_and_shifts_of_norms_do_not_decay_whatever_their_shape(name, shape):
    assert decayed(with_params(name, weight=shape, anything=shape)) == []


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(
            ("gamma", (1, 1, 1, 4)),
            ("beta", (1, 1, 1, 4)),
            ("gamma_1", (4, 1, 1)),
            ("gamma2", (4, 1, 1)),
        ),
        *(
            ("layer_scale_1", (4, 1, 1)),
            ("scale_shift_table", (6, 4)),
            ("q_norm", (2, 4)),
            ("norm_weight", (2, 4)),
        ),
        *(("relative_position_bias_table", (9, 2)), ("bias1", (1, 4)), ("in_proj_bias", (1, 4))),
    ],
)
def test_a_scale_or_shift_says_so_in_any_class(name, shape):
    assert decayed(with_params("GRNBlock", weight=(4, 4), **{name: shape})) == ["weight"]


def test_a_layer_of_torch_is_no_norm_whatever_its_class_is_called():
    assert decayed(with_params("UnitNorm", nn.Linear, (4, 3))) == ["weight"]
    assert decayed(with_params("FilterNorm", nn.Conv2d, (4, 3, 3))) == ["weight"]

    class Both(with_params("LayerNormMixin").__class__, nn.Linear):
        pass

    assert decayed(Both(4, 3)) == ["weight"]


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


def test_a_parameter_may_be_marked():
    module = with_params("Mamba", A_log=(4, 3), D=(4, 3), x_proj=(4, 3))
    module.A_log._no_weight_decay = True
    module.D._no_weight_decay = False
    assert decayed(module) == ["D", "x_proj"]


class Vit(nn.Module):
    """Says what does not decay as timm's models do; `marks` is what its method returns."""

    def __init__(self, marks):
        super().__init__()
        self.marks = marks
        self.pos_embed = nn.Parameter(torch.ones(1, 5, 4))
        self.rope = nn.Sequential(nn.Linear(4, 4, bias=False))
        self.head = nn.Linear(4, 3, bias=False)

    @torch.jit.ignore
    def no_weight_decay(self):
        return self.marks


@pytest.mark.parametrize(
    ("marks", "left"),
    [
        ({"pos_embed", "cls_token"}, ["rope.0.weight", "head.weight"]),
        (["pos_embed"], ["rope.0.weight", "head.weight"]),
        (("pos_embed", "head.weight"), ["rope.0.weight"]),
        ({"pos_embed": 1}, ["rope.0.weight", "head.weight"]),
        ("pos_embed", ["rope.0.weight", "head.weight"]),
        ({"rope.*"}, ["pos_embed", "head.weight"]),
        ({"rope"}, ["pos_embed", "head.weight"]),
        ({"*.weight"}, ["pos_embed"]),
        (set(), ["pos_embed", "rope.0.weight", "head.weight"]),
        (None, ["pos_embed", "rope.0.weight", "head.weight"]),
        (
            {"embed", "ope", "0.weight"},
            ["pos_embed", "rope.0.weight", "head.weight"],
        ),  # whole names only
    ],
)
def test_a_module_may_name_what_does_not_decay(marks, left):
    assert decayed(Vit(marks)) == left
    # Names are relative to the module that returns them.
    assert decayed(nn.Sequential(nn.Linear(2, 2), Vit(marks))) == [
        "0.weight",
        *(f"1.{name}" for name in left),
    ]


def test_what_a_module_names_must_be_names():
    with pytest.raises(TypeError, match="no_weight_decay of Vit has 3, but must have names"):
        param_groups(Vit({3}), 0.1)


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
