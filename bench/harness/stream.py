"""What memory gives to the update's access pattern without its arithmetic: four reads and three
writes per element.

The only Triton kernel outside fused_adam_kernels: it measures memory, and is no part of the
optimizer.
"""

import torch
import triton
import triton.language as tl

from fused_adam_kernels.config import launch_config

from .timing import random_values, seconds_of

CONFIG = launch_config(torch.float32, torch.float32, "native", "native", False)
BLOCK = CONFIG.block


@triton.jit
def move_kernel(
    p_ptr,  # *T [n]  n is a multiple of BLOCK
    g_ptr,
    m_ptr,
    v_ptr,
    BLOCK: tl.constexpr,  # elements per program
):
    """p <- g, m <- v, v <- m + p: every value read is written, so that none can be left out."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(p_ptr + offs)
    g = tl.load(g_ptr + offs)
    m = tl.load(m_ptr + offs)
    v = tl.load(v_ptr + offs)
    tl.store(p_ptr + offs, g)
    tl.store(m_ptr + offs, v)
    tl.store(v_ptr + offs, m + p)


def move(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> int:
    """Run it over four tensors of one size, a multiple of BLOCK; returns the bytes that were read
    and written.
    """
    if p.numel() % BLOCK:
        raise ValueError(f"numel={p.numel()} must be a multiple of {BLOCK}")
    move_kernel[(p.numel() // BLOCK,)](p, g, m, v, BLOCK, num_warps=CONFIG.num_warps)
    return 7 * p.nbytes


class AccessBandwidth:
    """`move` over four tensors: a limit of bandwidth, as `timing.CopyBandwidth` is one.

    On some GPUs it is the higher one, because a device-to-device `copy_` does not reach the
    memory's bandwidth there.
    """

    def __init__(self, device: torch.device, numel: int) -> None:
        numel = -(-numel // BLOCK) * BLOCK
        self.device = device
        self.tensors = [random_values(numel, device) for _ in range(4)]
        self.repeats = 1 if device.type == "cpu" else 10
        self.bytes = move(*self.tensors)  # compiles

    def measure(self) -> float:
        """Seconds per pass."""
        return seconds_of(lambda: move(*self.tensors), self.device, self.repeats)

    def gb_per_s(self, seconds: float) -> float:
        """Of a pass that took so long."""
        return self.bytes / seconds / 1e9
