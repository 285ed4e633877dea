"""Step inside backward: the same bits, few gradients alive, few launches, and what it refuses."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import results, same_bits

from fused_adam import FusedAdam, FusedAdamW, step_in_backward


def model(depth=4, width=64):
    torch.manual_seed(0)
    layers = [
        layer
        for _ in range(depth)
        for layer in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())
    ]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def loss_of(module, step):
    torch.manual_seed(100 + step)
    return (module(torch.randn(8, 64)) - 1).square().mean()


def fit(module, optimizer, steps=4, first=0):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(first, first + steps):
        loss_of(module, step).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def pair(**options):
    """Two equal models with their optimizers."""
    modules = [model(), model()]
    return [(module, FusedAdamW(module.parameters(), lr=1e-2, **options)) for module in modules]


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 32 << 20])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_same_bits_as_steps_after_backward(backend, bucket_bytes):
    (plain, expected), (module, optimizer) = pair(backend=backend, amsgrad=True)
    fit(plain, expected, 3)
    handle = step_in_backward(module, optimizer, bucket_bytes=bucket_bytes)
    fit(module, optimizer, 3)
    assert same_bits(results(optimizer), results(expected))
    handle.remove()
    fit(plain, expected, 2, first=3)
    fit(module, optimizer, 2, first=3)
    assert same_bits(results(optimizer), results(expected))


def live_gradient_bytes(module, backward):
    """The most bytes of gradients that are alive at once, seen whenever one more has arrived."""
    alive, most = {}, 0

    def arrived(param):
        nonlocal most
        storage = param.grad.untyped_storage()
        alive[storage.data_ptr()] = (weakref.ref(param.grad), param.grad.nbytes)
        gc.collect()
        most = max(most, sum(size for ref, size in alive.values() if ref() is not None))

    hooks = [p.register_post_accumulate_grad_hook(arrived) for p in module.parameters()]
    backward()
    for hook in hooks:
        hook.remove()
    return most


def test_gradients_are_freed_while_backward_runs():
    (plain, _), (module, optimizer) = pair()
    everything = sum(p.nbytes for p in plain.parameters())
    assert live_gradient_bytes(plain, loss_of(plain, 0).backward) == everything
    bucket, largest = 1000, 64 * 64 * 4
    loss = loss_of(module, 0)
    watched = live_gradient_bytes  # its hooks come first, so they see a gradient before it is used
    seen = []

    def backward():
        handle = step_in_backward(module, optimizer, bucket_bytes=bucket)
        loss.backward()
        seen.append(all(p.grad is None for p in module.parameters()))
        handle.remove()

    assert watched(module, backward) <= bucket + largest < everything / 3
    assert seen == [True]


def test_small_parameters_are_stepped_together(launches):
    """Two launches per bucket, not per parameter. Only the first backward makes plans."""
    module = model()
    optimizer = FusedAdam(module.parameters(), backend="triton")
    handle = step_in_backward(module, optimizer)
    fit(module, optimizer, 1)
    assert launches == ["prologue_kernel", "adam_kernel"]
    launches.clear()
    handle.remove()
    step_in_backward(module, optimizer, bucket_bytes=64 * 64 * 4)
    fit(module, optimizer, 1)
    assert 2 < len(launches) <= 2 * 5  # one bucket per large matrix, the small ones with them
    optimizer._engine._build = None
    fit(module, optimizer, 2, first=1)


def test_the_rest_is_stepped_by_step():
    (plain, expected), (module, optimizer) = pair()
    fit(plain, expected)
    step_in_backward([p for p in module.parameters() if p.ndim == 2], optimizer)
    fit(module, optimizer)
    assert same_bits(results(optimizer), results(expected))


def test_accumulation_by_its_switch():
    (plain, expected), (module, optimizer) = pair()
    handle = step_in_backward(module, optimizer)
    for round_ in range(2):
        for step in range(3):
            loss_of(plain, 3 * round_ + step).backward()
        expected.step()
        expected.zero_grad()
        with handle.accumulate():
            loss_of(module, 3 * round_).backward()
            loss_of(module, 3 * round_ + 1).backward()
        assert all(p.grad is not None for p in module.parameters())
        loss_of(module, 3 * round_ + 2).backward()
        assert all(p.grad is None for p in module.parameters())
        optimizer.step()
    assert same_bits(results(optimizer), results(expected))


def test_accumulation_without_its_switch_is_refused_before_anything_changes():
    module, optimizer = pair()[0]
    step_in_backward(module, optimizer)
    loss_of(module, 0).backward()
    before = results(optimizer)
    with pytest.raises(RuntimeError, match=r"second gradient before optimizer\.step.*accumulate"):
        loss_of(module, 1).backward()
    assert same_bits(results(optimizer), before)
    optimizer.step()
    optimizer.zero_grad()
    fit(module, optimizer, 1)


def test_a_parameter_used_twice_is_stepped_once():
    """Autograd hands over the sum. Reentrant checkpoints hand over parts: refused."""
    (plain, expected), (module, optimizer) = pair()
    step_in_backward(module, optimizer)
    for m, opt in ((plain, expected), (module, optimizer)):
        (loss_of(m, 0) + loss_of(m, 1)).backward()
        opt.step()
    assert same_bits(results(optimizer), results(expected))
    bias, x = module[0].bias, torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="second gradient"):
        (x + bias + checkpoint(lambda y: y + bias, x, use_reentrant=True)).sum().backward()


def test_after_a_backward_that_raised():
    (plain, expected), (module, optimizer) = pair()
    step_in_backward(module, optimizer)
    hook = module[3].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(module, 0).backward()
    hook.remove()
    optimizer.step()  # takes what had arrived
    assert all(p.grad is None for p in module[3:].parameters())
    loss_of(module, 1).backward()
    assert all(p.grad is None for p in module.parameters())  # and the next one ends as it should
    optimizer.step()
    loss_of(plain, 0).backward()
    for p in plain[:4].parameters():
        p.grad = None
    expected.step()
    expected.zero_grad()
    fit(plain, expected, 1, first=1)
    for ours, theirs in zip(results(optimizer)[6:], results(expected)[6:], strict=True):
        assert ours["step"] == theirs["step"] == 2


@pytest.mark.parametrize("bucket_bytes", [1, 32 << 20])
def test_zero_grad_after_a_backward_that_raised_starts_over(bucket_bytes):
    """As loops do that skip a batch which runs out of memory. The next backward used to raise, and
    all after it.
    """
    (plain, expected), (module, optimizer) = pair()
    step_in_backward(module, optimizer, bucket_bytes=bucket_bytes)
    start = [p.detach().clone() for p in module.parameters()]
    hook = module[3].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(module, 0).backward()
    hook.remove()
    updated = [
        not torch.equal(p, before) for p, before in zip(module.parameters(), start, strict=True)
    ]
    assert any(updated) is (bucket_bytes == 1)
    optimizer.zero_grad()
    fit(module, optimizer)
    fit(plain, expected)
    assert optimizer.state[module[0].weight]["step"] == 4
    if bucket_bytes > 1:  # what was updated before the error stays updated
        assert same_bits(results(optimizer), results(expected))


def test_zero_grad_after_whole_backwards_still_refuses_a_second_gradient():
    module, optimizer = pair()[0]
    step_in_backward(module, optimizer)
    loss_of(module, 0).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"second gradient before optimizer\.step"):
        loss_of(module, 1).backward()


def test_parameters_are_listed_once_per_bucket(monkeypatch):
    """Once per parameter, backward over 2000 small ones took ten times as long."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(50)]
    optimizer = FusedAdamW(params)
    step_in_backward(params, optimizer)
    lists = []
    method = optimizer._params
    monkeypatch.setattr(optimizer, "_params", lambda: lists.append(1) or method())
    for _ in range(3):
        lists.clear()
        sum(p.sum() for p in params).backward()
        assert len(lists) == 1
        optimizer.step()


@pytest.mark.parametrize("matrices_alone", [False, True])
def test_backward_in_a_closure(matrices_alone):
    """As Lightning runs it: the closure's loss comes back, and nothing is stepped twice."""
    (plain, expected), (module, optimizer) = pair()
    step_in_backward(
        [p for p in module.parameters() if p.ndim == 2 or not matrices_alone], optimizer
    )
    for step in range(3):
        losses = []
        for m, opt in ((plain, expected), (module, optimizer)):

            def closure(m=m, opt=opt, step=step):
                opt.zero_grad()
                loss = loss_of(m, step)
                loss.backward()
                return loss

            losses.append(opt.step(closure))
        assert torch.equal(*losses)
    assert same_bits(results(optimizer), results(expected))
    assert all(entry["step"] == 3 for entry in results(optimizer))


def test_a_closure_that_does_nothing_ends_the_round():
    (plain, expected), (module, optimizer) = pair()
    step_in_backward(module, optimizer)
    for step in range(2):
        loss_of(plain, step).backward()
        expected.step()
        expected.zero_grad()
        loss_of(module, step).backward()
        assert optimizer.step(lambda: 3.0) == 3.0
    assert same_bits(results(optimizer), results(expected))


def test_a_closure_after_backward_gives_no_second_step():
    module, optimizer = pair()[0]
    step_in_backward(module, optimizer)
    loss_of(module, 0).backward()
    before = results(optimizer)
    with pytest.raises(RuntimeError, match=r"second gradient before optimizer\.step"):
        optimizer.step(lambda: loss_of(module, 1).backward())
    assert same_bits(results(optimizer), before)


def test_copies_do_not_step_in_backward():
    import copy

    module, optimizer = pair()[0]
    step_in_backward(module, optimizer)
    assert copy.deepcopy(optimizer)._engine.in_backward is None


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (
                {"max_grad_norm": 1.0},
                "max_grad_norm=1.0 cannot be combined with .* because the norm needs all gradients",
            ),
            ({"skip_nonfinite": True}, "skip_nonfinite=True cannot be combined with"),
            (
                {"skip_grad_norm": 2.0},
                "skip_grad_norm=2.0 cannot be combined with .* the norm needs",
            ),
            (
                {"skip_grad_norm": torch.zeros(())},
                r"skip_grad_norm=tensor\(0.\) cannot be combined",
            ),
            ({"flatten": True}, "flatten=True cannot be combined with .* stay"),
            ({"differentiable": True}, "differentiable=True cannot be combined with"),
        ],
    )
    def test_options(self, options, match):
        module = model()
        with pytest.raises(ValueError, match=match):
            step_in_backward(module, FusedAdam(module.parameters(), **options))
        assert not any(p._post_accumulate_grad_hooks for p in module.parameters())

    @pytest.mark.parametrize("bucket_bytes", [0, -1, 1.5, True, "1"])
    def test_bucket_bytes(self, bucket_bytes):
        module, optimizer = pair()[0]
        with pytest.raises(
            ValueError, match=r"bucket_bytes=.* must be a whole number of bytes above 0"
        ):
            step_in_backward(module, optimizer, bucket_bytes=bucket_bytes)

    def test_other_optimizers_and_strangers(self):
        module, optimizer = pair()[0]
        with pytest.raises(TypeError, match="optimizer is a Adam, but must be a FusedAdam"):
            step_in_backward(module, torch.optim.Adam(module.parameters()))
        with pytest.raises(
            ValueError, match="parameter 1 of model_or_params is not one of the optimizer's"
        ):
            step_in_backward([next(module.parameters()), nn.Parameter(torch.ones(1))], optimizer)
        step_in_backward(module, optimizer)
        with pytest.raises(ValueError, match="steps in backward already; call remove"):
            step_in_backward(module, optimizer)

    def test_grad_scalers(self):
        module, optimizer = pair(fused=True)[0]
        step_in_backward([p for p in module.parameters() if p.ndim == 2], optimizer)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(module, 0)).backward()
        with pytest.raises(
            RuntimeError, match="a GradScaler cannot be combined with step_in_backward"
        ):
            scaler.step(optimizer)

    def test_several_processes(self, monkeypatch):
        module, optimizer = pair()[0]
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match="before they are averaged over processes"):
            step_in_backward(module, optimizer)
