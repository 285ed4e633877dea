"""Long runs hold on to nothing; threads and processes do not disturb each other. Counts and bits,
no times.
"""

import functools
import gc
import multiprocessing
import pathlib
import resource
import sys
import threading

import pytest
import torch
from training import gradient, parameters, results, same_bits, train

from fused_adam import FusedAdam, FusedAdamW
from fused_adam.backends import compiled, reference
from fused_adam.engine import Engine
from fused_adam_kernels.launch import Launcher

SHAPES = [(), (5,), (0, 3), (33, 4), (129,)]
PATTERNS = [(), (0,), (1, 3), (4,)]  # parameters without a gradient
ROUND = 24  # steps until zero_grad and missing gradients come back together
PAGE = resource.getpagesize()


class Counts:
    """What a step must not add to."""

    def __init__(self, patch):
        self.builds = self.launchers = 0
        for owner, name, key in ((Engine, "_build", "builds"), (Launcher, "__init__", "launchers")):
            patch.setattr(owner, name, self._counted(getattr(owner, name), key))

    def _counted(self, function, key):
        @functools.wraps(function)
        def counted(*args):
            setattr(self, key, getattr(self, key) + 1)
            return function(*args)

        return counted

    def now(self):
        """Decisions anew, launchers made, compiled variants, live tensors."""
        gc.collect()
        tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
        return self.builds, self.launchers, compiled.compiled_step.cache_info().currsize, tensors


def in_use():
    """Bytes of the process, blocks and objects of Python."""
    resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE
    return resident, sys.getallocatedblocks(), len(gc.get_objects())


def live_through(optimizer, steps, first):
    """Changing values, gradients that come and go at new addresses, every kind of zero_grad."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        optimizer.zero_grad(set_to_none=step % 3 > 0)
        missing = PATTERNS[step // 2 % len(PATTERNS)]
        for i, p in enumerate(params):
            if i in missing:
                p.grad = None
            elif p.grad is None:
                p.grad = gradient(p, i, step % 7)
            else:
                p.grad += gradient(p, i, step % 7)
        for group in optimizer.param_groups:
            group.update(
                lr=1e-3 / (1 + step % 11),
                betas=(0.9 - step % 2 / 10, 0.999),
                weight_decay=step % 4 / 100,
            )
        optimizer.step()


def soak(optimizer, rounds, patch):
    """After a tenth of them nothing more is made or kept. Returns the bytes, blocks and objects
    that a step adds.
    """
    counts, first = Counts(patch), ROUND * (2 + rounds // 10)
    live_through(optimizer, first, 0)
    before, memory = counts.now(), in_use()
    steps = ROUND * rounds - first
    live_through(optimizer, steps, first)
    assert counts.now() == before
    return [(now - then) / steps for now, then in zip(in_use(), memory, strict=True)]


every_kind = pytest.mark.parametrize(
    "options",
    [
        {},
        {"flatten": True, "max_grad_norm": 1.0},
        {"precision": "native-int8", "skip_nonfinite": True},
    ],
    ids=["plain", "flatten", "native-int8"],
)


@every_kind
def test_a_short_soak(options, monkeypatch):
    optimizer = FusedAdamW(parameters(torch.float32, SHAPES), **options)
    *_, objects = soak(optimizer, 12, monkeypatch)
    assert objects < 0.1


@pytest.mark.long
@every_kind
def test_a_long_soak(options, monkeypatch):
    optimizer = FusedAdamW(parameters(torch.float32, SHAPES), **options)
    resident, blocks, _ = soak(optimizer, 834, monkeypatch)
    print(f"{options}: a step adds {resident:.1f} bytes and {blocks:.4f} blocks")
    assert blocks < 0.05
    assert resident < 64  # less than the smallest tensor


@pytest.mark.long
@pytest.mark.parametrize(("backend", "rounds"), [("compiled", 834), ("triton", 12)])
def test_a_soak_of_compiled_code(backend, rounds, monkeypatch):
    optimizer = FusedAdamW(parameters(torch.float32, SHAPES), backend=backend)
    *_, objects = soak(optimizer, rounds, monkeypatch)
    assert objects < 0.1


def test_what_a_step_keeps_is_seen(monkeypatch):
    kept, begin = [], reference.ReferenceRunner.begin

    def keeping(self, grads, *rest):
        kept.append(grads[0] * 2)
        begin(self, grads, *rest)

    monkeypatch.setattr(reference.ReferenceRunner, "begin", keeping)
    with pytest.raises(AssertionError):
        soak(FusedAdamW(parameters(torch.float32, SHAPES)), 12, monkeypatch)


# Threads and processes
# ------------------------------------------------------------------------------------------------

RUNS = [
    {"lr": 1e-2},
    {"lr": 1e-2, "flatten": True, "max_grad_norm": 1.0},
    {"lr": 1e-2, "precision": "native-int8", "seed": 3},
]


def trained(options, steps):
    optimizer = FusedAdam(parameters(torch.float32, SHAPES), **options)
    train(optimizer, steps)
    return optimizer


@pytest.mark.parametrize("first", RUNS, ids=str)
@pytest.mark.parametrize("second", RUNS[:2], ids=str)
def test_two_threads_have_the_bits_of_one(first, second):
    alone = [results(trained(options, 40)) for options in (first, second)]
    together, start = [None, None], threading.Barrier(2)

    def run(i, options):
        start.wait()
        together[i] = results(trained(options, 40))

    threads = [
        threading.Thread(target=run, args=(i, options)) for i, options in enumerate((first, second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(*pair) for pair in zip(alone, together, strict=True))


def as_lists(found):
    return [{key: value.tolist() for key, value in entry.items()} for entry in found]


def go_on(optimizer, sender):
    """In the child."""
    torch.set_num_threads(1)
    train(optimizer, 2, first=3)
    sender.send(as_lists(results(optimizer)))


def of_child(start_method, optimizer):
    """What two further steps in a child give, as lists."""
    context = multiprocessing.get_context(start_method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=go_on, args=(optimizer, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning"
)  # Python 3.12's, where there are threads
@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_forked_child_goes_on_and_the_parent_too(options):
    optimizer, uninterrupted = trained(options, 3), trained(options, 5)
    before = results(optimizer)
    assert of_child("fork", optimizer) == as_lists(results(uninterrupted))
    assert same_bits(results(optimizer), before)
    train(optimizer, 2, first=3)
    assert same_bits(results(optimizer), results(uninterrupted))


@pytest.mark.parametrize("options", RUNS[1:], ids=str)
def test_a_spawned_child_shares_parameters_and_state(options):
    """torch.multiprocessing sends tensors as shared memory: the parent's are the child's, as with
    torch's.
    """
    optimizer, uninterrupted = trained(options, 3), trained(options, 5)
    assert of_child("spawn", optimizer) == as_lists(results(uninterrupted))
    assert same_bits(results(optimizer), results(uninterrupted))
    for o in (optimizer, uninterrupted):
        train(o, 2, first=5)
    assert same_bits(results(optimizer), results(uninterrupted))
