"""Precision recipes in the optimizer: one result on every backend and in every layout, and what
reaches the weights.
"""

import pytest
import torch
from graphs import Recorder
from recipes import (
    BF16,
    FP16,
    FP32,
    RECOMMENDED,
    dtype_of,
    members,
    parameters,
    train,
    trained,
    weights,
)
from torch import nn
from training import gradient, results, same_bits, values

from fused_adam import FusedAdam, FusedAdamW, step_in_backward
from fused_adam.backends import reference as host
from fused_adam.numerics import codecs
from fused_adam.precision import NAMES, WEIGHTS, parse

CASES = [(name, dtype) for name in NAMES for dtype in WEIGHTS[parse(name).weights][0]]
every_recipe = pytest.mark.parametrize("precision", NAMES)
every_backend = pytest.mark.parametrize("backend", ["reference", "triton"])


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


@pytest.mark.parametrize("precision", ["split32-bf16", "master32-int8", "native-fp32"])
def test_clipping(precision):
    """As gradients scaled by hand: the norm of two elements of 8 is clipped by a power of two."""

    def run(backend, factor, **options):
        p = nn.Parameter(torch.ones(64, dtype=BF16))
        optimizer = FusedAdamW([p], lr=1e-2, precision=precision, backend=backend, **options)
        p.grad = values((64,), 1, BF16) * factor
        optimizer.step()
        return optimizer

    norm = run("reference", 1.0, max_grad_norm=1e9).grad_norm.item()
    clipped = run("reference", 1.0, max_grad_norm=norm / 2)
    assert clipped.grad_norm.item() == norm
    assert same_bits(results(clipped), results(run("triton", 1.0, max_grad_norm=norm / 2)))
    for got, want in zip(
        clipped.export_fp32()["state"]["state"].values(),
        run("reference", 0.5).export_fp32()["state"]["state"].values(),
        strict=True,
    ):
        torch.testing.assert_close(got["exp_avg"], want["exp_avg"], rtol=1e-2, atol=1e-4)


@every_backend
@pytest.mark.parametrize("precision", ["split24-int8", "sr-bf16", "master32-fp32"])
def test_a_skipped_step_leaves_every_stored_bit(precision, backend):
    """For a GradScaler's flag, or a gradient that is not finite; and the next step is as if none
    had been.
    """
    optimizer = trained(precision, 1, backend=backend, fused=True, skip_nonfinite=True)
    before = results(optimizer)
    optimizer.found_inf = torch.ones(())
    train(optimizer, 1, first=7)
    assert same_bits(results(optimizer), before)
    del optimizer.found_inf
    train(optimizer, 1, first=7, scale=float("nan"))
    assert same_bits(results(optimizer), before) and optimizer.skipped_steps == 2
    optimizer.grad_scale = torch.tensor(8.0)
    train(optimizer, 1, first=1, scale=8.0)
    assert same_bits(results(optimizer), results(trained(precision, 2)))


def test_a_scaler_over_master_weights_in_half_precision():
    def run(scale):
        params = parameters(FP16, [(5,), (40,)])
        optimizer = FusedAdamW(params, lr=1e-2, precision="master32", fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            optimizer.zero_grad()
            factor = float("inf") if step == 1 and scale > 1 else 1.0
            if step != 1 or scale > 1:
                scaler.scale(
                    sum((p * gradient(p, i, step)).sum() * factor for i, p in enumerate(params))
                ).backward()
                scaler.step(optimizer)
                scaler.update()
        return results(optimizer)

    assert same_bits(run(4.0), run(1.0))


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8", "master32-fp32"])
def test_captured_steps(precision, monkeypatch):
    def run(flatten):
        params = parameters(BF16, [(5,), (33, 3)])
        return FusedAdamW(
            params, lr=1e-2, precision=precision, backend="triton", capturable=True, flatten=flatten
        )

    for flatten in (False, True):
        captured = run(flatten)
        train(captured, 1)
        with monkeypatch.context() as patch:
            graph = Recorder(patch)
            for i, p in enumerate(members(captured)):
                p.grad.copy_(gradient(p, i, 1))
            graph.capture(captured.step)
            for step in (1, 2):
                for i, p in enumerate(members(captured)):
                    p.grad.copy_(gradient(p, i, step))
                graph.replay()
        plain = FusedAdamW(parameters(BF16, [(5,), (33, 3)]), lr=1e-2, precision=precision)
        train(plain, 3)
        assert same_bits(results(captured), results(plain))


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8", "sr-bf16"])
def test_steps_in_backward(precision):
    """A parameter keeps its place in the optimizer when it is stepped alone."""

    def fit(inside):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 1)).bfloat16()
        optimizer = FusedAdamW(model.parameters(), lr=1e-2, precision=precision)
        if inside:
            step_in_backward(model, optimizer, bucket_bytes=1)
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(8, 20, dtype=BF16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return results(optimizer)

    assert same_bits(fit(True), fit(False))


@every_backend
@pytest.mark.parametrize("precision", ["split24-int8", "sr-bf16"])
def test_a_parameter_without_a_gradient_is_left_alone(precision, backend):
    """It has a step count of its own, and with it random bits."""
    late = FusedAdamW(
        parameters(BF16, [(40,), (33,)]), lr=1e-2, precision=precision, backend=backend
    )
    first, second = members(late)
    first.grad = gradient(first, 0, 0)
    late.step()
    assert list(late.state) == [first]
    train(late, 2, first=1)
    both = FusedAdamW(parameters(BF16, [(40,), (33,)]), lr=1e-2, precision=precision)
    train(both, 1)
    assert late.state[second]["step"] == 2
    other = FusedAdamW(parameters(BF16, [(40,), (33,)]), lr=1e-2, precision=precision)
    for step in (1, 2):
        members(other)[1].grad = gradient(second, 1, step)
        other.step()
    assert same_bits(results(late)[1:], results(other)[1:])


@pytest.mark.filterwarnings(
    "ignore:optimizer contains a parameter group with duplicate:UserWarning"
)
@pytest.mark.parametrize("precision", ["split24-int8", "master32"])
def test_parameters_listed_twice_and_views_that_overlap(precision):
    """They are stepped one after the other; the second finds what the first wrote."""

    def run(backend):
        base = values((100,), 1, BF16)
        first, second, other = (
            nn.Parameter(base[:70]),
            nn.Parameter(base[40:]),
            nn.Parameter(values((9,), 2, BF16)),
        )
        optimizer = FusedAdamW(
            [first, second, other, other], lr=1e-2, precision=precision, backend=backend
        )
        train(optimizer, 2)
        assert optimizer.state[other]["step"] == 4 and first[40] == base[40] == second[0]
        return results(optimizer)

    assert same_bits(run("reference"), run("triton"))


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


# Trajectories
# ------------------------------------------------------------------------------------------------


def test_split32_and_master32_are_fp32_training():
    """1000 steps on the same gradients: weights and moments are those of float32 parameters, bit
    for bit.
    """
    start = [values((40,), 1, BF16), values((3, 7), 2, BF16)]
    runs = {}
    for name in ("split32", "master32", None):
        params = [nn.Parameter(x.clone() if name else x.float()) for x in start]
        optimizer = FusedAdamW(params, lr=1e-3, weight_decay=0.1, amsgrad=True, precision=name)
        for step in range(1000):
            for i, p in enumerate(params):
                p.grad = values(p.shape, 10 * step + i, BF16).to(p.dtype)
            optimizer.step()
        exported = optimizer.export_fp32()
        runs[name] = [
            {"weight": weight, **entry}
            for weight, entry in zip(
                exported["params"].values(), exported["state"]["state"].values(), strict=True
            )
        ]
        for p, found in zip(params, runs[name], strict=True):
            assert torch.equal(p.detach(), found["weight"].to(p.dtype))  # no exact tie among these
    assert same_bits(runs["split32"], runs[None]) and same_bits(runs["master32"], runs[None])


@pytest.mark.parametrize("precision", ["sr-bf16", "split24-bf16", "split32-bf16"])
def test_decay_alone_arrives(precision):
    """lr * wd = 1e-4 is a fortieth of a bfloat16's last place: torch's own bf16 parameters would
    not move.
    """
    p = nn.Parameter(torch.linspace(1, 2, 1024).bfloat16())
    p.grad = torch.zeros_like(p)
    start = p.detach().float()
    optimizer = FusedAdamW([p], lr=1e-3, weight_decay=0.1, precision=precision)
    for _ in range(2000):
        optimizer.step()
    factor = (p.detach().double().sum() / start.double().sum()).item()
    assert abs(factor / (1 - 1e-4) ** 2000 - 1) < 0.01


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_second_moments_do_not_go_stale(states):
    """beta2 = 0.999, 2500 steps, half of the gradients ten times smaller in the second half."""
    exact, ours = (nn.Parameter(torch.ones(1024)) for _ in range(2))
    optimizers = [
        FusedAdam([exact], lr=1e-6),
        FusedAdam([ours], lr=1e-6, precision=f"native-{states}"),
    ]
    generator = torch.Generator().manual_seed(1)
    deviation = 1e-3 * torch.exp(0.5 * torch.randn(1024, generator=generator))
    for step in range(2500):
        if step == 1250:
            deviation[::2] /= 10
        exact.grad = ours.grad = deviation * (0.1 + torch.randn(1024, generator=generator))
        for optimizer in optimizers:
            optimizer.step()
    want, got = (o.export_fp32()["state"]["state"][0]["exp_avg_sq"] for o in optimizers)
    ratio = got.double() / want.double()
    for part in (ratio[::2], ratio[1::2]):
        assert 0.98 < part.mean() < 1.02


# Writes from outside
# ------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    "precision", ["master32", "split32", "split24-bf16", "split24-int8", "sr-bf16"]
)
def test_what_a_user_writes_into_a_parameter_counts(precision, backend):
    """Between steps, by any way: the next step starts from it. What was not written keeps its lower
    bits.
    """

    def run(write):
        optimizer = trained(precision, 3, [(64,)], backend=backend, amsgrad=False)
        [p] = members(optimizer)
        if write:
            p.data[:16] = 3.0
            with torch.no_grad():
                p[16:32].zero_()
                p[32:48].copy_(p[32:48].clone())
        p.grad = torch.zeros_like(p)
        for key, value in optimizer.state[p].items():
            value.zero_() if key.startswith("exp_avg") else None
        # No update, and a decay of nearly nothing: what the step started from is what it stores.
        optimizer.param_groups[0].update(lr=1e-30, weight_decay=1.0)
        before = p.detach().clone()
        optimizer.step()
        return optimizer, before

    (touched, before), (left, _) = run(True), run(False)
    p = members(touched)[0].detach()
    assert torch.equal(p, before)
    [weight], [expected] = weights(touched), weights(left)
    assert torch.equal(weight[32:], expected[32:])
    # To within half of bfloat16's last place; a zero is a zero.
    assert (weight[:16] - 3.0).abs().max() <= 2**-7
    assert weight[16:32].abs().max() < 1e-40
    if precision == "master32":
        assert torch.equal(weight[:32], p[:32].float())


@every_backend
@pytest.mark.parametrize("precision", ["split32", "split24-bf16", "master32"])
def test_masks_after_every_step(precision, backend):
    """Pruning: `p.data.mul_(mask)`. A zero over a negative remainder would be a NaN."""
    optimizer = trained(precision, 0, [(64,)], backend=backend)
    [p] = members(optimizer)
    mask = (torch.arange(64) % 2 == 0).to(BF16)
    for step in range(6):
        train(optimizer, 1, first=step)
        p.data.mul_(mask)
    assert p.isfinite().all() and torch.equal(p != 0, mask != 0)
    train(optimizer, 1, first=6)
    assert p.isfinite().all() and p.abs().max() < 4


def test_weights_of_another_model_count():
    """A checkpoint's master weights do not undo what the model was loaded with."""
    a = trained("master32", 3, [(64,)])
    b = FusedAdamW(parameters(BF16, [(64,)], seed=99), lr=1e-2, precision="master32")
    mine = members(b)[0].detach().float()
    b.load_state_dict(a.state_dict())
    train(b, 1, first=3)
    assert (weights(b)[0] - mine).abs().max() < 0.05


@every_backend
@pytest.mark.parametrize("precision", ["split24-int8", "native-int8", "master32-int8"])
def test_a_nan_spoils_its_own_group_and_can_be_undone(precision, backend):
    """Groups of 32: the rest goes on; a good checkpoint brings everything back, the group's unused
    end included.
    """
    optimizer = trained(precision, 2, [(70,)], backend=backend)
    [p] = members(optimizer)
    good, start = {**optimizer.state_dict()}, p.detach().clone()
    good = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, good
    )
    p.grad = gradient(p, 0, 2)
    p.grad[65] = float("nan")
    optimizer.step()
    clean = trained(precision, 3, [(70,)])
    assert p[:64].isfinite().all() and p[65].isnan()
    assert torch.equal(p[:64], members(clean)[0][:64])
    train(optimizer, 1, first=3)
    with torch.no_grad():
        p.copy_(start)
    optimizer.load_state_dict(good)
    train(optimizer, 1, first=2)
    assert same_bits(results(optimizer), results(clean))


@every_backend
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_master_weights_begin_as_the_parameters(dtype, backend):
    """Also where the first step is of size zero, as torch.distributed.checkpoint takes one to have
    some state.
    """
    p = nn.Parameter(torch.tensor([1.5, -0.0, 3.0, 0.0], dtype=dtype))
    optimizer = FusedAdamW([p], lr=0.0, precision="master32", backend=backend)
    p.grad = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=dtype)
    optimizer.step()
    master = optimizer.state[p]["master_weight"]
    assert torch.equal(master.view(torch.int32), p.detach().float().view(torch.int32))


# Bad input
# ------------------------------------------------------------------------------------------------


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


def test_what_is_stored_is_what_the_recipe_says():
    """Bytes of all state, padding apart, beside what `held_bytes` promises."""
    for name in RECOMMENDED:
        optimizer = trained(name, 1, [(3200,)])
        [entry] = optimizer.state.values()
        held = sum(value.nbytes for key, value in entry.items() if key != "step")
        assert held == 3200 * parse(name).held_bytes(dtype_of(name))
    assert codecs.GROUP == 32
