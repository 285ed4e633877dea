"""The reference in numpy, chunk by chunk on several threads: same bits as in plain torch."""

import threading

import pytest
import torch
from training import parameters, results, same_bits, train

from fused_adam import FusedAdam, FusedAdamW
from fused_adam.backends import array_chunks
from fused_adam.numerics import formula

SHAPES = [(70001,), (40000,), (130, 513), (5,), (33, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained(dtype, optimizer_class=FusedAdamW, **options):
    optimizer = optimizer_class(parameters(dtype, SHAPES), lr=1e-2, weight_decay=0.1, **options)
    train(optimizer, 3)
    return results(optimizer)


@pytest.fixture
def threads():
    """Several of them, whatever this machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}], ids=str)
@pytest.mark.parametrize("optimizer_class", [FusedAdam, FusedAdamW])
def test_numpy_has_the_bits_of_torch(optimizer_class, options, dtype, threads, monkeypatch):
    in_numpy = trained(dtype, optimizer_class, **options)
    monkeypatch.setattr(formula, "NUMPY", None)
    assert same_bits(in_numpy, trained(dtype, optimizer_class, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_and_threads_do_not_matter(dtype, threads, monkeypatch):
    together = trained(dtype)
    monkeypatch.setattr(array_chunks, "FLOAT32_CHUNK", 1000)
    monkeypatch.setattr(array_chunks, "CONVERTED_CHUNK", 1000)
    assert same_bits(trained(dtype), together)
    torch.set_num_threads(1)
    assert same_bits(trained(dtype), together)


def test_a_step_in_inference_mode_on_several_threads(threads):
    with torch.inference_mode():
        params = parameters(torch.bfloat16, SHAPES)
        optimizer = FusedAdamW(params, lr=1e-2, weight_decay=0.1)
        train(optimizer, 3)
    assert same_bits(results(optimizer), trained(torch.bfloat16))


def test_nobody_writes_after_an_interrupt(threads, monkeypatch):
    """Other threads finish the chunk they are at, and take no other."""
    step, main = array_chunks.Workspace.step, threading.main_thread()
    stepped, interrupt = [], threading.Event()

    def interrupted(self, chunk):
        if threading.current_thread() is main:
            interrupt.set()
            raise KeyboardInterrupt
        interrupt.wait()  # or they could be done before the main thread has taken a chunk
        step(self, chunk)
        stepped.append(chunk)

    optimizer = FusedAdamW(parameters(torch.float32, [(1 << 21,)]))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1 << 21)
    monkeypatch.setattr(array_chunks.Workspace, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    count = len(stepped)
    param = optimizer.param_groups[0]["params"][0].detach().clone()
    threading.Event().wait(0.05)
    assert len(stepped) == count and torch.equal(param, optimizer.param_groups[0]["params"][0])


def test_users_storages_stay_resizable():
    """A view of numpy's makes a storage unresizable, which FSDP resizes."""
    optimizer = FusedAdamW(parameters(torch.float32, [(40000,)]))
    train(optimizer, 1)
    (param,) = optimizer.param_groups[0]["params"]
    for tensor in (param, param.grad):
        tensor.untyped_storage().resize_(0)
