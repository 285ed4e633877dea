"""The user's default device and dtype: the library's own tables, scalars and counters do not depend
on them.
"""

import contextlib
import functools

import pytest
import torch
from training import gradient, parameters, results, same_bits

from fused_adam import FusedAdamW

SHAPES = [(5,), (3, 7), (), (33, 4)]
STEPS = 3
NATIVE = {"max_grad_norm": 0.5, "amsgrad": True}
FLAT = {"skip_nonfinite": True, "flatten": True}
RECIPES = [
    *[
        (torch.bfloat16, {"precision": name, "max_grad_norm": 0.5})
        for name in ("split32", "split24-int8", "sr-bf16")
    ],
    (torch.float32, {"precision": "native-int8"}),
    (torch.float16, {"precision": "master32"}),
]


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "set_default_device": lambda: default_device("meta"),
    "with_device": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
}


def run(default, backend, dtype, options, device="cpu"):
    """Train, save, load into a new optimizer, train on, export: all of it under the default."""
    params = parameters(dtype, SHAPES, device)
    grads = [[gradient(p, i, step) for i, p in enumerate(params)] for step in range(2 * STEPS)]
    grads[1][1] = grads[1][1].t().contiguous().t()  # copied before it is read
    lr = torch.tensor(1e-2, dtype=torch.float32, device=device)

    def train(optimizer, steps):
        for step in steps:
            for p, grad in zip(params, grads[step], strict=True):
                p.grad = grad.clone()
            optimizer.step()
            optimizer.zero_grad()

    with default():
        first = FusedAdamW(params, lr=lr, weight_decay=0.1, backend=backend, **options)
        train(first, range(STEPS))
        second = FusedAdamW(params, lr=lr, backend=backend, **options)
        second.load_state_dict(first.state_dict())
        train(second, range(STEPS, 2 * STEPS))
        exported = second.export_fp32()
        other = FusedAdamW(params, backend=backend, precision=None)
        other.load_state_dict(second.state_dict())  # converted
        train(other, range(STEPS))
    moments = [entry for _, entry in sorted(exported["state"]["state"].items())]
    weights = [{"weight": weight} for _, weight in sorted(exported["params"].items())]
    found = results(second) + results(other) + moments + weights
    return [{key: value.cpu() for key, value in entry.items()} for entry in found]


@functools.cache
def plain(dtype, options):
    """The bits of every backend."""
    return run(contextlib.nullcontext, "reference", dtype, dict(options))


def check(default, backend, dtype, options, device="cpu"):
    assert same_bits(
        run(default, backend, dtype, options, device), plain(dtype, tuple(options.items()))
    )


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, NATIVE), (torch.float64, FLAT), *RECIPES], ids=str
)
def test_the_reference(default, dtype, options):
    check(DEFAULTS[default], "reference", dtype, options)


@pytest.mark.parametrize("default", ["set_default_device", "bfloat16"])
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, NATIVE), (torch.float32, FLAT), *RECIPES[:3]], ids=str
)
def test_the_kernel(default, dtype, options):
    check(DEFAULTS[default], "triton", dtype, options)


@pytest.mark.parametrize("default", ["set_default_device", "bfloat16", "float64"])
def test_compiled(default):
    check(DEFAULTS[default], "compiled", torch.float32, NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("default", ["cuda", "meta", "cpu"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "options"), [(torch.float32, NATIVE), *RECIPES[:3]], ids=str)
def test_beside_a_gpu(default, backend, device, dtype, options):
    """The default device is that of the parameters, or another."""
    check(lambda: default_device(default), backend, dtype, options, device)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize(
    "steps", [1001, 70001]
)  # in bfloat16 the first is 1000, in float16 the second is infinite
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_loaded_step_count_is_exact(default, steps, as_tensor):
    [param] = parameters(torch.float32, [(4,)])
    grad = torch.ones_like(param)
    optimizer = FusedAdamW([param])
    param.grad = grad
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = (
        torch.tensor(float(steps), dtype=torch.float32) if as_tensor else steps
    )
    with DEFAULTS[default]():
        optimizer = FusedAdamW([param])
        optimizer.load_state_dict(saved)
        assert optimizer.state[param]["step"].item() == steps
        optimizer.step()
    step = optimizer.state[param]["step"]
    assert step.item() == steps + 1
    assert (step.dtype, step.device.type) == (torch.float32, "cpu")
