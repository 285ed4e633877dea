"""A few steps for tools that watch kernels: `profile DTYPE [RECIPE]`, one large parameter; `check`,
odd sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from fused_adam import FusedAdamW

CASES = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, "split32-bf16"),
    (torch.bfloat16, "split24-int8"),
)
# Around a vector, a group and a block.
SIZES = (1, 3, 31, 32, 33, 1023, 1024, 1025, 5000)


def profile(dtype: torch.dtype, precision: str | None, numel: int = 1 << 27) -> None:
    """Four steps on one parameter: the first two are not worth watching."""
    generator = torch.Generator("cuda").manual_seed(0)
    param = torch.nn.Parameter(torch.randn(numel, generator=generator, device="cuda").to(dtype))
    param.grad = torch.randn(numel, generator=generator, device="cuda").to(dtype)
    optimizer = FusedAdamW([param], precision=precision)
    for _ in range(4):
        optimizer.step()
    torch.cuda.synchronize()


def check() -> None:
    """Two clipped steps per case on parameters of odd sizes, each once aligned and once off by an
    element.
    """
    for dtype, precision in CASES:
        params = []
        for size in SIZES:
            for offset in (0, 1):
                memory = torch.linspace(-1, 1, size + offset, device="cuda").to(dtype)
                params.append(torch.nn.Parameter(memory[offset:]))
        optimizer = FusedAdamW(params, precision=precision, amsgrad=True, max_grad_norm=1.0)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
    torch.cuda.synchronize()
    print("all steps done")


def main(arguments: Sequence[str]) -> int:
    """Exit code: 2 without a GPU."""
    if not torch.cuda.is_available():
        print("there is no GPU here")
        return 2
    if arguments[0] == "check":
        check()
    else:
        profile(getattr(torch, arguments[1]), arguments[2] if len(arguments) > 2 else None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
