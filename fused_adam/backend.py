"""Who runs a section: triton, reference or compiled. The only importer of the kernels, and only when asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_adam_kernels import table

from .arena import real
from .host import HostRunner
from .plan import Launch, Row, Section, Staging
from .reference import CHUNK
from .scalars import Guard, Hyper

BACKENDS = ("auto", "triton", "reference", "compiled")
TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices are called cuda


class Runner(Protocol):
    """Runs one section's launches, step after step."""

    def begin(self, grads: Sequence[Tensor], addresses: Sequence[int]) -> None:
        """Take this step's gradients, of all parameters that have one, and where they are."""
        ...

    def square_sum(self) -> Tensor:
        """The sum of squares of this section's gradients: float64, one element, on its device."""
        ...

    def run(self, hyper: Hyper, guard: Guard) -> None:
        """Update every row, or none, and let the gradients go. `hyper`: per group."""
        ...


def check_name(backend: str) -> None:
    """Raise ValueError unless `backend` is one we know."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; allowed: {', '.join(map(repr, BACKENDS))}")


def choose(backend: str, device: torch.device) -> str:
    """The backend that runs on this device: "triton", "reference" or "compiled".

    Raises RuntimeError if the one asked for cannot run there, saying why and what to do.
    """
    if backend == "auto":
        backend = "reference" if device.type == "cpu" else "triton"
    reason = {"triton": _no_triton, "reference": _no_reference, "compiled": _no_compiled}[backend](device)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run on {device}: {reason}")
    return backend


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


def _no_triton(device: torch.device) -> str | None:
    if device.type not in (*TRITON_DEVICES, "cpu"):
        return f"fused-adam runs on cpu, {' and '.join(TRITON_DEVICES)} devices"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install triton>=3.6, or pass backend='reference' for a slow but equal step"
    if device.type == "cpu" and not _interpreting():
        return "a CPU runs Triton kernels only with TRITON_INTERPRET=1 set before triton is imported; use 'reference'"
    return None


def _no_reference(device: torch.device) -> str | None:
    return "parameters there have no values" if device.type == "meta" else None


def _no_compiled(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it promises its bits on CPU only; use 'triton'"
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        return "torch.compile needs a C++ compiler (g++ or clang++, or CXX); install one, or use 'reference'"
    return None


def staging(backend: str) -> Staging:
    """What plans must copy for this backend: on the host, many small tensors would cost a dozen calls each."""
    if backend == "triton":
        return Staging()
    return Staging(small=CHUNK // 16, page=CHUNK, shared=True)


def bind(backend: str, section: Section) -> Runner:
    """The runner of one section. `backend` is a name that `choose` returned."""
    return TritonRunner(section) if backend == "triton" else HostRunner(section, backend == "compiled")


class TritonRunner:
    """One prologue and one update launch per dtype mix, over tables that live on the device."""

    def __init__(self, section: Section) -> None:
        from fused_adam_kernels import adam, norm, scalars

        self._adam, self._prologue, self._square_sum = adam, scalars.prologue, norm.square_sum
        self._norm: tuple[list[tuple[torch.dtype, Tensor]], Tensor] | None = None  # made where it is asked for
        self.section = section
        self.device = section.device
        self.rows = section.rows
        self.leaders = {span.first.index: span for launch in section.launches for span in launch.spans}
        self.host_rows = torch.tensor([self._row(row) for row in self.rows], dtype=torch.int64)
        self.device_rows = self._upload(self.host_rows)
        self.scalars = torch.empty(len(self.rows), table.SCALARS, dtype=section.compute, device=self.device)
        position = {row.index: i for i, row in enumerate(self.rows)}
        self.launches = [
            (launch, self._upload(self._blocks(launch, position))) for launch in section.launches if launch.spans
        ]
        self.moving = [(i, row.index) for i, row in enumerate(self.rows) if row.slots.get("grad", 0) is None]
        self.moving_rows = torch.tensor([i for i, _ in self.moving])
        self.grad_addresses: Sequence[int] = ()
        self.hyper: list[tuple[float | Tensor, ...]] = []
        self.device_hyper = torch.empty(0, dtype=torch.float64, device=self.device)
        staged = [row for row in self.rows if row.stage and row.param.numel()]
        self.stage = (
            [row.param for row in staged],
            [row.stage[0] for row in staged if row.stage],
            [row.index for row in staged],
            [row.stage[1] for row in staged if row.stage],
        )

    def _row(self, row: Row) -> list[int]:
        columns = [0] * table.ROW
        for column, key in (
            (table.PARAM, "param"),
            (table.GRAD, "grad"),
            (table.EXP_AVG, "exp_avg"),
            (table.EXP_AVG_SQ, "exp_avg_sq"),
            (table.MAX_EXP_AVG_SQ, "max_exp_avg_sq"),
        ):
            slot = row.slots.get(key)
            columns[column] = slot.address if slot else 0
        columns[table.STEP] = row.home.step_address
        columns[table.GROUP] = row.group
        # A row that another one's span covers has no elements of its own to update.
        span = self.leaders.get(row.index)
        columns[table.NUMEL] = span.numel if span else 0
        columns[table.GRAD_NUMEL] = row.param.numel()
        return columns

    def _blocks(self, launch: Launch, position: dict[int, int]) -> Tensor:
        rows = torch.tensor([position[span.first.index] for span in launch.spans])
        chunks = torch.tensor([-(-span.numel // self._adam.BLOCK) for span in launch.spans])
        first = chunks.cumsum(0) - chunks
        row = torch.repeat_interleave(rows, chunks)
        chunk = torch.arange(int(chunks.sum())) - torch.repeat_interleave(first, chunks)
        return torch.stack([row, chunk], dim=1).to(torch.int32)

    def _upload(self, host: Tensor) -> Tensor:
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    def begin(self, grads: Sequence[Tensor], addresses: Sequence[int]) -> None:
        with self._on_device():
            self._refresh_grads(addresses)
            params, stage_params, grad_indexes, stage_grads = self.stage
            if params:
                torch._foreach_copy_(stage_params, params)
                torch._foreach_copy_(stage_grads, [real(grads[i]) for i in grad_indexes])

    def square_sum(self) -> Tensor:
        if self._norm is None:
            self._norm = self._norm_tables()
        launches, partials = self._norm
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        with self._on_device():
            self._square_sum(self.device_rows, launches, partials, total)
        return total

    def _norm_tables(self) -> tuple[list[tuple[torch.dtype, Tensor]], Tensor]:
        """Blocks per gradient dtype, and a place for every chunk, in the order of the parameters."""
        blocks: dict[torch.dtype, list[tuple[int, int, int]]] = {}
        dtype_of = {row.index: launch.grad for launch in self.section.launches for row in launch.rows}
        place = 0
        for i, row in enumerate(self.rows):
            for chunk in range(-(-row.param.numel() // table.NORM_CHUNK)):
                blocks.setdefault(dtype_of[row.index], []).append((i, chunk, place))
                place += 1
        launches = [(dtype, self._upload(torch.tensor(b, dtype=torch.int32))) for dtype, b in blocks.items()]
        return launches, torch.empty(place, dtype=torch.float64, device=self.device)

    def run(self, hyper: Hyper, guard: Guard) -> None:
        with self._on_device():
            self._refresh_hyper(hyper)
            found_inf, grad_scale = (
                None if tensor is None else tensor.to(self.device, torch.float32, non_blocking=True)
                for tensor in (guard.found_inf, guard.grad_scale)
            )
            square_sum = guard.square_sum
            if square_sum is not None:
                square_sum = square_sum.to(self.device, non_blocking=True)
            self._prologue(
                self.device_rows, self.device_hyper, self.scalars, found_inf, grad_scale, square_sum, guard.stats
            )
            for launch, blocks in self.launches:
                self._adam.adam_step(
                    self.device_rows, blocks, self.scalars, launch.param, launch.grad, launch.state, launch.amsgrad
                )
            params, stage_params, *_ = self.stage
            if params:
                torch._foreach_copy_(params, stage_params)

    def _on_device(self) -> Any:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.get_device_module(self.device).device(self.device)

    def _refresh_grads(self, addresses: Sequence[int]) -> None:
        if self.moving and addresses != self.grad_addresses:
            moved = torch.tensor([addresses[index] for _, index in self.moving])
            self.host_rows[self.moving_rows, table.GRAD] = moved
            self.device_rows.copy_(self._upload(self.host_rows), non_blocking=True)
            self.grad_addresses = addresses

    def _refresh_hyper(self, hyper: Hyper) -> None:
        plain = [tuple(0.0 if isinstance(x, Tensor) else float(x) for x in values) for values in hyper]
        if plain != self.hyper:
            self.device_hyper = self._upload(torch.tensor(plain, dtype=torch.float64))
            self.hyper = list(plain)
        for i, values in enumerate(hyper):
            for j, value in enumerate(values):
                if isinstance(value, Tensor):
                    self.device_hyper[i, j].copy_(value.reshape(()), non_blocking=True)


def increment_versions(tensors: Iterable[Tensor]) -> None:
    """Tell autograd that we wrote to these: kernels write through addresses, which it does not see."""
    torch.autograd.graph.increment_version(list(tensors))
