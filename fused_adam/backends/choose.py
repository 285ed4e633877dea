"""Which backend runs a launch group: triton, reference or compiled.

Runs nothing itself. Triton is imported only when it is asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..arguments import refuse
from ..numerics.formula import CHUNK
from ..numerics.norm import PartialSums
from ..numerics.scalars import GradTransform, Hyper
from ..plan import LaunchGroup
from ..state.staging import Staging
from .reference import ReferenceRunner
from .streaming import Ring

BACKENDS = ("auto", "triton", "reference", "compiled")
TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices are called cuda


def is_capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    # Only a process that has used CUDA can be capturing. The question alone raises on a machine
    # without a GPU: torch's CUDA build, which `pip install torch` brings to every Linux machine,
    # asks a driver that is not there.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


class Runner(Protocol):
    """Runs one launch group, step after step: `begin`, `square_sum` if there is a norm, `run`."""

    def begin(self, grads: Sequence[Tensor], addresses: Sequence[int], capturing: bool) -> None:
        """Take this step's gradients.

        Args:
            grads: what is here of the gradients, of every parameter that has one, in order.
            addresses: where they are. The same list as in the last step if none has moved.
            capturing: whether the stream is being captured in a CUDA graph.

        Raises RuntimeError if it is, and this runner cannot be captured.
        """
        ...

    def square_sum(self) -> Tensor:
        """The sum of squares of this group's gradients: float64, one element, on its device."""
        ...

    @property
    def partial_sums(self) -> PartialSums | None:
        """What the last `square_sum` has left in memory; None if there is no norm."""
        ...

    def prepare(self, hyper: Hyper, transform: GradTransform) -> None:
        """Do what may fail in `run` and changes nothing. Arguments: as for `run`."""
        ...

    def run(self, hyper: Hyper, transform: GradTransform) -> None:
        """Update every row, or none if the step is skipped, and let go of the gradients.

        Args:
            hyper: per param group, the values of `table.py`'s hyper columns.
            transform: what the gradients go through on their way into the update.
        """
        ...


def check_name(backend: str) -> None:
    """Raise ValueError unless `backend` is one we know."""
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is not known; allowed: {', '.join(map(repr, BACKENDS))}"
        )


def choose(backend: str, device: torch.device) -> str:
    """The backend that runs on this device: "triton", "reference" or "compiled".

    Raises RuntimeError if the one asked for cannot run there, saying why and what to do.
    """
    if device.type == "meta":
        raise RuntimeError(
            f"backend={backend!r} cannot run on meta: parameters there have no values; give them "
            "some before a step, as by to_empty(), or make the model under FakeTensorMode to step "
            "on shapes alone"
        )
    if backend == "auto":
        backend = "reference" if device.type == "cpu" else "triton"
    reason = None
    if backend == "triton":
        reason = _no_triton(device)
    elif backend == "compiled":
        reason = _no_compiled(device)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run on {device}: {reason}")
    return backend


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


def _no_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run there, and what to do; None if they can."""
    if device.type not in (*TRITON_DEVICES, "cpu"):
        return f"fused-adam runs on cpu, {' and '.join(TRITON_DEVICES)} devices"
    if importlib.util.find_spec("triton") is None:
        return (
            "triton is not installed; install triton>=3.6, or pass backend='reference' "
            "for a slow but equal step"
        )
    if device.type == "cpu" and not _interpreting():
        return (
            "a CPU runs Triton kernels only with TRITON_INTERPRET=1 set before triton is "
            "imported; use 'reference'"
        )
    return _no_interpreter() if device.type == "cpu" and _interpreting() else None


def _no_interpreter() -> str | None:
    """Why Triton's interpreter cannot run with the numpy that is there; None if it can."""
    try:
        triton, numpy = map(importlib.metadata.version, ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError as error:
        return f"Triton's interpreter needs {error.name}; install it, or use 'reference'"
    if _minor(triton) < (3, 7) and _minor(numpy) >= (2, 4):
        return (
            f"Triton {triton}'s interpreter fails with numpy {numpy}; "
            "install numpy<2.4 or triton>=3.7, or use 'reference'"
        )
    return None


def _minor(version: str) -> tuple[int, ...]:
    """Major and minor number: (3, 6) of "3.6.0+git1a2b"."""
    return tuple(map(int, version.split(".")[:2]))


def _no_compiled(device: torch.device) -> str | None:
    """Why compiled code cannot run there, and what to do; None if it can."""
    if device.type != "cpu":
        return "it promises its bits on CPU only; use 'triton'"
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        return (
            "torch.compile needs a C++ compiler (g++ or clang++, or CXX); install one, "
            "or use 'reference'"
        )
    return None


def check_streams(device: torch.device, backend: str) -> None:
    """Raise ValueError or RuntimeError unless state on the host can be streamed to this device.

    Args:
        device: of some of the parameters, whose memory is not the host's.
        backend: a name that `choose` returned for the device.
    """
    if backend != "triton":
        refuse(
            "state_device",
            "cpu",
            f"backend={backend!r} on {device}",
            "only the Triton kernels step on buffers that state is streamed through; use 'triton'",
        )
    if not hasattr(torch.get_device_module(device), "Stream"):
        raise RuntimeError(
            f"state_device='cpu' needs a device with streams, and {device} has none: leave "
            "state_device out to have state on the parameters' device"
        )


def staging(backend: str) -> Staging:
    """What is copied into scratch memory for this backend, besides what has to be.

    A kernel updates any number of tensors in one launch. Elsewhere each tensor costs a dozen calls,
    so small ones are updated together.
    """
    if backend == "triton":
        return Staging()
    return Staging(small=CHUNK // 8, page=2 * CHUNK, shared=True)


def bind(
    backend: str,
    group: LaunchGroup,
    needs_norm: bool,
    skip_spikes: bool,
    ring: Ring | None = None,
) -> Runner:
    """The runner of one launch group.

    Args:
        backend: a name that `choose` returned.
        needs_norm: whether `square_sum` will be asked for.
        skip_spikes: whether steps of large norms are skipped, too.
        ring: what the group's state is streamed through, if it is on the host.
    """
    if backend != "triton":
        return ReferenceRunner(group, backend)
    from .triton import TritonRunner  # imports triton

    return TritonRunner(group, needs_norm, skip_spikes, ring)
