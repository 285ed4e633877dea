"""A CUDA graph, or what stands in for one without a GPU."""

import torch
from training import gradient

from fused_adam.backends import choose as backend
from fused_adam.backends import tables
from fused_adam.state import staging
from fused_adam_kernels.launch import Launcher


class Recorder:
    """Stands in for a CUDA graph: what is sent to the device meanwhile is done at replay."""

    def __init__(self, monkeypatch):
        self.work, self.capturing = [], False
        monkeypatch.setattr(backend, "is_capturing", lambda: self.capturing)
        for owner, name in ((Launcher, "__call__"), (staging, "copy_all")):
            monkeypatch.setattr(owner, name, self._deferred(getattr(owner, name)))
        monkeypatch.setattr(tables, "send", self._send)

    def _deferred(self, function):
        def call(*args):
            if self.capturing:
                self.work.append((function, args))
            else:
                function(*args)

        return call

    def _send(self, host, device):
        if not self.capturing:
            return host.clone()
        sent = torch.full_like(host, -1)  # not there before a replay
        self.work.append((sent.copy_, (host,)))
        return sent

    def capture(self, function):
        self.capturing = True
        try:
            function()
        finally:
            self.capturing = False

    def replay(self):
        for function, args in self.work:
            function(*args)


class CudaGraph:
    """The real thing."""

    def __init__(self):
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, function):
        with torch.cuda.graph(self.graph):
            function()

    def replay(self):
        self.graph.replay()


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer, step, scale=1.0, in_place=False):
    for i, p in enumerate(params_of(optimizer)):
        grad = gradient(p, i, step) * scale
        if in_place:
            p.grad.copy_(grad)
        else:
            p.grad = grad
