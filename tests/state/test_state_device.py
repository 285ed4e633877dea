"""state_device="cpu": where state lies, what saves, loads and exports it, and what is refused."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from recipes import dtype_of
from streams import host_zeros, simulate
from torch._subclasses import FakeTensorMode
from training import parameters, results, same_bits, train

from fused_adam import FusedAdam, FusedAdamW, arguments, step_in_backward
from fused_adam.backends import streaming
from fused_adam.precision import ENTRIES
from fused_adam.state import arena, memory

SHAPES = [(), (33,), (0, 3), (1025,), (40, 50)]
RECIPES = [None, "master32", "split32-bf16", "split24-int8"]
BUFFER = 20_000


@pytest.fixture
def streams(monkeypatch):
    return simulate(monkeypatch)


def streamed(precision=None, shapes=SHAPES, **options):
    params = parameters(dtype_of(precision) if precision else torch.float32, shapes)
    return FusedAdamW(
        params,
        lr=1e-2,
        precision=precision,
        backend="triton",
        state_device="cpu",
        stream_bytes=BUFFER,
        **options,
    )


def resident(precision=None, shapes=SHAPES, **options):
    params = parameters(dtype_of(precision) if precision else torch.float32, shapes)
    return FusedAdamW(params, lr=1e-2, precision=precision, **options)


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def segments(optimizer):
    param_states = optimizer._engine.arena.param_states.values()
    return {id(slot.segment): slot.segment for s in param_states for slot in s.slots.values()}


def copy_weights(source, target):
    for mine, other in zip(members(source), members(target), strict=True):
        other.data.copy_(mine.data)


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return file.getvalue()


# Where state is


def test_all_but_step_counters_is_in_segments_on_the_host(streams, monkeypatch):
    pinned = []

    def zeros(*args, **kwargs):
        pinned.append(host_zeros(*args, **kwargs))
        return pinned[-1]

    monkeypatch.setattr(arena, "pinned_zeros", zeros)
    optimizer = streamed("split24-int8", amsgrad=True)
    train(optimizer, 1)
    assert sorted(map(id, pinned)) == sorted(segments(optimizer))
    assert len(pinned) == 6  # remainder, codes and scales of two moments, maximum
    ranges = [range(x.data_ptr(), x.data_ptr() + x.nbytes) for x in pinned]
    for param in members(optimizer):
        for key, value in optimizer.state[param].items():
            on_host = any(value.data_ptr() in memory for memory in ranges)
            assert on_host == (key in ENTRIES) or not value.numel()


def test_parameters_on_a_cpu_are_stepped_as_without(monkeypatch):
    """Their state is in the host's memory anyway, which no device reads."""
    optimizers = [
        FusedAdamW(parameters(torch.float32, SHAPES), lr=1e-2, **options)
        for options in ({}, {"state_device": "cpu", "backend": "reference"})
    ]
    for optimizer in optimizers:
        train(optimizer, 2)
    assert same_bits(*map(results, optimizers)) and not optimizers[1]._engine.rings


def test_state_that_is_read_right_after_a_step_is_whole(streams):
    optimizer, expected = streamed(), resident()
    for step in range(3):
        for each in (optimizer, expected):
            train(each, 1, first=step)
        for mine, other in zip(members(optimizer), members(expected), strict=True):
            assert torch.equal(optimizer.state[mine]["exp_avg"], expected.state[other]["exp_avg"])


def test_state_that_is_moved_is_read_when_it_is_there(monkeypatch):
    """A parameter gets another memory format, so its state is copied while copies out may run."""
    for seed in range(4):
        with monkeypatch.context() as patch:
            simulate(patch, seed)
            optimizers = (
                streamed(shapes=[(40, 50), (60, 20)]),
                resident(shapes=[(40, 50), (60, 20)]),
            )
            for each in optimizers:
                train(each, 3)
                for param in members(each):
                    param.data, param.grad = param.data.T.contiguous().T, None
                train(each, 2, first=3)
            assert same_bits(*map(results, optimizers))


def test_buffers_are_no_larger_than_all_state_and_grow_with_it(streams):
    optimizer, expected = streamed(shapes=[(33,)]), resident(shapes=[(33,)])
    for each in (optimizer, expected):
        train(each, 1)
    (ring,) = optimizer._engine.rings.values()
    assert ring.nbytes < 1000
    for each in (optimizer, expected):
        each.add_param_group({"params": parameters(torch.float32, [(3000,)])})
        train(each, 2, first=1)
    (ring,) = optimizer._engine.rings.values()
    assert ring.nbytes == BUFFER
    assert same_bits(results(optimizer), results(expected))


def test_fake_parameters_have_their_state_on_the_host(streams):
    with FakeTensorMode():
        optimizer = streamed("split24-int8", shapes=[(64, 64)])
        (param,) = members(optimizer)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        devices = {key: value.device.type for key, value in optimizer.state[param].items()}
    assert set(devices.values()) == {"cpu"} and len(devices) == 6


def test_a_plan_keeps_no_state_alive(streams):
    optimizer = streamed()
    train(optimizer, 2)
    held = [weakref.ref(segment.untyped_storage()) for segment in segments(optimizer).values()]
    optimizer.state.clear()
    assert [ref() for ref in held] == [None] * len(held)


# Saving, loading, exporting


@pytest.mark.parametrize("precision", RECIPES)
def test_checkpoints_are_those_of_state_on_the_device(streams, precision):
    # The reference orders parameters by size, and with them the entries of its state_dict.
    optimizer = streamed(precision, amsgrad=True)
    expected = resident(precision, amsgrad=True, backend="triton")
    for each in (optimizer, expected):
        train(each, 2)
    assert saved(optimizer.state_dict()) == saved(expected.state_dict())
    mine, other = optimizer.export_fp32(), expected.export_fp32()
    assert all(torch.equal(mine["params"][key], value) for key, value in other["params"].items())
    for entry, wanted in zip(
        mine["state"]["state"].values(), other["state"]["state"].values(), strict=True
    ):
        assert entry.keys() == wanted.keys()
        assert all(torch.equal(entry[key], wanted[key]) for key in entry)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize("precision", [None, "split24-int8"])
def test_checkpoints_load_on_either_side(streams, precision, to_host, first):
    source = resident(precision) if to_host else streamed(precision)
    target = streamed(precision) if to_host else resident(precision)
    train(source, 3)
    train(target, first)
    before = segments(target)
    copy_weights(source, target)
    target.load_state_dict(source.state_dict())
    assert not first or segments(target) == before  # filled where it is
    for each in (source, target):
        train(each, 2, first=3)
    assert same_bits(results(source), results(target))


def test_a_checkpoint_in_another_precision(streams):
    source = resident("master32")
    train(source, 2)
    targets = streamed("split24-int8"), resident("split24-int8")
    for target in targets:
        copy_weights(source, target)
        target.load_state_dict(source.state_dict())
        train(target, 2, first=2)
    assert same_bits(*map(results, targets))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_have_their_own_state_on_the_host(streams, duplicate):
    optimizer, expected = streamed(), resident()
    train(optimizer, 2)
    twin = duplicate(optimizer)
    for each in (optimizer, twin, expected):
        train(each, 3 if each is expected else 1, first=0 if each is expected else 2)
    assert same_bits(results(twin), results(expected))
    assert same_bits(results(optimizer), results(expected))
    assert twin._engine.arena.on_host and twin._engine.stream_bytes == BUFFER
    assert not segments(twin).keys() & segments(optimizer).keys()


def test_init_state(streams):
    optimizer, expected = streamed("master32"), resident("master32")
    optimizer.init_state()
    for param in members(optimizer):
        assert torch.equal(optimizer.state[param]["master_weight"], param.float())
    for each in (optimizer, expected):
        train(each, 2)
    assert same_bits(results(optimizer), results(expected))


def test_offload_frees_the_buffers_and_a_step_makes_them_anew(streams):
    optimizer, expected = streamed(), resident()
    train(optimizer, 2)
    (ring,) = optimizer._engine.rings.values()
    buffers = [weakref.ref(buffer.memory) for buffer in ring.buffers]
    del ring
    before = segments(optimizer)
    optimizer.offload()
    assert [ref() for ref in buffers] == [None] * len(buffers)
    train(optimizer, 1, first=2)  # without reload()
    optimizer.offload()
    optimizer.reload()
    train(optimizer, 1, first=3)
    train(expected, 4)
    assert segments(optimizer) == before
    assert same_bits(results(optimizer), results(expected))


def test_what_users_write_into_state_counts(streams):
    optimizers = streamed(), resident()
    for each in optimizers:
        train(each, 2)
        params = members(each)
        each.state[params[1]]["exp_avg"].fill_(0.5)  # into our memory
        each.state[params[3]]["exp_avg_sq"] = torch.full_like(params[3], 0.25)  # another tensor
        each.state[params[4]].clear()
        train(each, 2, first=2)
    assert same_bits(*map(results, optimizers))
    views = optimizers[0].state[members(optimizers[0])[3]]
    segment = optimizers[0]._engine.arena.param_states[members(optimizers[0])[3]].slots
    assert views["exp_avg_sq"].data_ptr() == segment["exp_avg_sq"].address


# What is refused


@pytest.mark.parametrize("value", ["cuda", "host", torch.device("cuda"), 0, True])
def test_other_places_are_refused(value):
    with pytest.raises(ValueError, match=r"state_device=.* must be 'cpu', for pinned memory"):
        FusedAdam([torch.nn.Parameter(torch.ones(3))], state_device=value)


@pytest.mark.parametrize("value", [0, -1, 1 << 19, 2.5e8, "1GB", None, True])
def test_other_sizes_of_buffers_are_refused(value):
    with pytest.raises(ValueError, match=r"stream_bytes=.* must be a whole number of bytes from"):
        FusedAdam([torch.nn.Parameter(torch.ones(3))], stream_bytes=value)


def test_a_differentiable_step_is_refused():
    with pytest.raises(ValueError, match="state_device='cpu' cannot be combined with different"):
        FusedAdam([torch.nn.Parameter(torch.ones(3))], state_device="cpu", differentiable=True)


def test_a_backend_without_buffers_is_refused(monkeypatch):
    monkeypatch.setattr(arena, "is_apart", lambda device: True)
    message = "state_device='cpu' cannot be combined with backend='reference' on cpu, because only"
    with pytest.raises(ValueError, match=message):
        FusedAdam([torch.nn.Parameter(torch.ones(3))], state_device="cpu", backend="reference")


def test_a_device_without_streams_is_refused(monkeypatch):
    monkeypatch.setattr(arena, "is_apart", lambda device: True)
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    with pytest.raises(RuntimeError, match="state_device='cpu' needs a device with streams, and"):
        FusedAdam([torch.nn.Parameter(torch.ones(3))], state_device="cpu", backend="triton")


def test_too_little_memory_says_how_much_was_asked_and_leaves_nothing(streams, monkeypatch):
    monkeypatch.setattr(arena, "pinned_zeros", memory.pinned_zeros)
    allocate, calls = torch.zeros, []

    def scarce(*args, pin_memory=False, **kwargs):
        calls.append(pin_memory)
        if sum(calls) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return allocate(*args, **kwargs)

    optimizer = streamed(shapes=[(1000,), (33,)])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", scarce)
        message = "needs 8,704 bytes of pinned host memory, and pinning 4,352 of them failed"
        with pytest.raises(RuntimeError, match=message) as raised:
            train(optimizer, 1)
    del raised  # its traceback holds a segment
    assert not optimizer.state and not segments(optimizer)
    monkeypatch.setattr(arena, "pinned_zeros", host_zeros)
    expected = resident(shapes=[(1000,), (33,)])
    for each in (optimizer, expected):
        train(each, 2)
    assert same_bits(results(optimizer), results(expected))


def test_repr_names_what_is_set():
    param = torch.nn.Parameter(torch.ones(3))
    assert "state_device" not in repr(FusedAdam([param]))
    text = repr(FusedAdam([param], state_device=torch.device("cpu"), stream_bytes=1 << 20))
    assert "state_device: cpu\nstream_bytes: 1048576\n" in text


# On a GPU


SIZES = [(100, 101), (8193,), (), (77,), (40, 64)]


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(arguments, "LEAST_STREAM_BYTES", 1)


def on_gpu(precision, **options):
    dtype = dtype_of(precision) if precision else torch.float32
    return FusedAdamW(
        parameters(dtype, SIZES, "cuda"), lr=1e-2, weight_decay=0.1, precision=precision, **options
    )


@pytest.mark.gpu
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("precision", RECIPES)
def test_real_streams_have_the_bits_of_state_on_the_device(small_buffers, precision, flatten):
    options = {"max_grad_norm": 1.0, "amsgrad": True, "flatten": flatten}
    optimizer = on_gpu(precision, state_device="cpu", stream_bytes=50_000, **options)
    expected = on_gpu(precision, **options)
    for each in (optimizer, expected):
        train(each, 5)
    assert same_bits(results(optimizer), results(expected))
    for param in members(optimizer):
        for key, value in optimizer.state[param].items():
            assert value.device.type == ("cpu" if key in ENTRIES else "cuda")
    assert all(segment.is_pinned() for segment in segments(optimizer).values())
    assert saved(optimizer.state_dict()["state"][1]) == saved(
        {k: v.cpu() for k, v in expected.state_dict()["state"][1].items()}
    )
    exported, wanted = optimizer.export_fp32(), expected.export_fp32()
    for key, weight in exported["params"].items():
        assert weight.device.type == "cpu" and torch.equal(weight, wanted["params"][key].cpu())


@pytest.mark.gpu
def test_a_streamed_step_waits_for_nothing(small_buffers):
    optimizer = on_gpu(None, state_device="cpu", stream_bytes=50_000)
    train(optimizer, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["master32", "split32", "split24-int8"])
@pytest.mark.parametrize("source", ["master32-bf16", "split32", "native-fp32"])
def test_state_of_another_precision_loads_from_the_host(precision, source):
    """Weights are on the device, and what is saved next to them is on the host."""
    trained = on_gpu(source) if source != "native-fp32" else None
    trained = trained or FusedAdamW(parameters(torch.bfloat16, SIZES, "cuda"), precision=source)
    train(trained, 2)
    optimizer, expected = on_gpu(precision, state_device="cpu"), on_gpu(precision)
    for each in (optimizer, expected):
        copy_weights(trained, each)
    state_dict = trained.state_dict()
    for entry in state_dict["state"].values():
        entry.update({key: value.cpu() for key, value in entry.items()})
    for each in (optimizer, expected):
        each.load_state_dict(state_dict)
        train(each, 2, first=2)
    assert same_bits(results(optimizer), results(expected))


@pytest.mark.gpu
def test_a_capture_is_refused_on_a_gpu():
    optimizer = on_gpu(None, state_device="cpu", capturable=True)
    train(optimizer, 1)
    with (
        pytest.raises(RuntimeError, match="state_device='cpu' cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    train(optimizer, 1, first=1)


@pytest.mark.gpu
def test_peak_memory_is_parameters_buffers_and_a_bucket():
    """A step inside backward: neither state nor all gradients are ever on the device."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(12))).cuda()
    weights = sum(param.nbytes for param in model.parameters())  # 12 MiB, and 24 of state
    data = torch.randn(16, 512, device="cuda")
    model(data).square().mean().backward()  # cuBLAS allocates what it works in
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    buffer = 1 << 20
    optimizer = FusedAdamW(model.parameters(), state_device="cpu", stream_bytes=buffer)
    handle = step_in_backward(model, optimizer, bucket_bytes=1)
    for _ in range(3):
        model(data).square().mean().backward()
        optimizer.step()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = 3 << 20  # the one that is stepped, and what backward is computing
    assert peak < streaming.BUFFERS * buffer + gradients + (1 << 20) < weights
    handle.remove()
