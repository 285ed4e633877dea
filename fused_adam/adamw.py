"""FusedAdamW: FusedAdam with decoupled weight decay, and the arguments of torch.optim.AdamW."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .arguments import STREAM_BYTES
from .optimizer import FusedAdam


class FusedAdamW(FusedAdam, torch.optim.AdamW):
    """AdamW with the whole step fused into one kernel; a drop-in for `torch.optim.AdamW`.

        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        p_t = p_{t-1} - lr * (weight_decay * p_{t-1}
                              + (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps))

    Loshchilov & Hutter 2019; amsgrad: Reddi et al. 2018. docs/numerics.md has the exact order of
    operations, which is the same on CPU and GPU.

    Example:
        >>> optimizer = FusedAdamW(model.parameters(), lr=3e-4, weight_decay=0.1, max_grad_norm=1.0)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    State per parameter is `step`, `exp_avg`, `exp_avg_sq` and, with amsgrad, `max_exp_avg_sq`, as
    in torch. Checkpoints load into `torch.optim.AdamW` and back. `state` is an ordinary dict: the
    next step starts from what you write into it.

    Args:
        params: tensors, (name, tensor) pairs, or dicts that define param groups. float32, bfloat16,
            float16, float64 and their complex dtypes, on any devices, may be mixed in one group. Of
            a DTensor (FSDP2, tensor parallelism) each rank updates its shard.
        lr: learning rate. A number, or a tensor of one element. Default: 1e-3.
        betas: decay rates of the first and the second moment. Default: (0.9, 0.999).
        eps: added to the square root, so that the division is safe. Default: 1e-8.
        weight_decay: decoupled decay: `lr * weight_decay * p` is subtracted from the parameter.
            Default: 1e-2.
        amsgrad: divide by the largest second moment so far, not by the current one. Default: False.
        maximize: follow the gradient uphill. Default: False.
        foreach: accepted for compatibility. There is one implementation, so it chooses nothing.
        capturable: allow the step to be captured in a CUDA graph, after one step outside the graph.
            A replay reads lr, betas, eps, weight_decay and ema_decay anew if they are tensors on
            the GPU, and otherwise uses their values at capture. Default: False.
        differentiable: let autograd differentiate through the step. It is then torch's own step and
            cannot be combined with this class's own arguments, except `backend` and `seed`.
            Default: False.
        fused: accepted for compatibility. With True, a GradScaler leaves unscaling and the overflow
            check to the step.
        precision: name of a recipe that stores weights and moments in fewer bytes, such as
            "split32-bf16"; docs/precision.md lists them. A param group may have its own. Default:
            None, everything in the parameter's dtype.
        cautious: decay a parameter only where the update moves it towards zero; docs/training.md
            has an example. Needs decoupled decay. A param group may have its own. Default: False.
        ema_decay: keep averages of the weights, `ema = ema + (1 - ema_decay) * (p - ema)` with the
            new weight before it is rounded, in `state` as float32. A number of at least 0 and below
            1, or a float tensor of shape () on the parameters' device, which may change at any
            time. A param group may have its own. Use them by `swap_ema()` and `ema_state_dict()`.
            Default: None, no averages.
        max_grad_norm: clip the global L2 norm of the gradients to this value inside the step, as
            `torch.nn.utils.clip_grad_norm_` would before it. Read the norm from `grad_norm`. inf
            measures the norm and clips nothing. Default: None, no clipping.
        skip_nonfinite: skip a step whose gradients contain NaN or Inf, without waiting for the GPU.
            Count such steps with `skipped_steps`. Default: False.
        skip_grad_norm: skip a step whose global gradient norm, unscaled and before clipping, is
            above this value or not finite, without waiting for the GPU. A number, or a float tensor
            of shape () on the parameters' device, which may change at any time: docs/training.md
            has rules for it. Count such steps with `skipped_steps`. Default: None, no skipping.
        flatten: move parameters and gradients into flat buffers. Faster for models with many small
            tensors. After `zero_grad()`, gradients are views of zeros instead of None. Default:
            False.
        grad_attribute: where to read gradients: "grad", "main_grad" (Megatron) or "decoupled_grad"
            (TransformerEngine, Megatron-FSDP). Default: "grad".
        backend: "triton", "reference" (plain PyTorch), "compiled" (the reference through
            torch.compile, on CPUs) or "auto" (triton on GPUs, reference on CPUs). All give the same
            bits. Default: "auto".
        seed: seed of the stochastic rounding that some recipes use. torch's random generators are
            not touched. Give each of several optimizers its own. Default: 0.
        state_device: "cpu" keeps moments, master weights and remainders in pinned host memory for
            good. A step streams them through the device: docs/training.md says how long it takes.
            Default: None, the parameters' device.
        stream_bytes: size of each of the three buffers on the device that state is streamed
            through, in bytes. Default: 268435456, 256 MiB.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message says what is allowed. For
            torch's arguments the message is torch's.
        RuntimeError: the backend cannot run here; the message says why and what to do.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        precision: str | None = None,
        cautious: bool = False,
        ema_decay: float | Tensor | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_grad_norm: float | Tensor | None = None,
        flatten: bool = False,
        grad_attribute: str = "grad",
        backend: str = "auto",
        seed: int = 0,
        state_device: str | None = None,
        stream_bytes: int = STREAM_BYTES,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            precision=precision,
            cautious=cautious,
            ema_decay=ema_decay,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            skip_grad_norm=skip_grad_norm,
            flatten=flatten,
            grad_attribute=grad_attribute,
            backend=backend,
            seed=seed,
            state_device=state_device,
            stream_bytes=stream_bytes,
        )
