"""What a step asks of the host and the device: launches, uploads, waits and plans.

They are counted, never timed.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from training import gradient, parameters, results, same_bits

from fused_adam import FusedAdamW
from fused_adam.backends import reference as host
from fused_adam.backends import tables
from fused_adam.state import param_state
from fused_adam_kernels import table
from fused_adam_kernels.launch import Launcher

MIXED = [
    (torch.float32, [(5,), (33, 3)]),
    (torch.bfloat16, [(7,), (2, 2)]),
    (torch.float16, [(9,)]),
]


def mixed_groups(where="cpu"):
    """A group per dtype, so that nothing depends on groups."""
    return [{"params": parameters(dtype, shapes, where)} for dtype, shapes in MIXED]


def set_gradients(optimizer, step, skip=()):
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = None if i in skip else gradient(p, i, step)


def change_everything(optimizer, step):
    """Change all that needs no new plan: floats, tensors, GradScaler's flag and scale."""
    for group in optimizer.param_groups:
        group.update(
            lr=0.1 / (step + 1),
            betas=(0.5, 0.9 + step / 100),
            eps=1e-6 * (step + 1),
            weight_decay=0.1 * step,
        )
        group["maximize"] = step % 2 == 1
        if step % 3 == 2:
            group.update(lr=torch.tensor(0.01 * step), weight_decay=torch.tensor(0.1))
    optimizer.found_inf = (None, torch.zeros(()), torch.ones(1))[step % 3]
    optimizer.grad_scale = (None, torch.full((), 4.0))[step % 2]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"skip_nonfinite": True, "amsgrad": True},
        {"skip_grad_norm": 1.0, "cautious": True},
        {"max_grad_norm": 1.0, "ema_decay": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("flatten", [False, True])
def test_launches_follow_the_formula(launches, flatten, options):
    """One prologue and one update per dtype mix.

    With a norm, also one launch per gradient dtype, and one that adds up.
    """
    optimizer = FusedAdamW(mixed_groups(), backend="triton", flatten=flatten, **options)
    for step in range(6):
        set_gradients(optimizer, step)
        change_everything(optimizer, step)
        launches.clear()
        optimizer.step()
        norm = ["square_sum_kernel"] * 3 + ["total_kernel"]
        assert launches == (norm if options else []) + [
            "prologue_kernel",
            *["adam_kernel"] * 3,
        ]


def test_launchers_are_held_whatever_changes(monkeypatch):
    """A new launcher in mid-training would compile, or look up what is compiled."""
    made = []
    init = Launcher.__init__
    monkeypatch.setattr(
        Launcher, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1]
    )
    optimizer = FusedAdamW(mixed_groups(), backend="triton", max_grad_norm=1.0)
    for step in range(6):
        set_gradients(optimizer, step)
        change_everything(optimizer, step)
        optimizer.step()
        assert len(made) == 1 + 3 + 3 + 1


@pytest.fixture
def uploads(monkeypatch):
    """Shapes of the tables sent to the device."""
    shapes = []
    send = tables.send
    monkeypatch.setattr(
        tables, "send", lambda host, where: (shapes.append(tuple(host.shape)), send(host, where))[1]
    )
    return shapes


def test_uploads_only_what_changed(uploads):
    optimizer = FusedAdamW(parameters(torch.float32, [(5,), (7, 3)]), backend="triton")
    set_gradients(optimizer, 0)
    optimizer.step()
    rows, hyper = (2, table.ROW), (1, table.HYPER)
    assert uploads == [rows, hyper]
    kept = []
    for change, expected in (
        (lambda: None, []),
        (lambda: optimizer.param_groups[0].update(lr=0.5), [hyper]),
        (
            lambda: (kept.extend(p.grad for p in optimizer._params()), set_gradients(optimizer, 1)),
            [rows],
        ),
        (lambda: optimizer.param_groups[0].update(lr=torch.tensor(0.5)), [hyper]),
        (lambda: optimizer.param_groups[0]["lr"].fill_(0.1), []),
    ):
        uploads.clear()
        change()
        optimizer.step()
        assert uploads == expected


def test_tables_made_in_inference_mode_serve_outside_it():
    optimizer = FusedAdamW(
        parameters(torch.float32, [(5,)]), lr=torch.tensor(0.1), backend="triton", max_grad_norm=1.0
    )
    plain = FusedAdamW(parameters(torch.float32, [(5,)]), lr=torch.tensor(0.1), max_grad_norm=1.0)
    for step in range(3):
        set_gradients(optimizer, step)
        set_gradients(plain, step)
        with torch.inference_mode(step == 0):
            optimizer.step()
        plain.step()
    assert same_bits(results(optimizer), results(plain))


class Waits(TorchDispatchMode):
    """Raises at whatever would wait for a GPU: reading a value of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("flatten", [False, True])
def test_no_step_reads_the_device(monkeypatch, flatten):
    """From the first step on, with new plans and changed values. Launches are stubbed."""

    def read(*_):
        raise AssertionError("a tensor's values are read")

    monkeypatch.setattr(Launcher, "__call__", lambda *_: None)
    monkeypatch.setattr(
        param_state, "reads_cost_nothing", lambda tensor: False
    )  # the CPU stands in for a GPU
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, read)
    for options in ({}, {"max_grad_norm": 1.0, "skip_nonfinite": True, "amsgrad": True}):
        optimizer = FusedAdamW(mixed_groups(), backend="triton", flatten=flatten, **options)
        for step in range(6):
            set_gradients(optimizer, step, skip=(1, 2) if step in (2, 4) else ())
            change_everything(optimizer, step)
            with Waits():
                optimizer.step()
    with pytest.raises(AssertionError, match="waits for the device"), Waits():
        float(torch.ones(()))


@pytest.mark.gpu
@pytest.mark.parametrize("flatten", [False, True])
def test_no_step_waits_for_the_gpu(flatten):
    optimizer = FusedAdamW(mixed_groups("cuda"), flatten=flatten, max_grad_norm=1.0)
    for step in range(6):
        set_gradients(optimizer, step, skip=(1, 2) if step in (2, 4) else ())
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_parameters_on_a_gpu_and_the_cpu_share_one_norm():
    both = [*parameters(torch.float32, [(300,)], "cuda"), *parameters(torch.float32, [(200, 3)])]
    alone = [p.detach().cpu().requires_grad_() for p in both]
    optimizers = [FusedAdamW(params, max_grad_norm=0.1) for params in (both, alone)]
    for step in range(3):
        for optimizer in optimizers:
            set_gradients(optimizer, step)
            optimizer.step()
        torch.testing.assert_close(optimizers[0].grad_norm.cpu(), optimizers[1].grad_norm)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_compiled_training_step(backend):
    """torch.compile around the whole step compiles once, and trains alike.

    It breaks the graph at the optimizer.
    """
    runs, counter = [], CompileCounter()
    for compile_ in (lambda f: f, lambda f: torch.compile(f, backend=counter)):
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 1)
        )
        optimizer = FusedAdamW(module.parameters(), lr=1e-2, backend=backend, max_grad_norm=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        def train_step(x, module=module, optimizer=optimizer):
            module(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        train_step = compile_(train_step)
        frames = []
        for step in range(8):
            train_step(gradient(torch.empty(4, 6), 0, step))
            scheduler.step()
            frames.append(counter.frame_count)
        runs.append(results(optimizer))
    assert same_bits(*runs)
    assert (
        frames[1] > 0 and len(set(frames[1:])) == 1
    )  # nothing is compiled anew when the learning rate changes


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_small_tensors_among_large_ones_are_updated_as_one_on_the_host(backend, monkeypatch):
    """In a transformer, biases and norms stand between matrices.

    A call for each would cost more than the work in it.
    """
    updated = []
    update = host.ReferenceRows.update
    monkeypatch.setattr(
        host.ReferenceRows,
        "update",
        lambda self, *args: (updated.append(self.numel), update(self, *args))[1],
    )
    optimizer = FusedAdamW(
        parameters(torch.float32, [(7,), (20000,), (5, 3), (20000,), (40,)]), backend=backend
    )
    set_gradients(optimizer, 0)
    optimizer.step()
    assert sorted(updated) == [32 + 32 + 40, 20000, 20000]
