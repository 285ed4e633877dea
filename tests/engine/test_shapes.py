"""Tensors without values: fake ones make state of the right sizes, meta ones say what to do."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

from fused_adam import FusedAdamW

RECIPES = [None, "split32", "split24-int8", "sr-bf16", "master32"]


def model():
    return nn.Sequential(
        nn.Linear(5, 7, dtype=torch.bfloat16), nn.LayerNorm(7, dtype=torch.bfloat16)
    )


def backward(module):
    module(torch.ones(2, 5, dtype=torch.bfloat16)).square().mean().backward()


def kinds(optimizer):
    """Names, shapes, dtypes and strides of all state."""
    return [
        {
            key: (value.shape, value.dtype, value.stride())
            for key, value in optimizer.state[p].items()
        }
        for group in optimizer.param_groups
        for p in group["params"]
    ]


@pytest.mark.parametrize("optimizer_under_mode", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference", "compiled", "triton"])
def test_a_fake_step_makes_the_state_of_a_real_one(backend, optimizer_under_mode):
    check(optimizer_under_mode, backend=backend)


@pytest.mark.parametrize("precision", RECIPES)
@pytest.mark.parametrize("flatten", [False, True])
def test_whatever_the_recipe(precision, flatten):
    check(True, precision=precision, flatten=flatten, amsgrad=True, max_grad_norm=1.0)


def check(optimizer_under_mode, **options):
    mode = FakeTensorMode()
    with mode:
        module = model()
        optimizer = FusedAdamW(module.parameters(), **options) if optimizer_under_mode else None
    optimizer = optimizer or FusedAdamW(module.parameters(), **options)
    with mode:
        for _ in range(3):
            optimizer.zero_grad()
            backward(module)
            optimizer.step()
        saved, exported = optimizer.state_dict(), optimizer.export_fp32()
    real = model()
    expected = FusedAdamW(real.parameters(), **options)
    backward(real)
    expected.step()
    assert kinds(optimizer) == kinds(expected)
    entries = [entry.values() for entry in (*optimizer.state.values(), *saved["state"].values())]
    assert all(isinstance(value, FakeTensor) for values in entries for value in values)
    assert all(weight.dtype == torch.float32 for weight in exported["params"].values())
    assert (optimizer.grad_norm is None) == (expected.grad_norm is None)


def test_parameters_without_gradients_get_no_state():
    with FakeTensorMode():
        module = model()
        optimizer = FusedAdamW(module.parameters())
        backward(module)
        module[0].bias.grad = None
        optimizer.step()
    assert list(map(len, kinds(optimizer))) == [3, 0, 3, 3]


def test_what_cannot_be_stepped_raises_as_ever():
    with FakeTensorMode():
        param = nn.Parameter(torch.ones(3, 3))
        optimizer = FusedAdamW([param])
        param.grad = torch.eye(3).to_sparse()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("flatten", [False, True])
def test_real_parameters_under_the_mode(backend, flatten):
    """Before anything is changed: tables made there would have no addresses."""
    module = model()
    backward(module)
    optimizer = FusedAdamW(module.parameters(), backend=backend, flatten=flatten)
    optimizer.step()
    before = [p.detach().clone() for p in module.parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for action in (optimizer.step, lambda: FusedAdamW(module.parameters(), flatten=True)):
            with pytest.raises(
                RuntimeError,
                match=r"parameter 0 is a real tensor, but .* FakeTensorMode is on: make",
            ):
                action()
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert all(entry["step"] == 1 for entry in optimizer.state.values())


def test_real_parameters_beside_fake_ones():
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(3))]
        params[0].grad = torch.ones(3)
    params.append(nn.Parameter(torch.ones(3)))
    with pytest.raises(RuntimeError, match="parameter 1 is a real tensor, but others are fake"):
        FusedAdamW(params).step()


def test_nothing_is_loaded_into_fake_tensors():
    real = model()
    optimizer = FusedAdamW(real.parameters())
    backward(real)
    optimizer.step()
    with FakeTensorMode():
        fake = FusedAdamW(model().parameters())
    with pytest.raises(
        RuntimeError, match=r"load_state_dict\(\) cannot be used under FakeTensorMode"
    ):
        fake.load_state_dict(optimizer.state_dict())


def test_a_memory_estimate_counts_the_state():
    """torch's own tracker, over a model that no machine holds."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    with FakeTensorMode():
        module = nn.Linear(1 << 16, 1 << 16, bias=False, dtype=torch.bfloat16)  # 8 GiB
        optimizer = FusedAdamW(module.parameters(), precision="split32-bf16")
        tracker.track_external(module, optimizer)
        with tracker:
            module(torch.ones(1, 1 << 16, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
        [found] = tracker.get_tracker_snapshot("current").values()
    counted = {getattr(kind, "value", kind): size for kind, size in found.items()}
    assert (
        counted["Optstate"] == 6 * 2**32 + 4
    )  # a remainder and two moments of 2 bytes; the step count


@pytest.mark.parametrize("backend", ["auto", "triton", "reference", "compiled"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_on_meta_says_what_to_do(backend, fused):
    """In torch's own words parameters there are of no supported device, too, if fused=True."""
    module = nn.Linear(2, 2, device="meta")
    optimizer = FusedAdamW(module.parameters(), backend=backend, fused=fused)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    text = rf"backend='{backend}' cannot run on meta: .* no values; .* to_empty\(\)"
    with pytest.raises(
        RuntimeError, match="`fused=True` requires .* but torch.float32 and meta" if fused else text
    ):
        optimizer.step()
    assert not optimizer.state_dict()["state"]
    optimizer.zero_grad()
    optimizer.step()  # without gradients there is nothing to refuse
