"""How time is measured: interleaved rounds, medians and quartiles, copy bandwidth. Knows no
optimizer.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

COPY_BYTES = 256 << 20
Samples = dict[str, list[float]]
# A GPU begins at boost clocks, and lowers them within a second of load: rounds before that would be
# too fast.
WARM_UP_SECONDS = 1.0


def statistic(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, as records hold them."""
    median = statistics.median(samples)
    low, _, high = (
        statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [median] * 3
    )
    return {"median": median, "low": low, "high": high, "rounds": len(samples)}


def ratio(times: Sequence[float], of: Sequence[float]) -> dict[str, Any]:
    """Statistic of times / of, round by round: a slow moment of the machine hits both."""
    return statistic([a / b for a, b in zip(times, of, strict=True)])


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall time of one call, the device's work included; with `repeats` the mean of calls that
    queue up.
    """
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def warm_up_seconds(device: torch.device) -> float:
    """How long the device has to work before its clocks are those of a long run."""
    return 0.0 if device.type == "cpu" else WARM_UP_SECONDS


def random_values(numel: int, device: torch.device) -> torch.Tensor:
    """float32, the same at every call: what power a GPU draws, and so its clocks, depends on the
    bits it moves.
    """
    return torch.rand(numel, generator=torch.Generator(device).manual_seed(0), device=device)


def give_back_memory() -> None:
    """Return memory that nothing uses any more to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def interleaved(
    measures: Mapping[str, Callable[[], float]],
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 200,
    on_round: Callable[[float], None] = lambda share: None,
    warm_up: float = 0.0,
    on_error: Callable[[str, Exception], None] | None = None,
    samples: Samples | None = None,
) -> Samples:
    """Measure each in turn, A B C A B C, until the time is used up, so that a busy machine slows
    all alike. Returns seconds per round, by name.

    Args:
        measures: each does its work once and returns how long that took, in seconds.
        seconds: when to stop, once there are `min_rounds`.
        on_round: called after every round with the share done.
        warm_up: for how many seconds rounds go by whose times are not kept.
        on_error: called with the name of a measure and what it raised, which then has no samples;
            memory that only it had used is given back. By default the error goes on to the caller.
        samples: filled as rounds end and returned, so that whole rounds outlive an interrupt.
    """
    samples = {} if samples is None else samples
    samples.update({name: [] for name in measures})

    def one_round() -> dict[str, float]:
        seconds, lost = {}, []
        for name in samples:
            try:
                seconds[name] = measures[name]()
            except Exception as error:
                if on_error is None:
                    raise
                on_error(name, error)
                lost.append(name)
        for name in lost:
            del samples[name]
            give_back_memory()  # the error, which held on to it, is gone
        return seconds

    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < warm_up:
            one_round()
        begin = time.monotonic()
        for done in range(1, max_rounds + 1):
            for name, value in one_round().items():
                samples[name].append(value)
            used = (time.monotonic() - begin) / seconds
            on_round(min(1.0, max(used, done / max_rounds)))
            if used >= 1 and done >= min_rounds:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


class Bandwidth(Protocol):
    """A limit that bandwidths are compared with: it moves a fixed number of bytes."""

    def measure(self) -> float:
        """Seconds that it takes once."""
        ...

    def gb_per_s(self, seconds: float) -> float:
        """Bytes read and written over the time."""
        ...


class CopyBandwidth:
    """`copy_` of one large buffer to another: the limit that every bandwidth is compared with.

    Bytes read plus bytes written count. A CPU also reads what it is about to overwrite
    (write-allocate), which does not count: code that updates in place can exceed this limit there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source = random_values(COPY_BYTES // 4, device)
        self.target = torch.empty_like(self.source)
        self.repeats = 1 if device.type == "cpu" else 20
        self.measure()

    def gb_per_s(self, seconds: float) -> float:
        """Of a copy that took so long."""
        return 2 * self.source.nbytes / seconds / 1e9

    def measure(self) -> float:
        """Seconds per copy."""
        return seconds_of(lambda: self.target.copy_(self.source), self.device, self.repeats)


def copy_bandwidth(device: torch.device, seconds: float = 1.0) -> dict[str, Any]:
    """Statistic of the copy bandwidth in GB/s."""
    copy = CopyBandwidth(device)
    measures = {"copy": copy.measure}
    times = interleaved(measures, seconds, min_rounds=5, warm_up=warm_up_seconds(device))["copy"]
    return statistic(list(map(copy.gb_per_s, times)))
