"""cautious=True: decay only where the update moves a parameter towards zero, arXiv 2510.12402."""

import copy
import io
import itertools

import pytest
import torch
from graphs import Recorder
from recipes import BF16, FP32, RECOMMENDED, dtype_of, members, trained, weights
from torch import nn
from training import gradient, parameters, results, same_bits, train, values

from fused_adam import FusedAdam, FusedAdamW, step_in_backward

SHAPES = [(5,), (33, 3), (129,), ()]
every_backend = pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])


def plain(p, grads, lr, weight_decay, maximize, amsgrad, betas=(0.9, 0.999), eps=1e-8):
    """AdamW with cautious decay as the paper writes it, in plain torch and float64."""
    p = p.detach().double()
    m, v, v_max = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for t, grad in enumerate(grads, start=1):
        g = grad.double() * (-1 if maximize else 1)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        v_max = torch.maximum(v_max, v) if amsgrad else v
        u = m / (1 - betas[0] ** t) / ((v_max / (1 - betas[1] ** t)).sqrt() + eps)
        p = p - lr * u - lr * weight_decay * torch.where(u * p > 0, p, 0)
    return p


@pytest.mark.parametrize(("maximize", "amsgrad"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_backend
def test_equal_to_plain_torch(backend, dtype, maximize, amsgrad):
    options = {"lr": 0.05, "weight_decay": 0.3, "maximize": maximize, "amsgrad": amsgrad}
    params = parameters(dtype, SHAPES)
    grads = [[gradient(p, i, step) for step in range(5)] for i, p in enumerate(params)]
    wanted = [plain(p, g, **options) for p, g in zip(params, grads, strict=True)]
    optimizer = FusedAdamW(params, cautious=True, backend=backend, **options)
    train(optimizer, 5)
    for param, want in zip(params, wanted, strict=True):
        atol = 1e-13 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(param.detach().double(), want, rtol=0, atol=atol)
    # The comparison sees which elements decay.
    usual = FusedAdamW(parameters(dtype, SHAPES), **options)
    train(usual, 5)
    off = (usual.param_groups[0]["params"][2].detach().double() - wanted[2]).abs()
    assert 0.2 < (off > 1e-3).double().mean() < 1


@every_backend
def test_two_elements(backend):
    """The example of docs/training.md."""
    p = nn.Parameter(torch.tensor([1.0, -1.0]))
    p.grad = torch.tensor([0.5, 0.5])
    FusedAdamW([p], lr=0.1, weight_decay=0.1, cautious=True, backend=backend).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.89, -1.1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flatten", [False, True])
def test_same_bits_everywhere(dtype, flatten):
    def run(backend, flat):
        options = {"backend": backend, "flatten": flat, "amsgrad": True, "maximize": True}
        optimizer = FusedAdamW(
            parameters(dtype, SHAPES), lr=0.05, weight_decay=0.3, cautious=True, **options
        )
        train(optimizer, 3)
        return results(optimizer)

    wanted = run("reference", False)
    for backend in ("reference", "compiled", "triton"):
        assert same_bits(run(backend, flatten), wanted)


@pytest.mark.parametrize("precision", RECOMMENDED)
def test_recipes_on_the_kernel(precision):
    runs = [
        trained(precision, 2, [(31,), (5, 13)], cautious=True, weight_decay=0.5, backend=backend)
        for backend in ("reference", "triton")
    ]
    assert same_bits(*map(results, runs))
    usual = trained(precision, 2, [(31,), (5, 13)], weight_decay=0.5)
    assert not same_bits(results(runs[0]), results(usual))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("p", "grad", "decays"),
    [
        (1e-30, 1e-30, True),  # the product of the two is no float32
        (-1e-30, -1e-30, True),
        (1e-30, -1e-30, False),
        (1.0, 0.0, False),
        (-1.0, 0.0, False),
        (-1.0, -0.0, False),
    ],
)
def test_signs_decide(p, grad, decays, backend):
    def stepped(**options):
        param = nn.Parameter(torch.full((3,), p))
        param.grad = torch.full((3,), grad)
        FusedAdamW([param], lr=1.0, eps=1e10, backend=backend, **options).step()
        return param.detach()

    decayed, undecayed = stepped(weight_decay=0.5), stepped(weight_decay=0.0)
    assert not torch.equal(decayed, undecayed)
    found = stepped(weight_decay=0.5, cautious=True)
    assert torch.equal(found, decayed if decays else undecayed)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's: inf - inf
@pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
def test_zeros_and_what_is_not_finite(backend):
    """A zero has no decay, so cautious or not it has the same bits. An infinite parameter becomes
    NaN only if it decays.
    """
    inf, nan = float("inf"), float("nan")
    start = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, -0.0, inf, inf, nan, 1.0])
    grad = torch.tensor([1.0, 1.0, -1.0, -1.0, -0.0, -0.0, 1.0, -1.0, 1.0, nan])

    def stepped(cautious):
        param = nn.Parameter(start.clone())
        param.grad = grad.clone()
        FusedAdamW([param], lr=0.1, cautious=cautious, backend=backend).step()
        return param.detach()

    found, usual = stepped(True), stepped(False)
    assert torch.equal(found[:6].view(torch.int32), usual[:6].view(torch.int32))
    assert found[6].isnan() and found[7].isposinf() and found[8:].isnan().all()


def test_unrounded_values_decide():
    """What 8-bit state stores as zero still has a sign in the step that computes it."""
    p = nn.Parameter(torch.ones(32))
    optimizer = FusedAdamW([p], lr=1e-3, weight_decay=100.0, cautious=True, precision="native-int8")
    p.grad = torch.ones(32)
    optimizer.step()
    p.grad = torch.ones(32)
    p.grad[5] = -0.895  # 0.9 * 0.1 - 0.1 * 0.895 = 0.0005, of 0.19 elsewhere
    before = p.detach().clone()
    optimizer.step()
    assert optimizer.state[p]["exp_avg_ratio"][5] == 0
    assert p[5] < 0.95 * before[5]


def test_a_group_may_have_its_own(launches):
    """Groups that are not cautious have the bits of a plain optimizer, in a launch of their own."""
    shapes = [(40,), (33, 3)]
    groups = [{"params": [p]} for p in parameters(FP32, shapes)]
    groups[1]["cautious"] = False
    optimizer = FusedAdamW(groups, lr=0.05, weight_decay=0.3, cautious=True, backend="triton")
    train(optimizer, 2)
    assert launches == ["prologue_kernel", "adam_kernel", "adam_kernel"] * 2
    both = []
    for cautious in (True, False):
        other = FusedAdamW(parameters(FP32, shapes), lr=0.05, weight_decay=0.3, cautious=cautious)
        train(other, 2)
        both.append(results(other))
    assert same_bits(results(optimizer), [both[0][0], both[1][1]])
    assert "cautious" not in groups[0]  # the user's dict is not ours


def test_it_is_switched_between_steps():
    optimizer = FusedAdamW(parameters(FP32, SHAPES), lr=0.05, weight_decay=0.3)
    twin = FusedAdamW(parameters(FP32, SHAPES), lr=0.05, weight_decay=0.3, cautious=True)
    train(optimizer, 1)
    optimizer.param_groups[0]["cautious"] = True
    for param, entry in optimizer.state.items():
        twin.state[twin.param_groups[0]["params"][len(twin.state)]] = copy.deepcopy(entry)
        twin.param_groups[0]["params"][len(twin.state) - 1].data.copy_(param.detach())
    train(optimizer, 2, first=1)
    train(twin, 2, first=1)
    assert same_bits(results(optimizer), results(twin))


def test_a_decay_that_comes_and_goes():
    """Without decay, cautious or not is the same; no new plan is made."""
    runs = []
    for cautious in (True, False):
        optimizer = FusedAdamW(
            parameters(FP32, SHAPES), lr=0.05, weight_decay=0.0, cautious=cautious
        )
        train(optimizer, 2)
        runs.append(results(optimizer))
        optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.3)
        optimizer._engine._build = None
        train(optimizer, 1, first=2)
        runs.append(results(optimizer))
    assert same_bits(runs[0], runs[2]) and not same_bits(runs[1], runs[3])


def test_captured_steps(monkeypatch):
    options = {"lr": 0.05, "weight_decay": 0.3, "cautious": True, "backend": "triton"}
    captured = FusedAdamW(parameters(FP32, SHAPES), capturable=True, **options)
    train(captured, 1)
    with monkeypatch.context() as patch:
        graph = Recorder(patch)
        graph.capture(captured.step)
        for step in (1, 2):
            for i, p in enumerate(members(captured)):
                p.grad.copy_(gradient(p, i, step))
            graph.replay()
    usual = FusedAdamW(parameters(FP32, SHAPES), **{**options, "backend": "reference"})
    train(usual, 3)
    assert same_bits(results(captured), results(usual))


def test_steps_in_backward():
    def fit(inside):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 1))
        optimizer = FusedAdamW(model.parameters(), lr=0.05, weight_decay=0.3, cautious=True)
        if inside:
            step_in_backward(model, optimizer, bucket_bytes=1)
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(8, 20)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return results(optimizer)

    assert same_bits(fit(True), fit(False))


# Checkpoints
# ------------------------------------------------------------------------------------------------


def trained_cautiously(steps=2, **options):
    optimizer = FusedAdamW(parameters(FP32, SHAPES), lr=0.05, weight_decay=0.3, **options)
    train(optimizer, steps)
    return optimizer


@pytest.mark.parametrize("duplicate", ["state_dict", "deepcopy"])
def test_training_goes_on_with_the_same_bits(duplicate):
    first = trained_cautiously(cautious=True)
    if duplicate == "deepcopy":
        second = copy.deepcopy(first)
    else:
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        params = [p.detach().clone().requires_grad_() for p in members(first)]
        second = FusedAdamW(params)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert second.param_groups[0]["cautious"] is True
    train(first, 2, first=2)
    train(second, 2, first=2)
    assert same_bits(results(first), results(second))


@pytest.mark.parametrize("source", ["torch", "off", "export"])
def test_a_checkpoint_that_does_not_mention_it_leaves_it(source):
    saved = trained_cautiously()
    if source == "torch":
        saved = torch.optim.AdamW(parameters(FP32, SHAPES))
        train(saved, 1)
    state_dict = saved.export_fp32()["state"] if source == "export" else saved.state_dict()
    assert "cautious" not in state_dict["param_groups"][0]
    optimizer = trained_cautiously(cautious=True)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["cautious"] is True
    optimizer.step()


@pytest.mark.parametrize("precision", ["split32-bf16", "master32"])
def test_exported_weights_decay_cautiously(precision):
    """The exported state is torch's, with no word of it."""
    optimizer = trained(precision, 2, cautious=True, weight_decay=0.5)
    exported = optimizer.export_fp32()
    assert "cautious" not in exported["state"]["param_groups"][0]
    params = [
        nn.Parameter(values(p.shape, i, BF16).float()) for i, p in enumerate(members(optimizer))
    ]
    twin = FusedAdamW(params, lr=1e-2, weight_decay=0.5, cautious=True)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = gradient(p, i, step, dtype_of(precision)).float()
        twin.step()
    for found, want in zip(weights(optimizer), params, strict=True):
        torch.testing.assert_close(found, want.detach(), rtol=2e-3, atol=2e-3)


# What is refused
# ------------------------------------------------------------------------------------------------

COUPLED = "cautious=True cannot be combined with decoupled_weight_decay=False, because coupled"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cautious": True}, ValueError, COUPLED),
        ({"cautious": 1}, TypeError, "cautious=1 must be True or False"),
        ({"cautious": None}, TypeError, "cautious=None must be True or False"),
        (
            {"cautious": True, "decoupled_weight_decay": True, "differentiable": True},
            ValueError,
            "cautious=True cannot be combined with differentiable=True",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FusedAdam([torch.zeros(1)], **arguments)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"decoupled_weight_decay": False}, ValueError, COUPLED),
        ({"cautious": "yes"}, TypeError, "cautious='yes' must be True or False"),
        ({"differentiable": True}, ValueError, "combined with differentiable=True"),
    ],
)
def test_a_bad_group_is_not_added_and_a_bad_edit_changes_nothing(group, error, message):
    optimizer = trained_cautiously(cautious=True)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **group})
    assert len(optimizer.param_groups) == 1
    if "differentiable" in group:
        return  # a change that torch does not look at either
    before = results(optimizer)
    optimizer.param_groups[0].update(group)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert same_bits(results(optimizer), before)


def test_a_checkpoint_of_coupled_decay_changes_nothing():
    optimizer = FusedAdam([nn.Parameter(torch.ones(3))], decoupled_weight_decay=True, cautious=True)
    train(optimizer, 1)
    before = results(optimizer)
    saved = torch.optim.Adam([nn.Parameter(torch.ones(3))])
    train(saved, 1)
    with pytest.raises(ValueError, match=COUPLED):
        optimizer.load_state_dict(saved.state_dict())
    assert same_bits(results(optimizer), before)
    adamw = FusedAdamW([nn.Parameter(torch.ones(3))], cautious=True)
    adamw.load_state_dict(saved.state_dict())  # whose decay is decoupled whatever was saved
    train(adamw, 1)
    bad = optimizer.state_dict()
    bad["param_groups"][0]["cautious"] = "yes"
    with pytest.raises(TypeError, match="cautious='yes' must be True or False"):
        optimizer.load_state_dict(bad)
    assert same_bits(results(optimizer), before)
