"""`schemes`: what storing Adam's moments in few bits does to the update, ours and others'.

Every scheme gets the same gradients. An update comes from the moments before they are stored, as in
all of these optimizers; what is stored is what the next step starts from. The others are written
from what their papers and documentation describe, so that storage alone is compared: no kernel, no
learning rate, no weights.

A result: {"gradients", "scheme", "bytes" of state per parameter, "steps", "elements", "rmse",
"mean_v", "largest"}. `rmse`: of the update over the last 400 steps, against fp32's and relative to
its size. `mean_v`: of v / fp32's v at the end, where gradients fell of those elements alone.
`largest`: the largest |update| of all steps, relative to fp32's. null: not finite.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_adam.numerics import codecs
from fused_adam.precision import GROUP

from .harness.console import Progress, Table, three_digits
from .harness.results import Record, Recorder, unique
from .harness.session import Session

Moments = tuple[Tensor, Tensor]
# (m, v, random words) -> the moments as the next step reads them
Store = Callable[[Tensor, Tensor, Tensor], Moments]

NUMEL, STEPS, QUICK_STEPS, WINDOW = 4096, 2500, 100, 400
BETA1, BETA2 = 0.9, 0.999
BLOCK = 256  # elements per scale of bitsandbytes and torchao
FLOAT8 = torch.float8_e4m3fn


# Ours.


def int8_lattice(m: Tensor, v: Tensor, bits: Tensor) -> Moments:
    """The `int8` states of our recipes."""
    return codecs.decode_moments(*codecs.encode_moments(m, v, codecs.state_noise(bits)))


def bf16_stochastic(m: Tensor, v: Tensor, bits: Tensor) -> Moments:
    """The `bf16` states of our recipes: m to nearest, v stochastically."""
    return m.bfloat16().float(), codecs.stochastic_bf16(v, codecs.state_noise(bits)).float()


# Others.


def bf16_nearest(m: Tensor, v: Tensor, bits: Tensor) -> Moments:
    """What torch.optim does with bfloat16 parameters."""
    return m.bfloat16().float(), v.bfloat16().float()


def _per_group(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows of `size` elements, and the largest magnitude of each, above zero."""
    rows = x.view(-1, size)
    return rows, rows.abs().amax(1, keepdim=True).clamp(min=1e-38)


def softsign_and_root(m: Tensor, v: Tensor, bits: Tensor) -> Moments:
    """FlashOptim: groups of 32 with fp16 scales; m by softsign, 2x / (1 + |x|); v by its root."""
    rows, scale = _per_group(m, GROUP)
    x = rows / scale
    code = (127 * 2 * x / (1 + x.abs())).round() / 127
    m = code / (2 - code.abs()) * scale.half().float()
    rows, scale = _per_group(v.sqrt(), GROUP)
    root = (255 * rows / scale).round() / 255 * scale.half().float()
    return m.flatten(), root.square().flatten()


def dynamic_tree(m: Tensor, v: Tensor, bits: Tensor) -> Moments:
    """bitsandbytes: blocks of 256; the nearest of 256 values spread over seven decades."""
    return _nearest(m, DYNAMIC_SIGNED), _nearest(v, DYNAMIC_UNSIGNED)


def dynamic_values(signed: bool) -> Tensor:
    """Zero, one, and the middles of each decade's equal parts, twice as many per decade upwards."""
    fraction_bits = range(7) if signed else range(1, 8)
    values = [0.0, 1.0]
    for decade, bits in enumerate(fraction_bits):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC_SIGNED, DYNAMIC_UNSIGNED = dynamic_values(True), dynamic_values(False)


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    rows, scale = _per_group(x, BLOCK)
    values = values.to(x.device)
    between = (values[1:] + values[:-1]) / 2
    return (values[torch.bucketize((rows / scale).contiguous(), between)] * scale).flatten()


def float8(m: Tensor, v: Tensor, bits: Tensor) -> Moments:
    """torchao: blocks of 256 with fp32 scales; float8 of 4 exponent and 3 fraction bits."""

    def stored(x: Tensor) -> Tensor:
        rows, scale = _per_group(x, BLOCK)
        scale = scale / torch.finfo(FLOAT8).max
        return ((rows / scale).to(FLOAT8).float() * scale).flatten()

    return stored(m), stored(v)


class Scheme(NamedTuple):
    """How moments are stored, and the bytes of both per parameter."""

    store: Store
    bytes: float


SCHEMES = {
    "int8 (ours)": Scheme(int8_lattice, 2 + 4 / GROUP),
    "flashoptim 8-bit": Scheme(softsign_and_root, 2 + 4 / GROUP),
    "bitsandbytes 8-bit": Scheme(dynamic_tree, 2 + 8 / BLOCK),
    "torchao fp8": Scheme(float8, 2 + 8 / BLOCK),
    "bf16 (ours)": Scheme(bf16_stochastic, 4),
    "bf16, nearest": Scheme(bf16_nearest, 4),
}


class Gradients(NamedTuple):
    """Normal gradients with a mean of a tenth of their standard deviation.

    spread: of the logarithms of the elements' standard deviations.
    outlier: how many times larger that of one element per group of 32 is.
    density: the share of gradients that are not zero.
    falls: every second element's become ten times smaller after half of the steps.
    """

    spread: float = 0.5
    outlier: float = 1.0
    density: float = 1.0
    falls: bool = False


GRADIENTS = {
    "spread 0.25": Gradients(0.25),
    "spread 0.5": Gradients(0.5),
    "spread 1": Gradients(1.0),
    "spread 2": Gradients(2.0),
    "an outlier per group": Gradients(outlier=1e4),
    "90 % zeros": Gradients(density=0.1),
    "after a tenfold drop": Gradients(falls=True),
}


def run(arguments: argparse.Namespace) -> int:
    """Compare the schemes; returns the exit code."""
    session = Session(arguments)
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    with session.measuring() as progress:
        measure(session.recorder, session.device, steps, progress)
    return session.finish(tables)


def measure(
    recorder: Recorder, device: torch.device, steps: int, progress: Progress, numel: int = NUMEL
) -> None:
    """Every kind of gradients, all schemes side by side."""
    for number, (name, gradients) in enumerate(GRADIENTS.items()):
        progress(name, number / len(GRADIENTS))
        for scheme, quality in compare(gradients, device, steps, numel).items():
            sizes = {"bytes": SCHEMES[scheme].bytes, "steps": steps, "elements": numel}
            finite = {k: x if math.isfinite(x) else None for k, x in quality.items()}
            recorder.results.append({"gradients": name, "scheme": scheme, **sizes, **finite})


def compare(
    gradients: Gradients, device: torch.device, steps: int, numel: int
) -> dict[str, dict[str, float]]:
    """Scheme -> `rmse`, `mean_v` and `largest`, see the top of this file."""
    generator = torch.Generator().manual_seed(11)

    def normal() -> Tensor:
        return torch.randn(numel, generator=generator).to(device)

    deviation = 0.01 * torch.exp(gradients.spread * normal())
    deviation[::GROUP] *= gradients.outlier
    m32, v32 = torch.zeros(2, numel, device=device, dtype=torch.float64)
    moments: dict[str, Moments] = {
        name: (torch.zeros(numel, device=device), torch.zeros(numel, device=device))
        for name in SCHEMES
    }
    error = dict.fromkeys(SCHEMES, 0.0)
    largest = dict.fromkeys(SCHEMES, 0.0)
    size = largest32 = 0.0
    for step in range(1, steps + 1):
        if gradients.falls and step == steps // 2:
            deviation[::2] /= 10
        g = deviation * (0.1 + normal())
        if gradients.density < 1:
            g = g * (torch.rand(numel, generator=generator).to(device) < gradients.density)
        m32 = m32 + (1 - BETA1) * (g.double() - m32)
        v32 = BETA2 * v32 + (1 - BETA2) * g.double() ** 2
        correction = math.sqrt(1 - BETA2**step) / (1 - BETA1**step)
        update32 = correction * _update(m32, v32)
        largest32 = max(largest32, float(update32.abs().max()))
        measured = step > steps - WINDOW
        size += float(update32.square().mean()) if measured else 0.0
        bits = codecs.random_words(0, 0, step, 0, numel, device, share=8)
        for name, (m, v) in moments.items():
            m = m + (1 - BETA1) * (g - m)
            v = BETA2 * v + ((1 - BETA2) * g) * g
            update = correction * _update(m, v)
            largest[name] = max(largest[name], float(update.abs().max()))
            if measured:
                error[name] += float((update.double() - update32).square().mean())
            moments[name] = SCHEMES[name].store(m, v, bits)
    counted = v32 > 0
    if gradients.falls:
        counted[1::2] = False
    return {
        name: {
            "rmse": math.sqrt(error[name] / size),
            "mean_v": float((v.double()[counted] / v32[counted]).mean()),
            "largest": largest[name] / largest32,
        }
        for name, (_, v) in moments.items()
    }


def _update(m: Tensor, v: Tensor) -> Tensor:
    """m / sqrt(v), eps being 0; nothing where no gradient has arrived yet."""
    return torch.where((m == 0) & (v == 0), 0.0, m / v.sqrt())


MEASURES = {
    "rmse": "error of the update: RMSE / rms of fp32's",
    "mean_v": "mean of v / fp32's v",
    "largest": "largest |update| / fp32's",
}


def tables(record: Record) -> list[Table]:
    """A table per measure: a row per kind of gradients, a column per scheme."""
    results = record["results"]
    cells = {(result["gradients"], result["scheme"]): result for result in results}
    schemes = {result["scheme"]: result["bytes"] for result in results}
    heads = ["gradients", *(f"{name}, {size:.4g} B" for name, size in schemes.items())]
    sizes = f"{results[0]['steps']} steps of {results[0]['elements']:,} elements"
    found = []
    for measure_name, title in MEASURES.items():
        rows: list[Sequence[str]] = [
            [name, *(cell_text(cells[name, scheme][measure_name]) for scheme in schemes)]
            for name in unique(results, "gradients")
        ]
        found.append(Table(f"{title}; beta2 {BETA2}, eps 0, {sizes}", heads, rows))
    return found


def cell_text(number: float | None) -> str:
    """Three digits; what is not finite is infinite: a v that has become zero."""
    return "inf" if number is None else three_digits(number)
