"""The Triton kernel on its own memory terms: bounds, alignment, launches. Its numbers are in
test_parity.py.
"""

import pytest
import torch
import triton
import triton.language as tl
from codec_values import same
from training import gradient, parameters, results, same_bits, train, values

from fused_adam import FusedAdam, FusedAdamW
from fused_adam.numerics import formula, scalars
from fused_adam.state.memory import SLOT_ALIGN, align
from fused_adam_kernels import adam, table
from fused_adam_kernels import formula as kernel_formula

DTYPES = [torch.float32, torch.bfloat16]
SENTINEL = 7.0


def framed(numel, dtype, device, offset=16):
    """A view into a larger buffer full of sentinels, starting `offset` elements in."""
    buffer = torch.full((offset + numel + 16,), SENTINEL, dtype=dtype, device=device)
    return buffer, buffer[offset : offset + numel]


def untouched(buffer, view):
    start = view.storage_offset()
    outside = torch.cat([buffer[:start], buffer[start + view.numel() :]])
    return bool((outside == SENTINEL).all())


def test_scalars_have_the_same_names_and_order_everywhere():
    """In the kernel, in its torch twin, and in the tables."""
    assert kernel_formula.Scalars._fields == formula.Scalars._fields
    for column, name in enumerate(formula.Scalars._fields):
        assert getattr(table, name.upper()) == column
    for column, name in enumerate(scalars.HyperParams._fields):
        assert getattr(table, f"HYPER_{name.upper()}") == column
    assert len(scalars.HyperParams._fields) == table.HYPER


@triton.jit
def sums_kernel(x_ptr, y_ptr, one_ptr, sum_ptr, difference_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x, y, one = tl.load(x_ptr + offs), tl.load(y_ptr + offs), tl.load(one_ptr)
    tl.store(sum_ptr + offs, kernel_formula.add(x, y, one))
    tl.store(difference_ptr + offs, kernel_formula.add(x, y, -one))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_by_fused_multiply_adds_have_the_bits_of_sums(dtype, kernel_device):
    limits = torch.finfo(dtype)
    special = [0.0, 1.0, torch.inf, torch.nan, limits.max, limits.tiny, limits.tiny / 8]
    special = torch.tensor([*special, *(-x for x in special)], dtype=dtype)
    pairs = torch.cartesian_prod(special, special)
    x, y = torch.cat([pairs, values((1024 - len(pairs), 2), 0, dtype)]).T.contiguous()
    x, y, one = (tensor.to(kernel_device) for tensor in (x, y, torch.ones(1, dtype=dtype)))
    total, difference = torch.empty_like(x), torch.empty_like(x)
    sums_kernel[(1,)](x, y, one, total, difference, N=1024, enable_fp_fusion=False)
    assert same(total, x + y) and same(difference, y - x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    "offset", [16, 17, 19], ids=lambda n: f"offset{n}"
)  # aligned, misaligned by 1 and 3 elements
@pytest.mark.parametrize(
    "numel", [1, 15, 16, 17, 8191, 8192, 8209]
)  # around a vector and around a block
def test_nothing_around_the_buffers_is_touched(numel, offset, backend, dtype, kernel_device):
    device = kernel_device
    buffer, view = framed(numel, dtype, device, offset)
    grads, grad = framed(numel, dtype, device, offset + 2)
    view.copy_(values((numel,), 0, dtype))
    grad.copy_(values((numel,), 1, dtype))
    before = grad.clone()
    param = view.requires_grad_()
    param.grad = grad
    optimizer = FusedAdamW([param], lr=0.1, amsgrad=True, ema_decay=0.5, backend=backend)
    optimizer.step()
    optimizer.step()
    with torch.no_grad():
        assert untouched(buffer, param)
    assert untouched(grads, grad)
    assert torch.equal(grad, before)  # gradients are read, never written
    home = optimizer._engine.arena.param_states[param]
    for slot in home.slots.values():
        assert (slot.segment[slot.start + numel :] == 0).all()  # the gap behind the slot

    twin = torch.nn.Parameter(values((numel,), 0, dtype))
    twin.grad = values((numel,), 1, dtype)
    expected = FusedAdamW([twin], lr=0.1, amsgrad=True, ema_decay=0.5, backend="reference")
    expected.step()
    expected.step()
    assert same_bits(results(optimizer), results(expected))


def test_misaligned_state_cannot_happen():
    """Slots start at multiples of SLOT_ALIGN elements, whatever the sizes before them."""
    params = parameters(torch.bfloat16)
    optimizer = FusedAdam(params)
    train(optimizer, 1)
    for home in optimizer._engine.arena.param_states.values():
        for slot in home.slots.values():
            assert slot.start % SLOT_ALIGN == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layout", ["strided", "transposed", "channels_last", "expanded_grad", "transposed_grad"]
)
@pytest.mark.parametrize("backend", ["triton", "reference", "compiled"])
def test_any_layout_of_parameter_and_gradient(backend, layout, dtype):
    """Equal to the contiguous case; torch's fused CPU kernel ignores strides and corrupts these."""
    shape = (5, 4, 3, 6)
    start, grad = values(shape, 0, dtype), values(shape, 1, dtype)
    if layout == "strided":
        buffer = torch.full((5, 4, 3, 12), SENTINEL, dtype=dtype)
        param = buffer[..., ::2]
    elif layout == "transposed":
        param = torch.empty(shape[::-1], dtype=dtype).permute(3, 2, 1, 0)
    elif layout == "channels_last":
        param = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    else:
        param = torch.empty(shape, dtype=dtype)
    if layout == "expanded_grad":
        grad = values((1, 4, 1, 6), 1, dtype).expand(shape)
    elif layout == "transposed_grad":
        grad = values(shape[::-1], 1, dtype).permute(3, 2, 1, 0)
    param.copy_(start)
    param.requires_grad_()
    param.grad = grad
    twin = torch.nn.Parameter(start.clone())
    twin.grad = grad.contiguous()
    ours, expected = FusedAdam([param], backend=backend), FusedAdam([twin], backend="reference")
    for _ in range(3):
        ours.step()
        expected.step()
    assert same_bits(results(ours), results(expected))
    if layout == "strided":
        assert (buffer[..., 1::2] == SENTINEL).all()
    elif layout != "expanded_grad":
        assert ours.state[param]["exp_avg"].stride() == param.stride()  # as torch's zeros_like


@pytest.mark.filterwarnings(
    "ignore:.* encountered in:RuntimeWarning"
)  # numpy's, under the interpreter
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_non_finite_values_spread_as_in_torch(backend, kernel_device):
    """Each poisoned element becomes what torch makes of it, and no other element changes.

    One deviation: decoupled decay of an infinite parameter is inf - inf here, where torch scales
        it.
    """
    special = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 3e38]
    for options in (
        {},
        {"amsgrad": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ):
        ours = torch.nn.Parameter(torch.tensor([*special, *[1.0] * 7]).to(kernel_device))
        theirs = torch.nn.Parameter(torch.tensor([*special, *[1.0] * 7]))
        grad = torch.tensor([*[1.0] * 7, *special])
        a = FusedAdam([ours], backend=backend, **options)
        b = torch.optim.Adam([theirs], **options)
        for _ in range(3):
            ours.grad, theirs.grad = grad.to(kernel_device), grad.clone()
            a.step()
            b.step()
        expected = theirs.detach()
        if "decoupled_weight_decay" in options:
            expected[torch.tensor(special).isinf().nonzero()] = float("nan")
        torch.testing.assert_close(
            ours.detach().cpu(), expected, equal_nan=True, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_learning_rate_zero_leaves_parameters_bit_for_bit(backend, kernel_device):
    start = torch.tensor([-0.0, 0.0, float("inf"), float("-inf"), 1e-45, 1.5])
    param = torch.nn.Parameter(start.clone().to(kernel_device))
    optimizer = FusedAdamW([param], lr=0.0, weight_decay=0.1, backend=backend)
    param.grad = torch.tensor(
        [-1.0, 1.0] * 3, device=kernel_device
    )  # -0.0 less an update of -0.0 would be 0.0
    optimizer.step()
    assert torch.equal(param.detach().cpu().view(torch.int32), start.view(torch.int32))
    assert (optimizer.state[param]["exp_avg"] != 0).all()
    assert optimizer.state[param]["step"] == 1


@pytest.mark.parametrize("start", [2**24 - 1, 2**26])
def test_step_counters_beyond_what_float32_counts(start, kernel_device):
    """A float32 counter stops at 2^24, as torch's does, or where it was set; bias correction stays
    as at 2^24.
    """
    rows = []
    for backend, device in (("triton", kernel_device), ("reference", "cpu")):
        param = torch.nn.Parameter(torch.ones(3, device=device))
        optimizer = FusedAdam([param], betas=(0.9, 0.9999999), backend=backend)
        param.grad = torch.ones(3, device=device)
        optimizer.step()
        optimizer.state[param]["step"].fill_(start)
        for _ in range(3):
            optimizer.step()
        assert optimizer.state[param]["step"] == max(start, 2**24)
        rows.append(results(optimizer))
    assert same_bits(*rows)


@pytest.mark.parametrize("flatten", [False, True])
def test_one_update_launch_for_all_groups_of_a_dtype_mix(flatten, kernel_device, launches):
    groups = [
        {"params": parameters(torch.float32, [(9,), (300,)], kernel_device), "weight_decay": 0.1},
        {
            "params": parameters(torch.float32, [(5, 5)], kernel_device),
            "lr": 1e-4,
            "maximize": True,
        },
        {
            "params": parameters(torch.bfloat16, [(7,)], kernel_device),
            "decoupled_weight_decay": True,
        },
    ]
    optimizer = FusedAdam(groups, backend="triton", flatten=flatten)
    train(optimizer, 1)
    launches.clear()
    for scale in (
        1.0,
        0.5,
        0.25,
    ):  # neither lr, weight decay nor betas need another plan or another launch
        for group in optimizer.param_groups:
            group["lr"] *= scale
            group["betas"] = (0.9 * scale, 0.999)
            group["weight_decay"] += 0.01
        train(optimizer, 1)
    assert launches == ["prologue_kernel", "adam_kernel", "adam_kernel"] * 3


def test_neighbours_in_flat_buffers_are_one_row(kernel_device):
    """With flatten=True rows coalesce: they take as many blocks as one parameter of that size."""
    optimizer = FusedAdam(
        parameters(torch.float32, [(100,)] * 50, kernel_device), backend="triton", flatten=True
    )
    train(optimizer, 2)  # gradients lie in the buffers from the second step on
    [runner] = optimizer._engine.usual.runners
    [(_, blocks)] = runner.updates
    block = adam.launch_config(torch.float32, torch.float32, "native", "native", False).block
    assert len(blocks) == -(-50 * align(100) // block)


def test_gradients_move_between_steps(kernel_device):
    """Addresses are read anew each step: a stale one would read freed memory."""
    param = torch.nn.Parameter(values((100,), 0, torch.float32).to(kernel_device))
    optimizer = FusedAdam([param], backend="triton")
    twin = torch.nn.Parameter(values((100,), 0, torch.float32))
    expected = FusedAdam([twin], backend="reference")
    kept = []
    for step in range(4):
        param.grad = gradient(param, 0, step)
        kept.append(param.grad.clone())  # keeps the next gradient from landing at the same address
        twin.grad = gradient(twin, 0, step)
        optimizer.step()
        expected.step()
    assert same_bits(results(optimizer), results(expected))
