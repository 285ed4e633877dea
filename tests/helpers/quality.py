"""What compressed moments do to Adam's update, against float32 moments fed the same gradients. Not
a test.

`python tests/helpers/quality.py` prints the table. Gradients are normal, with a mean of a tenth of
their standard deviation and a log-normal standard deviation per element: `spread` = 0.5 is mild, 1
puts a thousandfold of v into one group, 2 a millionfold.
"""

import sys
from typing import NamedTuple

import torch

from fused_adam.numerics import codecs

CPU = torch.device("cpu")
GROUP = codecs.GROUP


def nearest_bf16(m, v, bits):
    """What fused peers do."""
    return m.bfloat16().float(), v.bfloat16().float()


def bf16(m, v, bits):
    return m.bfloat16().float(), codecs.stochastic_bf16(v, codecs.state_noise(bits)).float()


def int8(m, v, bits):
    return codecs.decode_moments(*codecs.encode_moments(m, v, codecs.state_noise(bits)))


class Quality(NamedTuple):
    """What `update_quality` measures."""

    rmse: float  # of the update over the last fifth of the steps, relative to the update's own
    largest: float  # |update| of all steps, relative to fp32's largest
    v_ratio: float  # mean of v / v_fp32 at the end
    moved: torch.Tensor  # sum of the updates since `since`, per element, in units of lr
    moved_fp32: torch.Tensor


def deviations(numel, spread, std, kind="normal"):
    """Standard deviation of each element's gradient; "outlier": one of each group is 10,000 times
    larger.
    """
    generator = torch.Generator().manual_seed(1)
    deviation = std * torch.exp(spread * torch.randn(numel, generator=generator))
    if kind == "outlier":
        deviation[::GROUP] *= 1e4
    return deviation


def update_quality(
    store,
    spread=0.5,
    *,
    kind="normal",
    std=1e-3,
    change=None,
    at=None,
    since=0,
    only=slice(None),
    steps=2500,
    numel=4096,
    beta1=0.9,
    beta2=0.999,
):
    """Run Adam's moments twice, exact and through `store(m, v, bits)`, with eps = 0.

    Args:
        store: (m, v, random bits) -> what is read back at the next step.
        spread: of the logarithms of the gradients' standard deviations.
        kind: "normal", "outlier" (see `deviations`) or "sparse" (90 % of the gradients are zero).
        change, at: `change(deviation)` edits the standard deviations in place at step `at`.
        since: the first step whose update counts as movement.
        only: the elements whose error is measured.
    """
    generator = torch.Generator().manual_seed(2)
    deviation = deviations(numel, spread, std, kind)
    m, v, m32, v32, moved, moved32 = torch.zeros(6, numel)
    error, square, largest, largest32 = 0.0, 0.0, 0.0, 0.0
    for step in range(1, steps + 1):
        if step == at:
            change(deviation)
        g = deviation * (0.1 + torch.randn(numel, generator=generator))
        if kind == "sparse":
            g = g * (torch.rand(numel, generator=generator) < 0.1)
        m, m32 = (x + (1 - beta1) * (g - x) for x in (m, m32))
        v, v32 = (beta2 * x + ((1 - beta2) * g) * g for x in (v, v32))
        scale = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        # Where nothing has arrived yet, 0 / 0 is no update.
        u, u32 = (
            torch.where((first == 0) & (second == 0), 0.0, scale * first / second.sqrt())
            for first, second in ((m, v), (m32, v32))
        )
        largest = max(largest, float(u.abs().max()))
        largest32 = max(largest32, float(u32.abs().max()))
        if step > steps - steps // 5:
            error += float((u - u32)[only].square().mean())
            square += float(u32[only].square().mean())
        if step >= since:
            moved, moved32 = moved + u, moved32 + u32
        m, v = store(m, v, codecs.random_words(0, 0, step, 0, numel, CPU, share=8))
    live = v32 > 0
    return Quality(
        rmse=(error / square) ** 0.5,
        largest=largest / largest32,
        v_ratio=float((v[live].double() / v32[live].double()).mean()),
        moved=moved,
        moved_fp32=moved32,
    )


def drop(deviation):
    """Every second element's gradients become ten times smaller."""
    deviation[::2] /= 10


SCENARIOS = {
    "spread 0.5": {"spread": 0.5},
    "spread 1": {"spread": 1.0},
    "spread 2": {"spread": 2.0},
    "outlier": {"kind": "outlier"},
    "90 % zeros": {"kind": "sparse"},
    "drop": {"spread": 1.0, "change": drop, "at": 1250},
}


def main():
    torch.set_num_threads(1)
    for name, options in SCENARIOS.items():
        for store in (nearest_bf16, bf16, int8):
            quality = update_quality(store, **options)
            print(
                f"{store.__name__:13} {name:11} update RMSE {quality.rmse:8.4f}  "
                f"largest update {quality.largest:8.3g}  mean of v {quality.v_ratio:7.4f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
