"""Recipe names, the parameters they serve, and what they cost."""

import pytest
import torch

from fused_adam import precision
from fused_adam.numerics import codecs
from fused_adam.precision import Recipe, parse

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def test_names():
    assert parse("split32-bf16") == Recipe("split32", "bf16")
    assert parse("split32") == parse("split32-fp32") == Recipe("split32", "fp32")
    assert parse(None) == Recipe(None, None)
    assert parse(None).name is None
    for name in precision.NAMES:
        assert parse(name).name == name
    assert len(precision.NAMES) == 15


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("split23", "split32"),
        ("splt32-bf16", "split32-bf16"),
        ("SPLIT32", "split32"),
        ("split32_bf16", "split32-bf16"),
        ("sr-bf61", "sr-bf16"),
        ("master", "master32"),
        ("native-int4", "native-int8"),
        ("split32-fp16", "split32-bf16"),
        (" Split32 ", "split32"),
        ("split32-", "split32"),
        ("split32-bf16-", "split32-bf16"),
        # States alone: weights stay in the parameter's dtype.
        ("bf16", "native-bf16"),
        ("-bf16", "native-bf16"),
        ("fp32", "native-fp32"),
        ("INT8", "native-int8"),
        ("bfloat16", "native-bf16"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong, nearest):
    with pytest.raises(ValueError) as error:
        parse(wrong)
    assert str(error.value) == (
        f"precision={wrong!r} is no recipe; did you mean {nearest!r}? "
        "A name is '<weights>-<states>', "
        "with weights of native, master32, split32, split24, sr and states of fp32, bf16, int8; "
        "None stores everything as torch does"
    )


@pytest.mark.parametrize(
    "wrong", ["", " ", "-", "8bit", "mixed", "O2", "none", "x" * 99, "\n", "é"]
)
def test_nothing_is_suggested_for_what_is_close_to_no_name(wrong):
    with pytest.raises(ValueError) as error:
        parse(wrong)
    assert str(error.value) == (
        f"precision={wrong!r} is no recipe. A name is '<weights>-<states>', "
        "with weights of native, master32, split32, split24, sr and states of fp32, bf16, int8; "
        "None stores everything as torch does"
    )


@pytest.mark.parametrize("wrong", [32, True, torch.bfloat16, ("split32", "bf16")])
def test_only_strings(wrong):
    with pytest.raises(
        TypeError, match="must be the name of a recipe, or None for torch's semantics"
    ):
        parse(wrong)


SERVED = {
    "native": {FP32, BF16, FP16},
    "master32": {BF16, FP16},
    "split32": {BF16},
    "split24": {BF16},
    "sr": {BF16},
}
DTYPES = [FP32, BF16, FP16, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("name", precision.NAMES)
def test_each_recipe_says_which_parameters_it_serves(name):
    recipe = parse(name)
    for dtype in DTYPES:
        if dtype in SERVED[recipe.weights]:
            recipe.check(dtype)
        else:
            with pytest.raises(
                ValueError, match=f"^precision='{name}' is for .* parameters, and got one of "
            ):
                recipe.check(dtype)


def test_an_error_names_recipe_dtype_and_what_is_allowed():
    with pytest.raises(ValueError) as error:
        parse("split32").check(FP32)
    assert str(error.value) == (
        "precision='split32-fp32' is for bfloat16 parameters, and got one of float32: "
        "give each dtype param groups of its own, as "
        "param_groups(model, weight_decay, split_dtypes=True) does, "
        "and those of float32 another 'precision', None for torch's semantics"
    )
    with pytest.raises(
        ValueError, match="is for float16 or bfloat16 parameters, and got one of float64"
    ):
        parse("master32-bf16").state(torch.float64, torch.Size([3]), False)


def test_torchs_semantics_serve_everything():
    for dtype in DTYPES:
        parse(None).check(dtype)
        entry = (dtype, torch.Size([2, 3]))
        assert parse(None).state(dtype, torch.Size([2, 3]), True) == {
            "exp_avg": entry,
            "exp_avg_sq": entry,
            "max_exp_avg_sq": entry,
        }


@pytest.mark.parametrize(
    ("name", "dtype", "held", "moved"),
    [  # the gradient has the parameter's dtype
        ("split32", BF16, 10, 26),
        ("split32-bf16", BF16, 6, 18),
        ("split24-bf16", BF16, 5, 16),
        ("sr-bf16", BF16, 4, 14),
        ("split24-int8", BF16, 3.125, 12.25),
        ("master32", FP16, 12, 30),
        ("native-bf16", FP32, 4, 20),
        ("native-int8", FP32, 2.125, 16.25),
        (None, FP32, 8, 28),
        (None, BF16, 4, 14),
    ],
)
def test_bytes_per_parameter(name, dtype, held, moved):
    recipe = parse(name)
    assert recipe.held_bytes(dtype) == held
    assert recipe.moved_bytes(dtype, dtype) == moved
    assert recipe.moved_bytes(dtype, FP32) == moved + FP32.itemsize - dtype.itemsize


def test_amsgrad_and_averages_add_one_entry_each():
    assert parse("split24-int8").held_bytes(BF16, amsgrad=True) == 3.125 + 2
    assert parse("split32").held_bytes(BF16, amsgrad=True) == 10 + 4
    assert parse(None).moved_bytes(FP32, FP32, amsgrad=True) == 36
    # An average is float32 with every recipe, and float64 of float64 parameters.
    assert parse("split24-int8").held_bytes(BF16, ema=True) == 3.125 + 4
    assert parse(None).moved_bytes(FP32, FP32, ema=True) == 36
    assert parse(None).held_bytes(torch.float64, ema=True) == 24


def test_state_entries():
    shape, groups = torch.Size([5, 13]), torch.Size([3])  # 65 elements: the last group holds one
    assert parse("split24-int8").state(BF16, shape, False) == {
        "remainder": (torch.int8, shape),
        "exp_avg_ratio": (torch.int8, shape),
        "exp_avg_sq_lattice": (torch.uint8, shape),
        "exp_avg_ratio_scale": (BF16, groups),
        "exp_avg_sq_lattice_scale": (BF16, groups),
    }
    assert parse("master32-bf16").state(FP16, shape, True) == {
        "master_weight": (FP32, shape),
        "exp_avg": (BF16, shape),
        "exp_avg_sq": (BF16, shape),
        "max_exp_avg_sq": (BF16, shape),
    }
    assert parse("split32").state(BF16, torch.Size([]), False)["remainder"] == (
        torch.int16,
        torch.Size([]),
    )
    assert parse("native-int8").state(FP32, torch.Size([0]), False)["exp_avg_ratio_scale"] == (
        BF16,
        torch.Size([0]),
    )


@pytest.mark.parametrize("name", precision.NAMES)
def test_codecs_write_what_the_recipe_says(name):
    recipe = parse(name)
    state = recipe.state(BF16, torch.Size([64]), False)
    x, noise = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    if recipe.weights in ("split32", "split24"):
        _, remainder = (
            codecs.split32(x) if recipe.weights == "split32" else codecs.split24(x, noise)
        )
        assert state["remainder"] == (remainder.dtype, remainder.shape)
    if recipe.states == "int8":
        codes_and_scales = codecs.encode_moments(x, x, noise)
        for stored, names in zip(
            (codes_and_scales[:2], codes_and_scales[2:]),
            zip(*precision.CODED.values(), strict=True),
            strict=True,
        ):
            for entry, name in zip(stored, names, strict=True):
                assert state[name] == (entry.dtype, entry.shape)
    assert recipe.random == (recipe.weights in ("split24", "sr") or recipe.states != "fp32")
