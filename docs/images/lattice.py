"""Draws lattice.png: how far apart neighbouring codes of the second moment are, relative to it.

python docs/images/lattice.py    (from the repository's root; needs matplotlib)
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bench.harness.plots import BLUE, GREY, SAND, STYLE
from fused_adam.numerics import codecs

FILE = Path(__file__).with_suffix(".png")
SPANS = (3, 16, 48)  # binades that a group's v span


def companded() -> tuple[torch.Tensor, torch.Tensor]:
    """(c / 255)^4, the code of earlier versions: values relative to the largest, and their gaps."""
    values = (torch.arange(1, 256, dtype=torch.float64) / 255) ** 4
    return values[:-1], values.diff() / values[:-1]


def lattice(span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All values that a group of this span can store, relative to the largest, and their gaps."""
    v = torch.exp2(-torch.linspace(span, 0, codecs.GROUP))
    noise = torch.full((codecs.GROUP,), 0x8000, dtype=torch.int32)
    _, code, m_scale, v_scale = codecs.encode_moments(v.sqrt(), v, noise)
    codes = torch.arange(int(code.min()), int(code.max()) + 1)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % codecs.GROUP), value=int(code.max()))
    groups = len(codes) // codecs.GROUP
    scales = (m_scale.repeat(groups), v_scale.repeat(groups))
    _, values = codecs.decode_moments(torch.zeros(len(codes)), codes, *scales)
    values = values.double().unique()
    return values[:-1], values.diff() / values[:-1]


def main() -> None:
    """Draw the picture next to this file."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        axes.plot(*companded(), color=SAND, label="companding: (code / 255)$^4$, one curve for all")
        for span, shade in zip(SPANS, (1.0, 0.65, 0.35), strict=True):
            label = f"lattice of a group that spans 2$^{{{span}}}$"
            axes.plot(*lattice(span), color=BLUE, alpha=shade, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(2.0**-50, 1.5)
        axes.set_xlabel("second moment, relative to the largest of its group")
        axes.set_ylabel("distance to the next code, relative")
        axes.set_yticks([0.01, 0.1, 1, 10], ["1 %", "10 %", "100 %", "1,000 %"])
        axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        axes.legend(loc="lower left")
        figure.savefig(FILE, dpi=110)


if __name__ == "__main__":
    main()
