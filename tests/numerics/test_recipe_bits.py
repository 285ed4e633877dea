"""Precision recipes: one result on every backend and in every layout, and random bits."""

import pytest
import torch
from recipes import (
    BF16,
    FP16,
    FP32,
    RECOMMENDED,
    dtype_of,
    every_backend,
    every_recipe,
    members,
    parameters,
    train,
    trained,
)
from torch import nn
from training import results, same_bits, values

from fused_adam import FusedAdamW
from fused_adam.backends import reference as host
from fused_adam.numerics import codecs
from fused_adam.precision import NAMES, WEIGHTS, parse

CASES = [(name, dtype) for name in NAMES for dtype in WEIGHTS[parse(name).weights][0]]


# Bits
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amsgrad", "gradients"), [(False, "same"), (True, "other")])
@pytest.mark.parametrize(("precision", "dtype"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_the_kernel_equals_the_reference(precision, dtype, amsgrad, gradients):
    grad_dtype = dtype if gradients == "same" else BF16 if dtype == FP32 else FP32
    shapes = [(31,), (5, 13)]
    options = {
        "dtype": dtype,
        "grad_dtype": grad_dtype,
        "amsgrad": amsgrad,
        "steps": 2,
        "shapes": shapes,
    }
    a, b = (trained(precision, backend=backend, **options) for backend in ("reference", "triton"))
    assert same_bits(results(a), results(b))
    for p in members(a):
        wanted = parse(precision).state(dtype, p.shape, amsgrad)
        entry = {
            key: (value.dtype, value.shape) for key, value in a.state[p].items() if key != "step"
        }
        assert entry == wanted and p.dtype == dtype


@pytest.mark.gpu
@every_backend
@pytest.mark.parametrize(("precision", "dtype"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_a_gpu_gives_the_bits_of_the_cpu(precision, dtype, backend):
    """The reference too, whose random words are drawn on the parameter's device."""
    options = {"dtype": dtype, "max_grad_norm": 0.5, "amsgrad": True}
    a, b = (
        trained(precision, **options),
        trained(precision, device="cuda", backend=backend, **options),
    )
    assert same_bits(results(a), results(b))


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8"])
def test_sizes_around_groups_and_chunks(precision):
    shapes = [(), (0, 3), (32,), (33,), (8191,), (8193,)]
    a, b = (trained(precision, 2, shapes, backend=backend) for backend in ("reference", "triton"))
    assert same_bits(results(a), results(b))


SPECIAL = [
    0.0,
    -0.0,
    float("inf"),
    float("nan"),
    1e-45,
    -1e-40,
    1e-38,
    3.4e38,
    -3.39e38,
    1e-30,
    1e19,
    65504.0,
    6e-8,
]


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, in the interpreter: of overflows, inf - inf, x / 0
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("split32-bf16", BF16),
        ("sr-bf16", BF16),
        ("split24-int8", BF16),
        ("master32-bf16", FP16),
        (None, BF16),
    ],
)
def test_special_values(precision, dtype):
    """Infinities, NaN, subnormals and what overflows, in parameters and gradients; and tiny second
    moments.
    """

    def run(backend):
        generator = torch.Generator().manual_seed(1)

        def draw(share):
            chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (330,), generator=generator)]
            usual = torch.randn(330, generator=generator) * 10 ** (
                -20 * torch.rand(330, generator=generator)
            )
            return torch.where(torch.rand(330, generator=generator) < share, chosen, usual).to(
                dtype
            )

        optimizer = FusedAdamW(
            [nn.Parameter(draw(0.2))], lr=1e-2, eps=0.0, precision=precision, backend=backend
        )
        for share in (0.02, 0.3, 0.0):
            members(optimizer)[0].grad = draw(share)
            optimizer.step()
        return results(optimizer)

    assert same_bits(run("reference"), run("triton"))


@pytest.mark.parametrize("steps", [2.0**24, 2e7])
def test_step_counts_beyond_float32(steps):
    def run(backend):
        optimizer = trained("sr-bf16", 1, [(40,)], backend=backend)
        optimizer.state[members(optimizer)[0]]["step"].fill_(steps)
        train(optimizer, 1, first=1)
        return results(optimizer)

    assert same_bits(run("reference"), run("triton"))


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "channels_last": lambda x: x.view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "plain": lambda x: x,
}


@pytest.mark.parametrize(
    ("precision", "backend"),
    [(name, "reference") for name in ("split32-bf16", "split24-int8", "master32-fp32")]
    + [("split24-int8", "triton")],
)
def test_any_layout_of_parameter_and_gradient(precision, backend):
    """An element's bits may depend on its place in memory, never on the gradient's layout."""

    def run(layout, gradient_layout):
        p = nn.Parameter(LAYOUTS[layout](values((8, 15), 1, BF16)))
        optimizer = FusedAdamW([p], lr=1e-2, precision=precision, backend=backend)
        for step in range(2):
            grad = values((8, 15), 10 + step, BF16)
            p.grad = (
                LAYOUTS[gradient_layout](grad).view(p.shape)
                if p.ndim == 2
                else LAYOUTS[gradient_layout](grad)
            )
            optimizer.step()
        return optimizer

    others = ("transposed", "strided", "misaligned")
    plain = results(run("plain", "plain"))
    assert all(same_bits(results(run("plain", other)), plain) for other in others)
    assert same_bits(results(run("strided", "transposed")), plain)
    assert same_bits(results(run("misaligned", "plain")), plain)
    transposed = results(run("transposed", "transposed"))
    assert same_bits(results(run("transposed", "strided")), transposed)
    # Without random bits even the order in memory does not matter.
    assert same_bits(transposed, plain) != parse(precision).random


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8"])
def test_channels_last_on_both_backends(precision):
    def run(backend):
        p = nn.Parameter(LAYOUTS["channels_last"](values((8, 15), 1, dtype_of(precision))))
        optimizer = FusedAdamW([p], lr=1e-2, precision=precision, backend=backend)
        for step in range(2):
            p.grad = LAYOUTS["channels_last" if step else "plain"](
                values((8, 15), step, p.dtype)
            ).view(2, 3, 4, 5)
            optimizer.step()
        return optimizer

    assert same_bits(results(run("reference")), results(run("triton")))


@pytest.mark.parametrize("chunk", [32, 96])
@every_recipe
def test_chunks_do_not_matter(precision, chunk, monkeypatch):
    whole = trained(precision, shapes=[(500,), (7, 11)])
    monkeypatch.setattr(host, "CHUNK", chunk)
    assert same_bits(results(trained(precision, shapes=[(500,), (7, 11)])), results(whole))


@every_recipe
def test_flat_buffers_and_groups_do_not_matter(precision):
    expected = results(trained(precision))
    assert same_bits(results(trained(precision, flatten=True)), expected)
    params = parameters(dtype_of(precision))
    groups = [
        {"params": params[:1]},
        {"params": params[1:3], "precision": precision},
        {"params": params[3:]},
    ]
    split = FusedAdamW(groups, lr=1e-2, weight_decay=0.1, precision=precision)
    train(split, 2)
    assert same_bits(results(split), expected)


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8"])
def test_flat_buffers_on_the_kernel(precision):
    assert same_bits(
        results(trained(precision, flatten=True, backend="triton")), results(trained(precision))
    )


@every_backend
def test_every_group_may_have_a_recipe_of_its_own(backend):
    """The random bits of a parameter depend on its place in the optimizer, not on its neighbours'
    recipes.
    """
    params = parameters(BF16, [(40,)] * 4)
    names = ["split32-bf16", None, "split24-int8", "sr-bf16"]
    groups = [{"params": [p], "precision": name} for p, name in zip(params, names, strict=True)]
    mixed = FusedAdamW(groups, lr=1e-2, weight_decay=0.1, backend=backend)
    train(mixed, 2)
    for i, name in enumerate(names):
        alone = trained(name, shapes=[(40,)] * 4, dtype=BF16)
        assert same_bits(results(mixed)[i : i + 1], results(alone)[i : i + 1])


def test_what_is_stored_is_what_the_recipe_says():
    """Bytes of all state, padding apart, beside what `held_bytes` promises."""
    for name in RECOMMENDED:
        optimizer = trained(name, 1, [(3200,)])
        [entry] = optimizer.state.values()
        held = sum(value.nbytes for key, value in entry.items() if key != "step")
        assert held == 3200 * parse(name).held_bytes(dtype_of(name))
    assert codecs.GROUP == 32


# Random bits
# ------------------------------------------------------------------------------------------------


@every_recipe
def test_random_bits_are_the_seeds_alone(precision):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = trained(precision, shapes=[(300,)])
    torch.manual_seed(2)
    b = trained(precision, shapes=[(300,)])
    assert same_bits(results(a), results(b))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    other = trained(precision, shapes=[(300,)], seed=1)
    assert same_bits(results(a), results(other)) != parse(precision).random


def test_the_users_generator_is_not_touched():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    params = [nn.Parameter(torch.ones(50, dtype=BF16))]
    params[0].grad = torch.ones(50, dtype=BF16)
    for backend in ("reference", "triton"):
        optimizer = FusedAdamW(params, precision="split24-int8", backend=backend)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.export_fp32()
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_above_32_bits():
    seeds = [5, 5 + 2**32, 2**63 - 1]
    found = [results(trained("sr-bf16", shapes=[(300,)], seed=seed)) for seed in seeds]
    assert not same_bits(found[0], found[1]) and not same_bits(found[1], found[2])
    for seed, expected in zip(seeds[1:], found[1:], strict=True):
        assert same_bits(
            results(trained("sr-bf16", shapes=[(300,)], seed=seed, backend="triton")), expected
        )
