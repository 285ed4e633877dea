"""What the benchmark does for a GPU, seen on a CPU: cold caches, full memory, the ceiling, warm
clocks, equal data.
"""

import itertools
import time
import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from bench import step, suite
from bench.harness import optimizers, results, rotation, shapes, timing, workload
from bench.harness.optimizers import Case
from bench.harness.rotation import Job
from bench.step import COPY, MOVE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = [(30, 40), (7,)]
REFERENCE = optimizers.ours("reference", flatten=False)
FUSED, FOREACH = optimizers.peers()["torch-fused"], optimizers.peers()["torch-foreach"]
MB = 1 << 20


@pytest.fixture
def recorder():
    return results.Recorder("step", {}, CPU)


def cpu_job():
    return Job("little", SHAPES, Case(CPU), "eager")


def measured(recorder, specs):
    step.measure(recorder, specs, cpu_job(), 0.05, lambda text, share: None)
    return {result["optimizer"]: result for result in recorder.results}


@pytest.mark.parametrize(
    "model, dtype, sets",
    [("many-small", torch.float32, 5), ("many-small", torch.bfloat16, 10), ("gpt2", None, 1)],
)
def test_queued_steps_go_through_more_than_the_cache(model, dtype, sets, monkeypatch):
    """On a GPU steps of one optimizer queue up: nothing but its own sets goes by, so copies do not
    count.
    """
    monkeypatch.setattr(rotation, "cache_bytes", lambda device: 50 * MB)
    monkeypatch.setattr(rotation, "free_bytes", lambda device: 80 << 30)
    monkeypatch.setattr(timing, "COPY_BYTES", 256 * MB)
    dtype = dtype or torch.float32
    job = Job(model, shapes.shapes_of(model), Case(CUDA, dtype, dtype), "graph")
    assert rotation.residency([REFERENCE, FUSED], job) == (True, sets)
    least = shapes.numel(job.shapes) * 2 * dtype.itemsize
    assert sets * least >= 3 * 50 * MB > (sets - 1) * least


def test_sets_take_no_more_memory_than_there_is(monkeypatch):
    monkeypatch.setattr(rotation, "cache_bytes", lambda device: 50 * MB)
    job = Job("many-small", shapes.shapes_of("many-small"), Case(CUDA), "graph")
    one = rotation.one_bytes(REFERENCE, job)
    for most in (1, 2, 3):
        free = ((most + 1) * one + 4 * (1 << 16)) / 0.9 + 1
        monkeypatch.setattr(rotation, "free_bytes", lambda device, free=free: free)
        assert rotation.residency([REFERENCE], job) == (True, most)
    monkeypatch.setattr(rotation, "free_bytes", lambda device: one)
    assert rotation.residency([REFERENCE, FUSED], job) == (False, 1)


def test_one_that_does_not_fit_leaves_the_others(recorder, monkeypatch):
    job = cpu_job()
    need = {spec: rotation.one_bytes(spec, job) + 2 * (1 << 16) for spec in (FUSED, FOREACH)}
    assert need[FOREACH] > 1.05 * need[FUSED]
    monkeypatch.setattr(rotation, "free_bytes", lambda device: 1.02 * need[FUSED] / rotation.SHARE)
    assert set(measured(recorder, [REFERENCE, FUSED, FOREACH])) == {REFERENCE.name, FUSED.name}
    [left] = recorder.left_out
    assert left["name"] == FOREACH.name and "failed" not in left
    assert left["reason"].startswith(
        "needs 0.0 GB on cpu for one optimizer, 0.0 GB are free; try a shard"
    )


class Hungry(torch.optim.AdamW):
    """Runs out of memory at one of its steps."""

    at, alive = 0, weakref.WeakSet()

    def __init__(self, params, **arguments):
        super().__init__(params, **arguments)
        self.steps = 0
        self.alive.add(self)

    def step(self, closure=None):
        self.steps += 1
        if self.steps == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        super().step()


class Watching(torch.optim.AdamW):
    """Notes at each step how many of the others are in memory."""

    seen: ClassVar[list[int]] = []

    def step(self, closure=None):
        self.seen.append(len(Hungry.alive))
        super().step()


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("family", [optimizers.OURS, optimizers.OTHER])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_memory_that_runs_out_is_a_reason_and_is_given_back(
    at, family, resident, recorder, monkeypatch
):
    """While it is made, while it warms up, and in mid-measurement; the others keep as many rounds
    as each other.
    """
    arguments = optimizers.torch_arguments
    hungry = optimizers.OptimizerSpec(
        "hungry", family, lambda params, options: Hungry(params, **arguments(options))
    )
    monkeypatch.setattr(Hungry, "at", 0)
    job = cpu_job()
    monkeypatch.setattr(step, "residency", lambda specs, job: (resident, 1))
    judged = step.passing

    def then_hungry(*args):
        passed = judged(*args)
        monkeypatch.setattr(Hungry, "at", at)
        return passed

    monkeypatch.setattr(step, "passing", then_hungry)
    watching = optimizers.OptimizerSpec(
        "watching", optimizers.OTHER, lambda params, options: Watching(params, **arguments(options))
    )
    step.measure(recorder, [REFERENCE, hungry, watching], job, 0.05, lambda text, share: None)
    assert Watching.seen[-1] == 0
    found = {result["optimizer"]: result["step_ms"]["rounds"] for result in recorder.results}
    assert set(found) == {REFERENCE.name, "watching"} and len(set(found.values())) == 1
    [left] = recorder.left_out
    assert left["name"] == "hungry" and "failed" not in left
    assert left["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 7 GiB"


def test_other_errors_of_ours_are_failures(recorder, monkeypatch):
    steps = itertools.count(1)

    class Broken(optimizers.FusedAdamW):
        def step(self, closure=None):
            if next(steps) == 9:  # 5 before the gate, 2 to warm up
                raise RuntimeError("broken")
            super().step(closure)

    monkeypatch.setattr(optimizers, "FusedAdamW", Broken)
    monkeypatch.setattr(step, "residency", lambda specs, job: (True, 1))
    assert set(measured(recorder, [REFERENCE, FUSED])) == {FUSED.name}
    [left] = recorder.left_out
    assert left["failed"] and left["reason"] == "RuntimeError: broken"


@pytest.mark.parametrize(
    "copy, move, ceiling", [(100.0, 120.0, 120.0), (130.0, 120.0, 130.0), (100.0, None, 100.0)]
)
def test_the_ceiling_is_the_faster_of_copy_and_accesses(copy, move, ceiling, recorder):
    job = cpu_job()
    job.families, job.held, job.moved = (
        {FUSED.name: FUSED.family},
        {FUSED.name: 8.0},
        {FUSED.name: 28.0},
    )
    assert step.passing([FUSED], job, recorder) == [FUSED]
    seconds = [28 * 1207 / 60e9] * 3  # at 60 GB/s
    rates = {COPY: [copy] * 3, **({MOVE: [move] * 3} if move else {})}
    [found] = step.results({FUSED.name: seconds}, rates, job, 1, True)
    assert found["copy_gb_per_s"]["median"] == copy
    assert found["share_of_copy"]["median"] == pytest.approx(60 / copy)
    assert found["ceiling_gb_per_s"]["median"] == ceiling
    assert found["share_of_ceiling"]["median"] == pytest.approx(60 / ceiling)
    recorder.results.append(found)
    [table] = step.tables(recorder.record())
    assert table.columns[3] == ("of ceiling" if move else "of copy")
    assert table.rows[0][3] == f"{60 / ceiling:.0%}"
    assert ("update's accesses alone: 120" in table.notes[0]) == bool(move)


def test_first_rounds_warm_up_and_are_not_kept():
    """Also those of all others, so that what is timed first is no faster than the rest."""
    count = {"a": 0, "b": 0}

    def measure(name):
        time.sleep(0.002)
        count[name] += 1
        return float(count[name])

    measures = {name: lambda name=name: measure(name) for name in count}
    samples = timing.interleaved(measures, seconds=1e-9, min_rounds=3, warm_up=0.01)
    assert samples["a"] == samples["b"] and len(samples["a"]) == 3
    assert 1 < samples["a"][0] == samples["a"][1] - 1
    assert (timing.warm_up_seconds(CUDA), timing.warm_up_seconds(CPU)) == (
        timing.WARM_UP_SECONDS,
        0,
    )
    assert timing.WARM_UP_SECONDS >= 1


def test_every_bandwidth_is_of_a_warm_device(recorder, monkeypatch):
    given = []
    interleaved = timing.interleaved

    def noted(*args, warm_up=0.0, **options):
        given.append(warm_up)
        return interleaved(*args, **options)

    for module in (timing, step, suite):
        monkeypatch.setattr(module, "interleaved", noted)
        monkeypatch.setattr(module, "warm_up_seconds", lambda device: 9.0)
    measured(recorder, [FUSED])
    timing.copy_bandwidth(CPU, seconds=0.01)
    suite.measure_ceiling(CPU, 8192, seconds=0.01)
    suite.measure_sweep(CPU, "little", SHAPES, [(8192, 4)], seconds=0.01, repeats=1)
    assert given == [9.0] * 4


def test_what_is_copied_and_moved_are_the_same_random_bits():
    """A GPU that moves zeros or ones draws less power, and keeps higher clocks."""
    from bench.harness.stream import AccessBandwidth

    first, second = timing.CopyBandwidth(CPU).source, timing.CopyBandwidth(CPU).source
    assert torch.equal(first, second) and len(first.unique()) > 0.9 * len(first)
    limit = AccessBandwidth(CPU, 8191)
    assert limit.gb_per_s(2.0) == 7 * 4 * 8192 / 2e9
    assert all(len(tensor.unique()) > 0.9 * len(tensor) for tensor in limit.tensors)


def test_state_in_objects_of_an_optimizer_of_its_own_is_counted():
    """As flashoptim keeps codes and scales."""
    params = workload.make_params([(100,)], Case(CPU))
    instance = workload.instantiate(optimizers.peers()["torch-fused"], params, Case(CPU))
    held = SimpleNamespace(codes=torch.zeros(100, dtype=torch.int8), scales=torch.zeros(4), bits=8)
    instance.optimizer.state[params[0]] = {"step": torch.zeros(()), "exp_avg": held}
    assert instance.state_bytes() == 116
