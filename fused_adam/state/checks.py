"""Which parameters and gradients a step can take."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_lazy(tensor: Tensor) -> bool:
    """Whether the tensor's values are the conjugate or negative of what lies in memory."""
    return tensor.is_conj() or tensor.is_neg()


def check_pair(param: Tensor, grad: Tensor, name: str) -> None:
    """Raise unless a step can update this parameter with this gradient.

    Args:
        param, grad: what is here of them, if the parameter is a DTensor.
        name: what texts call the parameter, such as "parameter 3 (group 0)".

    Raises RuntimeError, TypeError or ValueError, in the words of torch.optim where it has some.
    """
    if grad.is_sparse:
        raise RuntimeError(
            "Adam does not support sparse gradients, please consider SparseAdam instead"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(f"the gradient of {name} has layout {grad.layout}, but must be strided")
    for what, tensor in ((name, param), (f"the gradient of {name}", grad)):
        if tensor.dtype.to_real() not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(
                f"{what} has dtype {tensor.dtype}, "
                f"but must be one of {allowed} (or complex of these)"
            )
    same_place = grad.shape == param.shape and grad.device == param.device
    if not same_place or grad.is_complex() != param.is_complex():
        raise ValueError(
            f"the gradient of {name} is {grad.dtype} of shape {tuple(grad.shape)} "
            f"on {grad.device}, but must match the parameter: "
            f"{param.dtype} of shape {tuple(param.shape)} on {param.device}"
        )
    if is_lazy(param):
        raise RuntimeError(
            f"{name} is a conjugate or negative view, which cannot be written; use .resolve_conj()"
        )
    if any(
        stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)
    ):
        raise RuntimeError(
            f"{name} is expanded: several of its elements share one place in memory; use .clone()"
        )
