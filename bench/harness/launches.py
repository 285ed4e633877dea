"""The one place of bench that reaches into the kernels: launches taken away, so that Python's part
can be timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from unittest import mock


def interpreted() -> bool:
    """Have Triton run on CPU tensors in this process; False if it was imported too early."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


def no_interpreter() -> str | None:
    """Why Triton cannot run on this CPU, or None."""
    for module in ("triton", "numpy"):
        if importlib.util.find_spec(module) is None:
            return f"Triton's interpreter needs {module}, which is not installed"
    return None if interpreted() else "triton was imported before it could be told to run on a CPU"


@contextlib.contextmanager
def stubbed_launches() -> Iterator[None]:
    """While it lasts every kernel launch of fused_adam does nothing: plans, tables and uploads go
    on.

    Raises ImportError without triton.
    """
    from fused_adam_kernels.launch import Launcher

    def nothing(self: Launcher, *arguments: object) -> None:
        """Stands for a launch."""

    with mock.patch.object(Launcher, "__call__", nothing):
        yield


@contextlib.contextmanager
def launch_shape(block: int, num_warps: int) -> Iterator[None]:
    """While it lasts the update is launched with other sizes. Optimizers made under it must be
    stepped under it.

    Args:
        block: elements per program. num_warps: warps per program.
    """
    from fused_adam_kernels import adam
    from fused_adam_kernels.config import Config

    with mock.patch.object(
        adam, "launch_config", lambda *mix: Config(block=block, num_warps=num_warps)
    ):
        yield
