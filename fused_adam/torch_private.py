"""Every name of torch that this library uses although it is not public.

All were seen in torch 2.11.0, 2.13.0 and 2.14.1. Where a later torch has moved one, importing
fused_adam fails here, or the function that uses it does, and the name says what to look for: there
is nothing to put in its place unless the comment says so. A few are attributes of torch's objects,
read where they are needed because each step reads them:

    Tensor._version              counts writes: whether a step counter or a gradient was written to
    DTensor._local_tensor        this rank's shard; `to_local()` makes a new tensor on every call
    DTensor._spec                its placements, in one look-up
    Optimizer._optimizer_load_state_dict_pre_hooks     of users, for our own loading
    Optimizer._optimizer_load_state_dict_post_hooks
    Optimizer._accelerator_graph_capture_health_check  what torch says of a capture
    Optimizer._zero_grad_profile_name                  what a profile shows

torch reads one of ours: GradScaler asks `_step_supports_amp_scaling` whether `step` unscales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor as FakeTensor
from torch.optim.optimizer import _device_dtype_check_for_fused
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass as is_traceable_wrapper_subclass,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

try:
    # torch.compile's guards, in C++. Without them the same checks are made in Python.
    from torch._C._dynamo import guards
except ImportError:
    guards = None  # type: ignore[assignment]
dynamo_guards: Any = guards

# torch.optim's own decorator. `torch.compiler.disable` is public, and imports all of torch.compile.
disable_dynamo: Callable[[Any], Any] = torch._disable_dynamo  # type: ignore[attr-defined]
# What torch.optim.Adam(fused=True) asks of a parameter before it steps.
check_dtype_for_fused: Callable[[Tensor], None] = _device_dtype_check_for_fused
# An assertion that torch.compile understands.
check: Callable[[bool], None] = torch._check
# One call for many tensors, as torch.optim's foreach paths have it.
foreach_add_: Callable[..., None] = torch._foreach_add_
foreach_copy_: Callable[..., None] = torch._foreach_copy_
foreach_zero_: Callable[..., None] = torch._foreach_zero_
# A capsule. `Tensor.__dlpack__` refuses a GPU that is not the current one.
to_dlpack: Callable[[Tensor], Any] = torch._C._to_dlpack
# The base class of torch's convolutions.
ConvNd = nn.modules.conv._ConvNd


def under_fake_mode() -> bool:
    """Whether FakeTensorMode is on. Every step asks, so it is a cheap question."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def inductor(graph: Any, examples: Sequence[Any]) -> Callable[..., Any]:
    """torch.compile's own backend. Importing it takes seconds, so only those do who compile."""
    from torch._dynamo import lookup_backend

    compile_graph: Any = lookup_backend("inductor")
    compiled: Callable[..., Any] = compile_graph(graph, examples)
    return compiled


def holders_of(storage: torch.UntypedStorage) -> int:
    """How many tensors and handles share a storage, the one that is asked through included."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call this when the backward that runs now has ended and autograd has joined its streams."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def make_dtensor(
    local: Tensor, mesh: Any, placements: Any, shape: torch.Size, strides: tuple[int, ...]
) -> DTensor:
    """A DTensor over the memory of `local`, this rank's shard.

    `DTensor.from_local` would take a shard on the host back to the mesh's device.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(shape, strides, local.dtype))
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def shape_and_offset(param: DTensor) -> tuple[Any, Any]:
    """Shape of this rank's shard, and where it begins in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
