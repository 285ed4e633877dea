"""CUDA graphs: what a captured step reads and writes at replay.

On a CPU a recorder stands in for the graph.
"""

import gc
import math
import weakref

import pytest
import torch
from graphs import CudaGraph, Recorder, params_of, set_gradients
from training import gradient, parameters, results, same_bits

from fused_adam import FusedAdamW


@pytest.fixture
def graph(kernel_device, monkeypatch):
    return Recorder(monkeypatch) if kernel_device == "cpu" else CudaGraph()


def optimizer_on(where, shapes=((5,), (33, 3), ()), **options):
    optimizer = FusedAdamW(
        parameters(torch.float32, shapes, where), backend="triton", capturable=True, **options
    )
    if optimizer._flatten:  # gradients lie in the buffers when there has been one
        set_gradients(optimizer, 0)
        optimizer.zero_grad()
    return optimizer


def eager(optimizer, steps, **options):
    for step in steps:
        set_gradients(optimizer, step, in_place=optimizer._flatten, **options)
        optimizer.step()


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.1}, {"skip_nonfinite": True, "amsgrad": True}], ids=str
)
@pytest.mark.parametrize("flatten", [False, True])
def test_replays_equal_eager_steps(graph, kernel_device, flatten, options):
    """Eager steps before, between and after replays change nothing, wherever gradients are."""
    captured, plain = (optimizer_on(kernel_device, flatten=flatten, **options) for _ in range(2))
    eager(captured, [0, 1, 2])
    set_gradients(captured, 3, in_place=flatten)
    captured.state[params_of(captured)[0]]  # looking at the state needs no new plan
    graph.capture(captured.step)
    fixed = [p.grad for p in params_of(captured)]
    for step in (3, 4):
        set_gradients(captured, step, in_place=True)
        graph.replay()
    eager(captured, [5])
    for p, grad in zip(params_of(captured), fixed, strict=True):
        p.grad = grad
    set_gradients(captured, 6, in_place=True)
    graph.replay()
    eager(captured, [7])

    eager(plain, range(8))
    assert same_bits(results(captured), results(plain))
    if options.get("max_grad_norm"):
        assert captured.grad_norm == plain.grad_norm


def test_hyper_parameters_on_the_device_change_between_replays(graph, kernel_device):
    def number(value):
        return torch.tensor(value, device=kernel_device)

    lr, beta1, beta2, decay, eps = (number(x) for x in (1e-2, 0.9, 0.99, 0.1, 1e-6))
    captured = optimizer_on(kernel_device, lr=lr, betas=(beta1, beta2), weight_decay=decay, eps=eps)
    eager(captured, [0])
    set_gradients(captured, 1)
    graph.capture(captured.step)
    plain = optimizer_on(kernel_device, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-6)
    plain.param_groups[0].update(lr=lr.item(), betas=(beta1.item(), beta2.item()))
    plain.param_groups[0].update(weight_decay=decay.item(), eps=eps.item())  # as rounded to float32
    eager(plain, [0])
    for step, values in enumerate(
        [(1e-2, 0.9, 0.99, 0.1, 1e-6), (5e-3, 0.8, 0.9, 0.0, 1e-3), (0.0, 0.8, 0.9, 0.0, 1e-3)]
    ):
        for tensor, value in zip((lr, beta1, beta2, decay, eps), values, strict=True):
            tensor.fill_(value)
        set_gradients(captured, step + 1, in_place=True)
        graph.replay()
        plain.param_groups[0].update(lr=lr.item(), betas=(beta1.item(), beta2.item()))
        plain.param_groups[0].update(weight_decay=decay.item(), eps=eps.item())
        eager(plain, [step + 1])
        assert same_bits(results(captured), results(plain))


def test_the_decay_of_averages_is_read_at_replay(graph, kernel_device):
    decay = torch.tensor(0.5, device=kernel_device)
    captured = optimizer_on(kernel_device, ema_decay=decay)
    eager(captured, [0])
    set_gradients(captured, 1)
    graph.capture(captured.step)
    plain = optimizer_on(kernel_device, ema_decay=0.5)
    eager(plain, [0])
    for step, value in ((1, 0.5), (2, 0.0), (3, 0.75)):  # exact in float32
        decay.fill_(value)
        set_gradients(captured, step, in_place=True)
        graph.replay()
        plain.param_groups[0]["ema_decay"] = value
        eager(plain, [step])
        assert same_bits(results(captured), results(plain))


def test_the_limit_of_spikes_is_read_at_replay(graph, kernel_device):
    limit = torch.tensor(math.inf, device=kernel_device)
    captured = optimizer_on(kernel_device, skip_grad_norm=limit, weight_decay=0.1, cautious=True)
    eager(captured, [0])
    set_gradients(captured, 1)
    graph.capture(captured.step)
    plain = optimizer_on(kernel_device, weight_decay=0.1, cautious=True)
    eager(plain, [0])
    for step, value in ((1, math.inf), (2, 1e-3), (3, 1e3), (4, -1.0)):
        limit.fill_(value)
        set_gradients(captured, step, in_place=True)
        graph.replay()
        if value > 1:
            eager(plain, [step])
        assert same_bits(results(captured), results(plain))
    assert captured.skipped_steps == 2


def test_a_scalers_flag_and_scale_are_read_at_replay(graph, kernel_device):
    captured, plain = (
        optimizer_on(kernel_device, fused=True, skip_nonfinite=True) for _ in range(2)
    )
    flag, scale = (torch.zeros((), device=kernel_device) for _ in range(2))
    captured.found_inf, captured.grad_scale = flag, scale.fill_(2.0)
    eager(captured, [0], scale=2.0)
    set_gradients(captured, 1)
    graph.capture(captured.step)
    eager(plain, [0])
    for step, overflow, factor in ((1, 0.0, 4.0), (2, 1.0, 4.0), (3, 2.0, 1.0), (4, 0.0, 1.0)):
        flag.fill_(overflow)
        scale.fill_(factor)
        set_gradients(captured, step, scale=factor, in_place=True)
        graph.replay()
        if not overflow:
            eager(plain, [step])
    set_gradients(captured, 5, scale=float("inf"), in_place=True)
    graph.replay()
    assert same_bits(results(captured), results(plain))
    assert captured.skipped_steps == 3


def test_an_eager_step_after_a_capture_that_never_ran(graph, kernel_device):
    """What the captured step uploads is not on the device before a replay."""
    captured, plain = (optimizer_on(kernel_device) for _ in range(2))
    eager(captured, [0])
    set_gradients(captured, 1)
    graph.capture(captured.step)
    captured.step()
    eager(plain, [0, 1])
    assert same_bits(results(captured), results(plain))


def test_strided_gradients_are_copied_at_replay(graph, kernel_device):
    captured, plain = (optimizer_on(kernel_device, [(4, 6)]) for _ in range(2))
    buffer = torch.zeros(6, 4, device=kernel_device)
    [p] = params_of(captured)
    for step in range(3):
        buffer.copy_(gradient(p, 0, step).t())
        p.grad = buffer.t()
        graph.capture(captured.step) if step == 1 else None
        graph.replay() if step else captured.step()
    eager(plain, range(3))
    assert same_bits(results(captured), results(plain))


def test_two_graphs_of_one_optimizer(kernel_device, monkeypatch):
    """Each with gradients of its own, one captured right after the other."""
    captured, plain = (optimizer_on(kernel_device) for _ in range(2))
    eager(captured, [0])
    eager(plain, range(4))
    graphs, kept = [], []
    for _ in range(2):
        if kernel_device == "cpu":
            monkeypatch.undo()
        graphs.append(Recorder(monkeypatch) if kernel_device == "cpu" else CudaGraph())
        set_gradients(captured, 0)
        graphs[-1].capture(captured.step)
        kept.append([p.grad for p in params_of(captured)])
    for step in (1, 2, 3):
        for i, (p, grad) in enumerate(zip(params_of(captured), kept[step % 2], strict=True)):
            grad.copy_(gradient(p, i, step))
        graphs[step % 2].replay()
    assert same_bits(results(captured), results(plain))


class TestRefused:
    """Each with what to do about it, and before anything is changed."""

    def refused(self, graph, optimizer, match):
        before = results(optimizer)
        with pytest.raises(RuntimeError, match=match):
            graph.capture(optimizer.step)
        assert same_bits(results(optimizer), before)

    @pytest.fixture
    def graph(self, monkeypatch):
        return Recorder(monkeypatch)

    def test_a_first_step(self, graph):
        optimizer = optimizer_on("cpu")
        set_gradients(optimizer, 0)
        self.refused(graph, optimizer, "run a step with the same parameters, .* before the capture")

    def test_gradients_of_another_layout(self, graph):
        optimizer = optimizer_on("cpu", [(4, 6)])
        eager(optimizer, [0])
        [p] = params_of(optimizer)
        p.grad = gradient(p, 0, 1).t().contiguous().t()
        self.refused(graph, optimizer, "gradients of the same layout, before the capture")
        optimizer.step()
        graph.capture(optimizer.step)

    def test_the_reference(self, graph):
        optimizer = FusedAdamW(parameters(torch.float32), capturable=True, backend="reference")
        eager(optimizer, [0])
        set_gradients(optimizer, 1)
        self.refused(
            graph,
            optimizer,
            "backend='reference' cannot be captured in a CUDA graph; use backend='triton'",
        )

    def test_without_capturable(self, graph, monkeypatch):
        """torch's own check and text."""
        optimizer = optimizer_on("cpu")
        optimizer.param_groups[0]["capturable"] = False
        # As torch 2.11 asks, and as 2.13 does.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda")
        )
        monkeypatch.setattr(
            torch.accelerator,
            "current_stream",
            lambda: type("", (), {"is_capturing": lambda _: True})(),
        )
        self.refused(
            graph,
            optimizer,
            "Attempting CUDA graph capture of step.. for an instance of FusedAdamW",
        )


def no_driver():
    raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")


def test_a_step_on_the_host_asks_no_cuda_driver(monkeypatch):
    """torch's CUDA build on a machine without a driver: the question alone raises there."""
    if torch.cuda.is_initialized():
        pytest.skip("this process uses a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", no_driver)
    optimizer = optimizer_on("cpu")
    eager(optimizer, range(2))
    optimizer.offload()
    optimizer.reload()
    assert all(entry["step"] == 2 for entry in optimizer.state.values())


def _load(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def _write_a_counter(optimizer):
    optimizer.state[params_of(optimizer)[0]]["step"].add_(0)


def _add_a_group(optimizer):
    where = params_of(optimizer)[0].device
    optimizer.add_param_group({"params": parameters(torch.float32, [(6,)], where)})


def _replace_state(optimizer):
    for entry in optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].clone()


EDITS = [_load, _write_a_counter, _add_a_group, _replace_state]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("flatten", [False, True])
def test_what_a_graph_uses_lives_as_long_as_the_optimizer(monkeypatch, flatten, edit):
    """Tables, scalars and state, although an eager step after an edit makes others.

    A replay read recycled memory.
    """
    graph, optimizer = (
        Recorder(monkeypatch),
        optimizer_on("cpu", flatten=flatten, max_grad_norm=1.0),
    )
    eager(optimizer, [0, 1])
    set_gradients(optimizer, 2, in_place=True)
    graph.capture(optimizer.step)
    tensors = [arg for _, args in graph.work for arg in args if isinstance(arg, torch.Tensor)]
    tables = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    param_states = optimizer._engine.arena.param_states.values()
    state = [weakref.ref(slot.segment) for home in param_states for slot in home.slots.values()]
    graph.work.clear()
    del tensors
    edit(optimizer)
    for step in (3, 4):
        set_gradients(optimizer, step)
        optimizer.step()
    gc.collect()
    assert tables and all(ref() is not None for ref in [*tables, *state])
    optimizer.offload()  # after which no graph may be replayed
    gc.collect()
    assert any(ref() is None for ref in tables)


@pytest.mark.parametrize(
    "edit", [_load, _write_a_counter, _add_a_group], ids=lambda edit: edit.__name__
)
def test_a_graph_goes_on_after_an_eager_step_with_other_tables(graph, kernel_device, edit):
    captured, plain = (optimizer_on(kernel_device) for _ in range(2))
    eager(captured, [0])
    set_gradients(captured, 1)
    graph.capture(captured.step)
    fixed = [p.grad for p in params_of(captured)]
    for optimizer in (captured, plain):
        if optimizer is plain:
            eager(plain, [0])
        edit(optimizer)
        eager(optimizer, [1])
    junk = [torch.full((1000,), 7.0, device=kernel_device) for _ in range(50)]
    for p, grad in zip(params_of(captured), fixed, strict=False):
        p.grad = grad
    for step in (2, 3):
        for i, grad in enumerate(fixed):
            grad.copy_(gradient(grad, i, step))
        graph.replay()
        for i, p in enumerate(params_of(plain)):
            p.grad = gradient(p, i, step) if i < len(fixed) else None
        plain.step()
    assert same_bits(results(captured), results(plain)) and junk


def test_views_count_as_gradients_where_versions_cannot_tell(monkeypatch):
    """With `capturable=True`, and after `zero_grad()` in a capture.

    A replay writes gradients, and no version counts them.
    """
    graph = Recorder(monkeypatch)
    for capturable in (True, False):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = FusedAdamW([param], flatten=True, capturable=capturable, backend="triton")
        param.grad = torch.ones(3)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.state[param]["step"] == 1 + capturable
        graph.capture(optimizer.zero_grad)
        optimizer.step()
        assert optimizer.state[param]["step"] == 2 + capturable


@pytest.mark.gpu
def test_a_captured_backward_is_noticed():
    """Its gradients are not lost to the eager steps and `zero_grad()` around it.

    No version counter shows that a replay has written them.
    """
    weight = torch.nn.Parameter(torch.ones(8, device="cuda"))
    optimizer = FusedAdamW([weight], flatten=True)
    x = torch.linspace(1, 2, 8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            (weight * x).sum().backward()
            optimizer.step()
        optimizer.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (weight * x).sum().backward()
    for _ in range(4):
        optimizer.zero_grad()
        graph.replay()
        optimizer.step()
    assert optimizer.state[weight]["step"] == 7
