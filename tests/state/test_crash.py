"""A training killed while it saves loses nothing: the way to save that docs/training.md has, and
files that are damaged or foreign.
"""

import collections
import contextlib
import copy
import io
import multiprocessing
import os
import pickle
import random
import signal
import time

import crash_child
import pytest
import torch
from crash_child import FILE
from training import parameters, results, same_bits, train

from fused_adam import FusedAdam, FusedAdamW

# Forked from a server that has imported torch: two seconds for each otherwise. SIGKILL ends them
# like any process.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "torch._dynamo", "torch.optim"])


def weights_and_state(model, optimizer):
    return [*results(optimizer), {name: p.detach().clone() for name, p in model.named_parameters()}]


class Trainings:
    """Processes that train in one folder, one after the other, each from where the last one was
    killed.
    """

    def __init__(self, folder, steps, width, precision):
        self.folder, self.arguments = folder, (folder, steps, width, precision)
        self.width, self.precision = width, precision
        self.reference, self.reached = (
            crash_child.training(width, precision),
            0,
        )  # the training that never stops

    def whole_file(self):
        """Size in bytes of a checkpoint, and how long saving one takes in seconds."""
        model, optimizer = crash_child.training(self.width, self.precision)
        crash_child.one_step(model, optimizer, 1)
        path, started = self.folder / "whole", time.perf_counter()
        crash_child.save_function()(path, model, optimizer, 1)
        return path.stat().st_size, time.perf_counter() - started

    def attempt(self, kill_at=None, delay_s=0.0, **options):
        """Run one process, and kill it `delay_s` after it said that save number `kill_at` (of its
        own) begins.

        Returns the step of the save that it did not finish, None if there is none; raises if it
        failed by itself.
        """
        ours, its = context.Pipe(duplex=False)
        process = context.Process(
            target=crash_child.run, args=(*self.arguments, its), kwargs=options
        )
        process.start()
        its.close()
        saving, saves = None, 0
        with contextlib.suppress(EOFError):
            while True:
                word, step = ours.recv()
                saving = step if word == "saving" else None
                saves += word == "saving"
                if word == "saving" and saves == kill_at:
                    time.sleep(delay_s)
                    process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        return saving

    def check(self, saving):
        """What a new process would start from has the bits of the training that was not
        interrupted.
        """
        model, optimizer, done = crash_child.resumed(self.folder, self.width, self.precision)
        assert saving is None or done in (saving - 1, saving)
        while self.reached < done:
            self.reached += 1
            crash_child.one_step(*self.reference, self.reached)
        assert same_bits(weights_and_state(model, optimizer), weights_and_state(*self.reference))
        return done


@pytest.mark.parametrize("precision", [None, "split24-int8"])
def test_killed_while_saving(tmp_path, precision):
    """In the middle of the very first file; when one is written but not synced; when it is synced
    but not renamed.
    """
    steps, width = 6, 8
    trainings = Trainings(tmp_path, steps, width, precision)
    size, _ = trainings.whole_file()
    somewhere = random.Random(0).randrange(size)
    done = 0
    for number, moment in ((1, somewhere), (2, "fsync"), (2, "replace")):
        saving = trainings.attempt(fatal=number, moment=moment)
        left = (tmp_path / f"{FILE}.tmp").stat().st_size
        assert saving == done + number and (left == (moment if number == 1 else size))
        done = trainings.check(saving)
        assert done == saving - 1  # the file of the step before, or none
    assert trainings.attempt() is None
    assert trainings.check(None) == steps and not (tmp_path / f"{FILE}.tmp").exists()


@pytest.mark.long
@pytest.mark.parametrize("precision", [None, "split24-int8"])
def test_killed_fifty_times_at_any_time_of_saving(tmp_path, precision):
    """The parent kills after a random delay; writing some megabytes takes most of the time that
    saving takes.
    """
    kills, steps, width = 50, 150, 10_000
    trainings = Trainings(tmp_path, steps, width, precision)
    size, save_s = trainings.whole_file()
    rng, landed = random.Random(1), collections.Counter()
    while landed.total() < kills:
        saving = trainings.attempt(kill_at=2, delay_s=rng.uniform(0, save_s))
        done = trainings.check(saving)
        part = tmp_path / f"{FILE}.tmp"
        if saving is None:
            continue  # between two saves, which proves nothing here
        if done == saving:
            landed["renamed"] += 1
        elif not part.exists():
            landed["before the file"] += 1
        else:
            landed["whole, not renamed" if part.stat().st_size == size else "in the file"] += 1
    print(f"\n{kills} kills while saving: {dict(landed)}")
    assert landed["in the file"] > 0
    assert trainings.attempt() is None and trainings.check(None) == steps


def test_bytes_are_on_the_disk_before_the_name_points_to_them(tmp_path, monkeypatch):
    """A kill does not show it, a power cut does: the file is synced, then renamed, then the folder
    is synced.
    """
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        size = os.stat(path).st_size if os.path.isfile(path) else None
        calls.append(("fsync", os.path.basename(path), size))
        fsync(number)

    def renamed(source, target):
        calls.append(("replace", os.path.basename(source), os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    crash_child.save_function()(tmp_path / FILE, *crash_child.training(8, None), 0)
    assert calls == [
        ("fsync", f"{FILE}.tmp", (tmp_path / FILE).stat().st_size),
        ("replace", f"{FILE}.tmp", FILE),
        ("fsync", tmp_path.name, None),
    ]


# Damaged and foreign files
# ------------------------------------------------------------------------------------------------


def saved(optimizer):
    """The bytes of a checkpoint."""
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


@pytest.fixture(params=[None, "split24-int8"])
def pair(request):
    """Two optimizers in the middle of their training, three steps and one."""
    dtype = torch.bfloat16 if request.param else torch.float32
    made = [
        FusedAdamW(parameters(dtype, [(5,), (3, 4), (40,)]), precision=request.param)
        for _ in range(2)
    ]
    for optimizer, steps in zip(made, (3, 1), strict=True):
        train(optimizer, steps)
    return made


class Untouched:
    """What an optimizer is, and whether it still is that."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.results, self.groups = (
            results(optimizer),
            copy.deepcopy(optimizer.state_dict()["param_groups"]),
        )

    def holds(self):
        return same_bits(results(self.optimizer), self.results) and (
            self.optimizer.state_dict()["param_groups"] == self.groups
        )


def test_a_file_cut_short_raises_and_changes_nothing(pair, tmp_path):
    source, running = pair
    data, untouched = saved(source), Untouched(running)
    path = tmp_path / FILE
    lengths = sorted(
        {0, 1, 2, 64, len(data) - 23, len(data) - 1, *range(100, len(data), len(data) // 60)}
    )
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(
            (RuntimeError, EOFError, OSError, pickle.UnpicklingError)
        ):  # torch.load's own
            running.load_state_dict(torch.load(path, weights_only=True)["optimizer"])
    assert len(lengths) > 60 and untouched.holds()
    path.write_bytes(data)
    running.load_state_dict(torch.load(path, weights_only=True)["optimizer"])
    assert not untouched.holds()


def test_a_changed_byte_raises_or_loads_what_is_there(pair):
    """Nothing between: an error leaves the optimizer as it was, whichever byte of the file's
    structure changed.
    """
    source, running = pair
    data, rng, outcomes = saved(source), random.Random(0), collections.Counter()
    start = data.index(b"data.pkl")
    for place in range(
        start, data.index(b"PK", start), 2
    ):  # the pickle: names, types, shapes, numbers
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        untouched = Untouched(running)
        try:
            checkpoint = torch.load(io.BytesIO(changed), weights_only=True)["optimizer"]
        except Exception:
            outcomes["torch.load"] += 1
            continue
        try:
            running.load_state_dict(checkpoint)
        except ValueError:
            outcomes["refused"] += 1
            assert untouched.holds(), place
        else:
            outcomes["loaded"] += 1
            running.load_state_dict(source.state_dict())
    print(dict(outcomes))
    assert min(outcomes[key] for key in ("torch.load", "refused", "loaded")) > 0


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (lambda params: torch.nn.Linear(3, 4).state_dict(), "no 'param_groups'.*'weight', 'bias'"),
        (
            lambda params: {"model": {}, "optimizer": FusedAdam(params).state_dict()},
            "no 'param_groups'.*'optimizer'",
        ),
        (lambda params: torch.optim.SGD(params, lr=0.1).state_dict(), "has no 'betas'"),
        (
            lambda params: FusedAdam(params[:2]).state_dict(),
            "doesn't match the size of optimizer's group",
        ),
        (
            lambda params: FusedAdam([{"params": [p]} for p in params]).state_dict(),
            "different number of parameter gr",
        ),
        (
            lambda params: trained([(5,), (4, 3), (40,)]).state_dict(),
            r"parameter 1 has shape \(4, 3\).*\(3, 4\)",
        ),
        (
            lambda params: trained([(5,), (3, 4), (4, 10)]).state_dict(),
            r"parameter 2 has shape \(4, 10\).*\(40,\)",
        ),
    ],
)
def test_another_models_file_raises_and_changes_nothing(pair, foreign, message):
    _, running = pair
    untouched = Untouched(running)
    state_dict = foreign(parameters(torch.float32, [(5,), (3, 4), (40,)]))
    with pytest.raises(ValueError, match=message):
        running.load_state_dict(state_dict)
    assert untouched.holds()


def trained(shapes):
    optimizer = FusedAdam(parameters(torch.float32, shapes))
    train(optimizer, 1)
    return optimizer
