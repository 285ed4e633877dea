"""What compressed moments do to Adam's update, against float32 moments fed the same gradients. Not
a test.

`python tests/helpers/quality.py` prints the table. Gradients are normal, with a mean of a tenth of
their standard deviation and a log-normal standard deviation per element: `spread_of_std` = 0.5 is
mild, 1 puts a thousandfold of v into one group.
"""

import sys

import torch

from fused_adam.numerics import codecs

CPU = torch.device("cpu")


def nearest_bf16(m, v, words):
    """What fused peers do."""
    return m.bfloat16().float(), v.bfloat16().float()


def bf16(m, v, words):
    return m.bfloat16().float(), codecs.stochastic_bf16(v, codecs.state_noise(words)).float()


def int8(m, v, words):
    m = codecs.decode_m(*codecs.encode_m(m))
    return m, codecs.decode_v(*codecs.encode_v(v, codecs.state_noise(words)))


def update_quality(
    store, spread_of_std, *, std=1e-3, drop=False, steps=2500, numel=8192, beta1=0.9, beta2=0.999
):
    """Run Adam's moments twice, exact and through `store(m, v, words)`, with eps = 0.

    With `drop` the gradients of every second element become ten times smaller after half the steps.

    Returns a dict: `rmse` of the update over the last fifth of the steps, relative to the update's
    own; `largest` and `largest_fp32` |update|, in units of lr; `v_ratio`, the mean of v / v_fp32 at
    the end.
    """
    generator = torch.Generator().manual_seed(1)
    deviation = std * torch.exp(spread_of_std * torch.randn(numel, generator=generator))
    m, v, m32, v32 = torch.zeros(4, numel)
    error, square, largest, largest32 = 0.0, 0.0, 0.0, 0.0
    for step in range(1, steps + 1):
        if drop and step == steps // 2:
            deviation[::2] /= 10
        g = deviation * (0.1 + torch.randn(numel, generator=generator))
        m, m32 = (x + (1 - beta1) * (g - x) for x in (m, m32))
        v, v32 = (beta2 * x + ((1 - beta2) * g) * g for x in (v, v32))
        scale = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        u, u32 = scale * m / v.sqrt(), scale * m32 / v32.sqrt()
        largest, largest32 = (
            max(largest, float(u.abs().max())),
            max(largest32, float(u32.abs().max())),
        )
        if step > steps - steps // 5:
            error, square = (
                error + float((u - u32).square().mean()),
                square + float(u32.square().mean()),
            )
        m, v = store(m, v, codecs.random_words(0, 0, step, 0, numel, CPU))
    return {
        "rmse": (error / square) ** 0.5,
        "largest": largest,
        "largest_fp32": largest32,
        "v_ratio": float((v.double() / v32.double()).mean()),
    }


def main():
    torch.set_num_threads(1)
    for spread_of_std, drop in ((0.5, False), (1.0, False), (0.5, True), (1.0, True)):
        for store in (nearest_bf16, bf16, int8):
            found = {
                name: float(f"{x:.4g}")
                for name, x in update_quality(store, spread_of_std, drop=drop).items()
            }
            print(
                f"{store.__name__:13} spread {spread_of_std} {'drop' if drop else 'flat'}",
                found,
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
