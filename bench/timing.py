"""How time is measured: interleaved rounds, medians and quartiles, copy bandwidth. Knows no optimizer."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

COPY_BYTES = 256 << 20


def statistic(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, as records hold them."""
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [median] * 3
    return {"median": median, "low": low, "high": high, "rounds": len(samples)}


def ratio(times: Sequence[float], of: Sequence[float]) -> dict[str, Any]:
    """Statistic of times / of, round by round: a slow moment of the machine hits both."""
    return statistic([a / b for a, b in zip(times, of, strict=True)])


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall time of one call, the device's work included; with `repeats` the mean of calls that queue up."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def interleaved(
    measures: Mapping[str, Callable[[], float]],
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 200,
    on_round: Callable[[float], None] = lambda share: None,
) -> dict[str, list[float]]:
    """Measure each in turn, A B C A B C, until the time is used up, so that a busy machine slows all alike.

    Args:
        measures: each does its work once and returns how long that took, in seconds.
        seconds: when to stop, once there are `min_rounds`.
        on_round: called after every round with the share done.
    """
    samples: dict[str, list[float]] = {name: [] for name in measures}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    begin = time.monotonic()
    try:
        for done in range(1, max_rounds + 1):
            for name, measure in measures.items():
                samples[name].append(measure())
            used = (time.monotonic() - begin) / seconds
            on_round(min(1.0, max(used, done / max_rounds)))
            if used >= 1 and done >= min_rounds:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


class Copy:
    """`copy_` of one large buffer to another: the limit that every bandwidth is held against.

    Bytes read plus bytes written count. A CPU also reads what it is about to overwrite (write-allocate), which does
    not count: code that updates in place can exceed this limit there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source = torch.ones(COPY_BYTES // 4, device=device)
        self.target = torch.empty_like(self.source)
        self.repeats = 1 if device.type == "cpu" else 20
        self.measure()

    @staticmethod
    def gb_per_s(seconds: float) -> float:
        """Of a copy that took so long."""
        return 2 * COPY_BYTES / seconds / 1e9

    def measure(self) -> float:
        """Seconds per copy."""
        return seconds_of(lambda: self.target.copy_(self.source), self.device, self.repeats)


def copy_bandwidth(device: torch.device, seconds: float = 1.0) -> dict[str, Any]:
    """Statistic of the copy bandwidth in GB/s."""
    copy = Copy(device)
    times = interleaved({"copy": copy.measure}, seconds, min_rounds=5)["copy"]
    return statistic(list(map(Copy.gb_per_s, times)))
