"""State on the host: the bits of state on the device, whatever the streams do first, and the order
of copies and launches.

A CPU stands in for the device, and `streams.py` for its streams.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from recipes import dtype_of, every_recipe
from streams import simulate
from torch import nn
from training import gradient, parameters, results, same_bits, train, values

from fused_adam import FusedAdamW, step_in_backward
from fused_adam.backends import choose, streaming
from fused_adam.backends.pieces import CUT, HIGH_WORD, RUN_ALIGN, advanced_offset, cut
from fused_adam.backends.streaming import BUFFERS, COMPUTE, IN, OUT
from fused_adam.numerics.codecs import random_words
from fused_adam.plan import Row, _launch, options_of
from fused_adam.precision import parse
from fused_adam.state.memory import Slot
from fused_adam.state.param_state import ParamState
from fused_adam.state.staging import Staging

# Around a group and a piece; larger than a buffer; empty and 0-dim.
SHAPES = [(), (33,), (0, 3), (1025,), (31, 100), (5,)]
BUFFER = 10_000  # holds 1,024 elements of two fp32 moments, so the model takes five pieces

STREAMED = {"backend": "triton", "state_device": "cpu"}


@pytest.fixture
def streams(monkeypatch):
    return simulate(monkeypatch)


def pair(dtype=torch.float32, shapes=SHAPES, stream_bytes=BUFFER, **options):
    """An optimizer with its state on the host, and one that has all of it where it computes."""
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    streamed = {**options, **STREAMED, "stream_bytes": stream_bytes}
    return (
        FusedAdamW(parameters(dtype, shapes), **streamed),
        FusedAdamW(parameters(dtype, shapes), **options),
    )


def alternate(optimizer, steps):
    """Steps of all parameters and steps without the first one: plans with the same state."""
    params = optimizer.param_groups[0]["params"]
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = None if i == 0 and step % 2 else gradient(param, i, step)
        optimizer.step()


def check_equal(streamed, resident, steps, first=0):
    train(streamed, steps, first)
    train(resident, steps, first)
    assert same_bits(results(streamed), results(resident))


# Bits


def test_fifty_steps_have_the_bits_of_state_on_the_device(streams):
    options = {"amsgrad": True, "max_grad_norm": 1.0, "stream_bytes": 15_000}
    check_equal(*pair(shapes=[(33,), (31, 100)], **options), 50)


@every_recipe
def test_every_recipe(streams, precision):
    dtype = dtype_of(precision)
    least = int(CUT * parse(precision).held_bytes(dtype)) + 6 * RUN_ALIGN
    check_equal(*pair(dtype, precision=precision, stream_bytes=least), 3)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"flatten": True}),
        (torch.float32, {"skip_nonfinite": True, "maximize": True}),
        (torch.float64, {"amsgrad": True, "stream_bytes": 30_000, "backend": "triton"}),
        (torch.complex64, {}),
        (torch.float16, {"skip_grad_norm": 1e4}),
        (torch.bfloat16, {"precision": "sr-int8", "cautious": True, "amsgrad": True}),
    ],
    ids=str,
)
def test_options(streams, dtype, options):
    check_equal(*pair(dtype, **options), 3)


@pytest.mark.parametrize("precision", [None, "split24-int8", "master32"])
def test_averages_of_the_weights(streams, precision):
    dtype = dtype_of(precision) if precision else torch.float32
    optimizers = pair(dtype, precision=precision, ema_decay=0.9, stream_bytes=24_000)
    check_equal(*optimizers, 3)
    mine, other = (optimizer.ema_state_dict() for optimizer in optimizers)
    assert len(mine) == len(SHAPES) and all(torch.equal(mine[key], other[key]) for key in other)
    with optimizers[0].swap_ema():
        pass
    check_equal(*optimizers, 2, first=3)


def test_a_skipped_step_leaves_state_as_it_was(streams):
    optimizers = streamed, _ = pair(skip_nonfinite=True)
    check_equal(*optimizers, 1)
    before = results(streamed)
    for optimizer in optimizers:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.full_like(param, torch.inf)
        optimizer.step()
    assert same_bits(results(streamed), before)
    assert streamed.skipped_steps == 1
    check_equal(*optimizers, 2, first=1)


def test_a_grad_scaler(streams):
    optimizers = pair(fused=True)
    for overflow in (0.0, 1.0, 0.0):
        for optimizer in optimizers:
            for i, param in enumerate(optimizer.param_groups[0]["params"]):
                param.grad = gradient(param, i, 0)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(overflow)
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
    assert same_bits(*map(results, optimizers))
    assert optimizers[0].state[optimizers[0].param_groups[0]["params"][0]]["step"] == 2


def test_mixtures_of_groups_dtypes_and_layouts(streams):
    """Several launches per piece, two dtypes of arithmetic, and parameters that are staged."""

    def groups():
        gapped = nn.Parameter(values((64, 80), 2, torch.float32)[:, ::2])
        transposed = nn.Parameter(values((60, 40), 3, torch.float32).T)
        return [
            {"params": [*parameters(torch.float32, SHAPES), gapped, transposed]},
            {"params": parameters(torch.float64, [(700,), (900,)]), "amsgrad": True},
            {"params": parameters(torch.float32, [(50,), (2000,)]), "amsgrad": True, "lr": 0.1},
            {"params": parameters(torch.bfloat16, [(3, 700)]), "precision": "split24-int8"},
        ]

    # float64 on the reference is within an ulp, so both run the kernels.
    options = {"lr": 1e-2, "max_grad_norm": 3.0, "backend": "triton"}
    streamed = FusedAdamW(groups(), state_device="cpu", stream_bytes=30_000, **options)
    check_equal(streamed, FusedAdamW(groups(), **options), 3)


def test_parameters_that_share_memory_or_come_twice(streams):
    def make(**more):
        memory = values((3000,), 0, torch.float32)
        first, second = nn.Parameter(memory[:2000]), nn.Parameter(memory[1000:])
        with pytest.warns(UserWarning, match="duplicate"):
            return FusedAdamW([first, second, first], lr=1e-2, **more)

    streamed = make(**STREAMED, stream_bytes=BUFFER)
    check_equal(streamed, make(), 3)


def test_sets_of_parameters_that_come_and_go(streams):
    optimizers = pair(shapes=[(900,), (1100,), (1300,)])
    for optimizer in optimizers:
        alternate(optimizer, 5)
    assert same_bits(*map(results, optimizers))


def test_steps_inside_backward(streams):
    """Buckets of one piece each, which have to go on to the next buffer."""

    def losses(optimizer, model):
        for step in range(3):
            model(values((4, 40), step, torch.float32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def make(**more):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))
        return model, FusedAdamW(model.parameters(), lr=1e-2, **more)

    plain, expected = make()
    model, optimizer = make(**STREAMED, stream_bytes=20_000)
    losses(expected, plain)
    handle = step_in_backward(model, optimizer, bucket_bytes=1)
    losses(optimizer, model)
    assert same_bits(results(optimizer), results(expected))
    buffers = [buffer for queue, buffer, _ in streams.log if queue == COMPUTE]
    assert all(a != b for a, b in pairwise(buffers))
    handle.remove()


@pytest.mark.parametrize("share", [4, 8])
@pytest.mark.parametrize("offset", [0, 96, 7, (1 << 32) * 4 - 64, (1 << 40) + 5])
def test_parts_draw_the_bits_of_the_whole_row(offset, share):
    def bits(first, count, offset):
        return random_words(3, first, 5, 7, count, torch.device("cpu"), offset, share)

    whole = bits(0, 128, offset)
    for start in (32, 64):
        part = bits(0, 128 - start, advanced_offset(offset, start, share))
        assert torch.equal(part, whole[start:])


# Order


def test_what_is_copied_in_which_order(streams):
    optimizer, _ = pair(shapes=[(1024 * 4,), (500,), (37,)])
    train(optimizer, 1)
    assert optimizer.state  # waits
    streams.log.clear()
    train(optimizer, 1, first=1)
    assert optimizer.state
    held = sum(4 * -(-numel // 32) * 32 * 2 for numel in (1024 * 4, 500, 37))
    for queue in (IN, OUT):
        copied = [(buffer, nbytes) for name, buffer, nbytes in streams.log if name == queue]
        assert sum(nbytes for _, nbytes in copied) == held
        assert all(nbytes <= BUFFER for _, nbytes in copied)
        numbers = [buffer for buffer, _ in copied]
        assert {b - a for a, b in pairwise(numbers)} <= {1, 1 - BUFFERS}
    for number in range(BUFFERS):
        queues = [queue for queue, buffer, _ in streams.log if buffer == number]
        assert queues == [IN, COMPUTE, OUT] * (len(queues) // 3)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_that_events_allow(monkeypatch, seed):
    """`streams.py` asserts that each buffer is filled, updated and emptied, in this order."""
    simulate(monkeypatch, seed)
    # Five pieces: more than buffers, so some wait for others and not for themselves of last step.
    check_equal(*pair(shapes=[(1025,), (3300,)], precision="native-fp32"), 5)


@pytest.mark.parametrize("queue", [IN, COMPUTE, OUT])
def test_the_simulation_sees_every_wait_that_is_missing(monkeypatch, queue):
    streams = simulate(monkeypatch)
    monkeypatch.setattr(streams, "ignored", (queue,))
    with pytest.raises(AssertionError, match="of a buffer that is"):
        for _ in range(10):
            check_equal(*pair(shapes=[(1025,), (2200,)]), 3)


@pytest.mark.parametrize("waits", [True, False])
def test_a_step_reads_what_the_last_one_has_written(monkeypatch, waits):
    """Plans may have the same state in different buffers. Without the wait for the other buffer,
    some orders read stale values.
    """
    if not waits:
        monkeypatch.setattr(streaming, "_overlap", lambda copies, others: False)
    equal = []
    for seed in range(5):
        with monkeypatch.context() as patch:
            simulate(patch, seed)
            optimizers = pair(shapes=[(1000,), (900,)])
            for optimizer in optimizers:
                alternate(optimizer, 8)
            equal.append(same_bits(*map(results, optimizers)))
    assert all(equal) if waits else not all(equal)


def test_overlaps_of_host_memory():
    def copies(*ranges):
        return [SimpleNamespace(addresses=range(*each)) for each in ranges]

    some = copies((0, 10), (20, 30), (50, 60))
    assert not streaming._overlap(some, copies((10, 20), (30, 50), (60, 70)))
    assert not streaming._overlap(some, []) and not streaming._overlap([], some)
    for other in ((9, 11), (0, 100), (25, 26), (59, 60), (40, 51)):
        assert streaming._overlap(some, copies((10, 20), other) if other[0] > 20 else copies(other))


def test_the_host_waits_for_copies_only_to_read_state(streams):
    optimizer, resident = pair()
    train(optimizer, 1)
    streams.synchronized = 0
    train(optimizer, 3, first=1)
    assert streams.synchronized == 0
    ring = next(iter(optimizer._engine.rings.values()))
    assert ring.pending
    train(resident, 4)
    assert same_bits(results(optimizer), results(resident))
    assert streams.synchronized == 1 and not ring.pending


def test_a_capture_is_refused(streams, monkeypatch):
    optimizer, resident = pair(capturable=True)
    train(optimizer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(choose, "is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="state_device='cpu' cannot be captured in a CUDA"):
            optimizer.step()
    train(resident, 1)
    assert same_bits(results(optimizer), results(resident))


# Pieces


def launches(numels, recipe="native-int8", dtype=torch.float32, gap=0):
    """One launch over parameters of these sizes, with their state in one segment per entry."""
    options = options_of({"amsgrad": False, "precision": recipe})
    params = [torch.empty(numel, dtype=dtype, device="meta") for numel in numels]
    room = [-(-numel // 32) * 32 + gap for numel in numels]
    entries = options.entries(params[0])
    segments = {
        key: torch.empty(sum(room), dtype=spec.dtype, device="meta")
        for key, spec in entries.items()
    }
    rows = []
    for i, (param, numel) in enumerate(zip(params, numels, strict=True)):
        share = {key: 32 if "scale" in key else 1 for key in entries}
        slots = {
            key: Slot(segment, sum(room[:i]) // share[key], -(-numel // share[key]))
            for key, segment in segments.items()
        }
        row = Row(i, i, 0, param, param, dtype, options, entries, ParamState(), 0, slots)
        rows.append(row)
    return [_launch(rows, Staging())]


@pytest.mark.parametrize("recipe", ["native-fp32", "native-int8", "split24-int8", "master32-bf16"])
@pytest.mark.parametrize("gap", [0, 64])
def test_pieces_cover_every_element_once_and_split_no_group(recipe, gap):
    numels = [1, 31, 5000, 32, 1024, 100_001, 7]
    dtype = dtype_of(recipe)
    (launch,) = launches(numels, recipe, dtype, gap)
    capacity = 64_000
    pieces = cut([launch], capacity)
    for span in launch.spans:
        parts = [part for piece in pieces for part in piece.parts if part.span is span]
        ends = [0, *(part.start + part.numel for part in parts)]
        assert [part.start for part in parts] == ends[:-1] and ends[-1] == span.numel
        assert all(start % CUT == 0 for start in ends[:-1])
    for piece in pieces:
        taken = sorted((run.offset, run.offset + run.nbytes) for run in piece.runs)
        assert all(a[1] <= b[0] for a, b in pairwise(taken))
        assert taken[-1][1] <= capacity and all(start % RUN_ALIGN == 0 for start, _ in taken)
        for part in piece.parts:
            for key, place in part.state.items():
                share = 32 if "scale" in key else 1
                slot = part.span.first.slots[key]
                assert place.run.start + place.skipped == slot.start + part.start // share
                assert place.skipped + -(-part.numel // share) <= place.run.end - place.run.start
    # Where state lies together, each entry of a piece is one copy, and pieces are full.
    if not gap:
        entries = len(launch.spans[0].first.entries)
        assert all(len(piece.runs) == entries for piece in pieces)
        for piece in pieces[:-1]:
            used = sum(run.nbytes for run in piece.runs)
            assert used > 0.7 * capacity


def test_parts_have_one_high_word():
    pieces = cut(launches([2 * HIGH_WORD + 5], "native-int8"), 1 << 40)
    parts = [part for piece in pieces for part in piece.parts]
    assert [part.numel for part in parts] == [HIGH_WORD, HIGH_WORD, 5]


def test_a_buffer_that_is_too_small():
    with pytest.raises(
        ValueError, match="a buffer of 100 bytes is too small for the state of 1024"
    ):
        cut(launches([5000]), 100)
