"""A training that saves after every step and can be killed while it does, resumed from what is
there. Not a test.

The child of tests/state/test_crash.py, which runs `run` in a process of its own; the saving itself
is that of docs/training.md.
"""

import builtins
import os
import signal

import torch
from pages import the_block
from torch import nn

from fused_adam import FusedAdamW

FILE = "checkpoint.pt"


def recipe():
    """The text that defines `save_checkpoint` for users, with an example of its use below it."""
    return the_block("docs/training.md", "def save_checkpoint")


def save_function(**names):
    """The users' `save_checkpoint`, which sees `names` in place of builtins."""
    definitions, example = recipe().split("\n\nmodel = ")
    assert "def save_checkpoint" in definitions and "load_state_dict" in example
    namespace = dict(names)
    exec(compile(definitions, "docs/training.md", "exec"), namespace)
    return namespace["save_checkpoint"]


def training(width, precision):
    """Model and optimizer before the first step, the same every time."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision else torch.float32
    model = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 4)).to(dtype)
    return model, FusedAdamW(model.parameters(), lr=0.01, precision=precision, amsgrad=True)


def one_step(model, optimizer, step):
    """Training step number `step`: its batch depends on nothing else."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 16, generator=generator).to(next(model.parameters()).dtype)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def resumed(folder, width, precision):
    """Model, optimizer and the number of steps done, from the checkpoint if there is one."""
    model, optimizer = training(width, precision)
    path = folder / FILE
    if not path.exists():
        return model, optimizer, 0
    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer, checkpoint["step"]


class Death:
    """Kills its own process at one moment of a save: after so many bytes of the file, or at a later
    call.
    """

    def __init__(self, moment):
        self.moment = moment
        self.bytes = 0

    def open(self, path, mode):
        file = builtins.open(path, mode, buffering=0)
        write = file.write

        class Watched:  # what torch.save asks of a file
            fileno, flush, close = file.fileno, file.flush, file.close
            __enter__ = lambda inner: inner  # noqa: E731
            __exit__ = lambda inner, *_: file.close()  # noqa: E731

            def write(inner, data):
                data = memoryview(data).cast("B")
                if isinstance(self.moment, int) and self.bytes + len(data) > self.moment:
                    write(data[: self.moment - self.bytes])
                    self.now()
                self.bytes += len(data)
                return write(data)

        return Watched()

    def before(self, name):
        """Let `os.name` kill the process before it does its work."""
        function = getattr(os, name)

        def last(*args):
            if self.moment == name:
                self.now()
            return function(*args)

        setattr(os, name, last)

    def now(self):
        os.kill(os.getpid(), signal.SIGKILL)


def run(folder, steps, width, precision, report, fatal=None, moment=None):
    """Train to `steps` steps from what is in `folder`, saving after each.

    Args:
        report: a connection: gets ("saving", step) and ("saved", step) around every save.
        fatal, moment: at the save of number `fatal` of this process (from 1), die at that moment:
            after so many bytes, or before `os.fsync` or `os.replace` is called.
    """
    torch.set_num_threads(1)
    model, optimizer, done = resumed(folder, width, precision)
    save = save_function()
    for number, step in enumerate(range(done + 1, steps + 1), start=1):
        one_step(model, optimizer, step)
        if number == fatal:
            death = Death(moment)
            for name in ("fsync", "replace"):
                death.before(name)
            save = save_function(open=death.open)
        report.send(("saving", step))
        save(folder / FILE, model, optimizer, step)
        report.send(("saved", step))
