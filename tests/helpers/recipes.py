"""Parameters trained under a precision recipe."""

import pytest
import torch
from torch import nn
from training import gradient, values

from fused_adam import FusedAdamW
from fused_adam.precision import NAMES

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RECOMMENDED = [
    "split32",
    "split32-bf16",
    "split24-bf16",
    "sr-bf16",
    "split24-int8",
    "master32",
    "native-bf16",
    "native-int8",
]
# Around a group (32), its multiples, a chunk of the kernel (8192 in the interpreter); empty and
# 0-dim.
SMALL = [(), (31,), (0, 3), (5, 13)]
every_recipe = pytest.mark.parametrize("precision", NAMES)
every_backend = pytest.mark.parametrize("backend", ["reference", "triton"])


def dtype_of(precision):
    """The smallest that the recipe serves; fp32 for native ones, which are meant for it."""
    return FP32 if precision.startswith("native") else BF16


def parameters(dtype, shapes=SMALL, seed=0, device="cpu"):
    return [
        nn.Parameter(values(shape, seed + i, dtype).to(device)) for i, shape in enumerate(shapes)
    ]


def members(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, steps, first=0, dtype=None, scale=1.0):
    """`dtype`: of the gradients. The values do not depend on grouping."""
    for step in range(first, first + steps):
        for i, p in enumerate(members(optimizer)):
            if dtype not in (None, p.dtype):
                p.grad_dtype = dtype
            grad = gradient(p, i, step, dtype) * scale
            if optimizer._flatten and p.grad is not None:
                p.grad.copy_(grad)
            else:
                p.grad = grad
        optimizer.step()


def trained(
    precision,
    steps=2,
    shapes=SMALL,
    dtype=None,
    first=0,
    grad_dtype=None,
    scale=1.0,
    device="cpu",
    optimizer_class=FusedAdamW,
    **options,
):
    options = {"lr": 1e-2, "weight_decay": 0.1, "precision": precision, **options}
    optimizer = optimizer_class(
        parameters(dtype or dtype_of(precision), shapes, device=device), **options
    )
    train(optimizer, steps, first, grad_dtype, scale)
    return optimizer


def weights(optimizer):
    """float32, as the recipe holds them."""
    return list(optimizer.export_fp32()["params"].values())


def within_int8(found, stored):
    """Whether 8-bit moments, rounded to nearest, are as near to what was stored as they can be.

    Args:
        found, stored: dicts with `exp_avg` and `exp_avg_sq`, float32.
    """
    m, v = stored["exp_avg"].abs(), stored["exp_avg_sq"]
    m_error, v_error = ((found[key] - stored[key]).abs() for key in ("exp_avg", "exp_avg_sq"))
    # Half of the largest step on the lattice, a quarter of a binade.
    v_within = v_error <= v * 2**-3
    # m is a ratio to v's root, which moves half as far as v; and half of a code, which counts
    # 1 / 126.9 of the largest ratio, rounded up to bfloat16. The codec's root is at most 1.0607 of
    # the square root. Here is the largest ratio of all groups.
    code = (m / v.sqrt()).nan_to_num().max() / 126.9 * (1 + 2**-7)
    m_within = m_error <= m * 2**-4 + code / 2 * 1.0607 * v.sqrt()
    return bool((v_within & m_within & ((v == 0) | (found["exp_avg_sq"] > 0))).all())
