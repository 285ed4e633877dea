"""param_groups: parameters of norms do not decay, whatever their class is called, nor do those that
are marked.
"""

import pytest
import torch
from decay import decayed
from torch import nn

from fused_adam import param_groups


def with_params(name, base=nn.Module, arguments=(), **shapes):
    """A module of a class of this name, with parameters of its own."""
    module = type(name, (base,), {})(*arguments)
    for key, shape in shapes.items():
        setattr(module, key, nn.Parameter(torch.ones(shape)))
    return module


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
