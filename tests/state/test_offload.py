"""State on the host and back: the same bits, one copy per segment, nothing left behind, and what is
refused meanwhile.

On a CPU state stays where it is. So that there is something to move, `elsewhere` lets host memory
be other memory.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import gradient, parameters, results, same_bits, train, values

from fused_adam import FusedAdamW, step_in_backward
from fused_adam.backends import choose as backend
from fused_adam.precision import ENTRIES
from fused_adam.state import memory, offload

SHAPES = [(5,), (33, 3), (), (0, 3), (129,)]
RECIPES = ["master32", "split32-bf16", "split24-int8", "sr-bf16"]


@pytest.fixture
def elsewhere(monkeypatch):
    """A CPU stands in for the device."""
    monkeypatch.setattr(offload, "host_memory", torch.empty_like)


@pytest.fixture
def moving(kernel_device, monkeypatch):
    """The device that state moves away from: a GPU, or a CPU as `elsewhere`."""
    if kernel_device == "cpu":
        monkeypatch.setattr(offload, "host_memory", torch.empty_like)
    return kernel_device


def new(where="cpu", dtype=torch.float32, shapes=SHAPES, **options):
    """Two groups, of which one has AMSGrad."""
    params = parameters(dtype, shapes, where)
    groups = [{"params": params[::2]}, {"params": params[1::2], "amsgrad": True, "lr": 3e-2}]
    return FusedAdamW(groups, lr=1e-2, weight_decay=0.1, **options)


def members(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def stored(optimizer):
    """What is to be moved."""
    return [v for entry in optimizer.state.values() for k, v in entry.items() if k in ENTRIES]


def segments(optimizer):
    param_states = optimizer._engine.arena.param_states.values()
    return list(
        dict.fromkeys(slot.segment for home in param_states for slot in home.slots.values())
    )


def saved(state_dict):
    """The file, byte for byte."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    return file.getvalue()


def holders(storage):
    """Who else holds the memory."""
    return torch._C._storage_Use_Count(storage._cdata) - 1


def check_round_trip(optimizer, plain):
    """Three steps, away and back, two steps; twice, the second time without a step in between."""
    train(optimizer, 3)
    train(plain, 3)
    before = results(optimizer)
    for _ in range(2):
        here = [segment.untyped_storage() for segment in segments(optimizer)]
        optimizer.offload()
        assert same_bits(results(optimizer), before)
        assert [holders(storage) for storage in here] == [0] * len(here)
        optimizer.reload()
        assert same_bits(results(optimizer), before)
    train(optimizer, 2, first=3)
    train(plain, 2, first=3)
    assert same_bits(results(optimizer), results(plain))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str
)
def test_same_bits_as_without(moving, dtype, flatten):
    check_round_trip(*(new(moving, dtype, flatten=flatten) for _ in range(2)))


@pytest.mark.parametrize("precision", RECIPES)
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_same_bits_under_recipes(moving, name, precision):
    check_round_trip(
        *(new(moving, torch.bfloat16, precision=precision, backend=name) for _ in range(2))
    )


def test_same_bits_with_clipping_and_other_layouts(moving):
    def make():
        transposed = nn.Parameter(values((6, 4), 1, torch.float32).to(moving).T)
        strided = nn.Parameter(values((6, 4), 2, torch.float32).to(moving)[:, ::2])
        return FusedAdamW([transposed, strided], lr=1e-2, max_grad_norm=0.1, skip_nonfinite=True)

    check_round_trip(make(), make())


class Copies(TorchDispatchMode):
    """Elements of every copy made."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "copy" in func.name() or "clone" in func.name():
            self.numels.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit", [memory.SEGMENT_BYTES, 4 * 200])
def test_one_copy_per_segment(limit, elsewhere, monkeypatch):
    monkeypatch.setattr(memory, "SEGMENT_BYTES", limit)
    optimizer = new(shapes=SHAPES * 10)
    train(optimizer, 1)
    sizes = sorted(segment.numel() for segment in segments(optimizer))
    assert len(sizes) == 3 if limit > 800 else len(sizes) > 10
    for move in (optimizer.offload, optimizer.reload):
        with Copies() as copies:
            move()
        assert sorted(copies.numels) == sizes
        with Copies() as copies:
            move()  # once more: nothing to do
        assert copies.numels == []


def test_state_on_a_cpu_stays():
    optimizer, plain = new(), new()
    train(optimizer, 2)
    before = stored(optimizer)
    optimizer.offload()
    assert all(a is b for a, b in zip(stored(optimizer), before, strict=True))
    with pytest.raises(RuntimeError, match="call reload"):
        optimizer.step()
    optimizer.reload()
    train(optimizer, 2, first=2)
    train(plain, 4)
    assert same_bits(results(optimizer), results(plain))


def test_before_the_first_step_and_without_offload(elsewhere):
    optimizer, plain = new(), new()
    optimizer.reload()
    optimizer.offload()
    optimizer.offload()
    optimizer.reload()
    train(optimizer, 2)
    optimizer.reload()
    train(optimizer, 1, first=2)
    train(plain, 3)
    assert same_bits(results(optimizer), results(plain))


def test_under_inference_mode(elsewhere):
    optimizer, plain = new(), new()
    train(optimizer, 1)
    with torch.inference_mode():
        optimizer.offload()
        optimizer.reload()
    train(optimizer, 1, first=1)
    train(plain, 2)
    assert same_bits(results(optimizer), results(plain))
    assert not any(value.is_inference() for value in stored(optimizer))


def test_a_step_is_refused_before_anything_changes(elsewhere):
    optimizer = new()
    train(optimizer, 1)
    optimizer.offload()
    before = results(optimizer)
    with pytest.raises(RuntimeError, match=r"offloaded to the host: call reload\(\)"):
        optimizer.step(lambda: pytest.fail("the closure ran"))
    assert same_bits(results(optimizer), before)


def test_a_step_in_backward_is_refused(elsewhere):
    model = nn.Linear(3, 3)
    optimizer = FusedAdamW(model.parameters())
    step_in_backward(model, optimizer)
    optimizer.offload()
    before = results(optimizer)
    with pytest.raises(RuntimeError, match="call reload"):
        model(torch.ones(2, 3)).sum().backward()
    assert same_bits(results(optimizer), before) and not optimizer.state


def test_refused_while_capturing_and_with_differentiable(elsewhere, monkeypatch):
    params = parameters(torch.float32, SHAPES)
    for move in (FusedAdamW.offload, FusedAdamW.reload):
        with pytest.raises(RuntimeError, match="differentiable=True"):
            move(FusedAdamW(params, differentiable=True))
    optimizer = new()
    train(optimizer, 1)
    before = stored(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"offload\(\) cannot be captured in a CUDA graph"):
            optimizer.offload()
        with pytest.raises(RuntimeError, match=r"reload\(\) cannot be captured in a CUDA graph"):
            optimizer.reload()
    assert all(a is b for a, b in zip(stored(optimizer), before, strict=True))
    optimizer.step()


def test_a_capture_after_reload_needs_a_step_first(elsewhere, monkeypatch):
    optimizer = new(backend="triton", capturable=True)
    train(optimizer, 1)
    optimizer.offload()
    optimizer.reload()
    monkeypatch.setattr(backend, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run a step"):
        optimizer.step()


@pytest.mark.parametrize(
    "options", [{}, {"precision": "split24-int8"}, {"precision": "master32"}], ids=str
)
def test_checkpoints_meanwhile_are_those_of_before(elsewhere, options):
    optimizer = new(dtype=torch.bfloat16, **options)
    train(optimizer, 2)
    before = saved(optimizer.state_dict()), saved(optimizer.export_fp32())
    optimizer.offload()
    assert (saved(optimizer.state_dict()), saved(optimizer.export_fp32())) == before


@pytest.mark.parametrize("first", [0, 2])
def test_loading_meanwhile_fills_host_memory(elsewhere, first):
    """Also where there was no state yet: what loading makes on the device goes to the host."""
    source = new()
    train(source, 3)
    optimizer = new()
    train(optimizer, first)
    optimizer.offload()
    optimizer.load_state_dict(source.state_dict())
    assert all(segment in optimizer._engine.origins for segment in segments(optimizer))
    for ours, theirs in zip(members(optimizer), members(source), strict=True):
        ours.data.copy_(theirs.data)
    assert same_bits(results(optimizer), results(source))
    with pytest.raises(RuntimeError, match="call reload"):
        optimizer.step()
    optimizer.reload()
    train(optimizer, 2, first=3)
    train(source, 2, first=3)
    assert same_bits(results(optimizer), results(source))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_are_not_offloaded(elsewhere, duplicate):
    optimizer, plain = new(), new()
    train(optimizer, 2)
    train(plain, 4)
    optimizer.offload()
    twin = duplicate(optimizer)
    train(twin, 2, first=2)
    assert same_bits(results(twin), results(plain))
    again = duplicate(optimizer)
    foreign = stored(again)
    again.offload()  # state that is not in segments yet goes, too
    assert not any(a is b for a, b in zip(stored(again), foreign, strict=True))
    again.reload()
    train(again, 2, first=2)
    assert same_bits(results(again), results(plain))


def test_a_group_added_meanwhile(elsewhere):
    optimizer, plain = new(), new()
    for each in (optimizer, plain):
        train(each, 2)
    optimizer.offload()
    for each in (optimizer, plain):
        each.add_param_group({"params": parameters(torch.float32, [(7,), (40,)])})
    optimizer.zero_grad()
    optimizer.reload()
    for each in (optimizer, plain):
        train(each, 2, first=2)
    assert same_bits(results(optimizer), results(plain))


def test_what_users_write_meanwhile_counts(elsewhere):
    optimizer, plain, note = new(), new(), torch.ones(3)
    for each in (optimizer, plain):
        train(each, 2)
        each.state[members(each)[3]]["note"] = note  # not state of ours: stays
    optimizer.offload()
    assert optimizer.state[members(optimizer)[3]]["note"] is note
    for each in (optimizer, plain):
        first, second, third = members(each)[:3]
        each.state[first]["exp_avg"].fill_(0.5)  # into our memory
        each.state[second]["exp_avg"] = torch.full_like(second, 0.25)  # another tensor
        del each.state[third]
    optimizer.reload()
    assert results(optimizer)[0]["exp_avg"].eq(0.5).all()
    for each in (optimizer, plain):
        train(each, 2, first=2)
    assert same_bits(results(optimizer), results(plain))


def test_running_out_of_memory_changes_nothing(elsewhere, monkeypatch):
    optimizer, plain = new(), new()
    train(optimizer, 2)
    calls = []

    def scarce(tensor):
        calls.append(tensor)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return torch.empty_like(tensor)

    monkeypatch.setattr(offload, "host_memory", scarce)
    before = stored(optimizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.offload()
    assert all(a is b for a, b in zip(stored(optimizer), before, strict=True))
    train(optimizer, 1, first=2)
    train(plain, 3)
    assert same_bits(results(optimizer), results(plain))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"precision": "split24-int8"}, {"precision": "master32"}], ids=str
)
def test_device_memory_is_free(options):
    def make():
        params = parameters(torch.bfloat16, [(1 << 12, 1 << 10), (1 << 10,), (1 << 20,)], "cuda")
        return FusedAdamW(params, lr=1e-2, max_grad_norm=1.0, **options)

    optimizer, plain = make(), make()
    for each in (optimizer, plain):
        train(each, 2)
        each.zero_grad()
    exported, expected, before = (
        optimizer.export_fp32(),
        copy.deepcopy(optimizer.state_dict()),
        results(optimizer),
    )
    held = sum(segment.nbytes for segment in segments(optimizer))
    used = torch.cuda.memory_allocated()
    optimizer.offload()
    assert used - torch.cuda.memory_allocated() >= held
    assert all(value.device.type == "cpu" for value in stored(optimizer))
    assert all(segment.is_pinned() for segment in segments(optimizer))
    assert same_bits(results(optimizer), before)
    again = optimizer.export_fp32()
    for key in exported["params"]:
        assert torch.equal(again["params"][key], exported["params"][key])
    optimizer.load_state_dict(expected)
    assert all(value.device.type == "cpu" for value in stored(optimizer))
    optimizer.reload()
    assert all(value.device.type == "cuda" for value in stored(optimizer))
    for each in (optimizer, plain):
        train(each, 2, first=2)
    assert same_bits(results(optimizer), results(plain))


@pytest.mark.gpu
def test_a_copy_of_offloaded_state_takes_it_to_the_device():
    optimizer, plain = new("cuda"), new("cuda")
    train(optimizer, 2)
    train(plain, 3)
    optimizer.offload()
    twin = copy.deepcopy(optimizer)
    for i, p in enumerate(members(twin)):
        p.grad = gradient(p, i, 2)
    twin.step()
    assert all(value.device.type == "cuda" for value in stored(twin))
    assert same_bits(results(twin), results(plain))
