"""Parameters of more than 2^31 elements: the kernel finds the right ones (its offsets:
test_codegen.py).
"""

import pytest
import torch

from fused_adam import FusedAdam

FAR = 3 * 2**31  # elements: beyond what 32 bits count, signed or not
NAMES = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def updated_at(first, dtype, numel=100):
    """One chunk that starts at element `first` of a parameter of which no more than that chunk
    exists.
    """
    from fused_adam_kernels import adam, table

    block = adam.launch_config(dtype, dtype, "native", "native", False).block
    start = first // block
    assert start * block == first
    tensors = [torch.linspace(low, 1, numel).to(dtype) for low in (-1, -2, -3, 0, 0)]
    buffers = [torch.zeros(numel + 16, dtype=dtype) for _ in NAMES]
    rows = torch.zeros(1, table.ROW, dtype=torch.int64)
    for column, (name, tensor, buffer) in enumerate(zip(NAMES, tensors, buffers, strict=True)):
        buffer[:numel] = tensor
        rows[0, getattr(table, name.upper())] = buffer.data_ptr() - first * dtype.itemsize
        assert column == getattr(table, name.upper())
    rows[0, table.NUMEL] = first + numel
    scalars = torch.zeros(1, table.SCALARS)
    for column in (
        table.STEP_SIZE,
        table.RSQRT_BC2,
        table.ONE_MINUS_BETA1,
        table.ONE_MINUS_BETA2,
        table.BETA2,
        table.EPS,
        table.GRAD_MULTIPLIER,
    ):
        scalars[0, column] = 0.5
    update = adam.adam_step(dtype, dtype, "native", "native", True)
    update(1, rows, torch.tensor([[0, start]], dtype=torch.int32), scalars)
    assert not torch.equal(buffers[0][:numel], tensors[0])
    assert torch.equal(buffers[1][:numel], tensors[1])
    assert all((buffer[numel:] == 0).all() for buffer in buffers)
    return dict(zip(NAMES, buffers, strict=True))


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_far_behind_the_first_element(dtype):
    """The chunk's address is the row's address plus 24 gigabytes, and that is where the update
    happens.
    """
    near, far = updated_at(0, dtype), updated_at(FAR, dtype)
    for name in NAMES:
        assert torch.equal(near[name], far[name]), name


@pytest.mark.gpu
def test_a_parameter_of_more_than_2_to_the_31_elements():
    numel, last = 2**31 + 5000, 4097
    needed = 4 * 2 * numel + 2**30  # p, g, m, v in bf16
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    ends = [slice(0, last), slice(numel - last, None)]
    param = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.zeros_like(param)
    twins = []
    for seed, end in enumerate(ends):
        values = torch.linspace(-1, 1 + seed, last).to(torch.bfloat16)
        param.data[end], param.grad[end] = values.to("cuda"), -values.to("cuda")
        twins.append(torch.nn.Parameter(values))
        twins[-1].grad = -values
    optimizer, expected = (
        FusedAdam([param], backend="triton"),
        FusedAdam(twins, backend="reference"),
    )
    for _ in range(2):
        optimizer.step()
        expected.step()
    for twin, end in zip(twins, ends, strict=True):
        state = optimizer.state[param]
        ours = [
            param.detach()[end].cpu(),
            *(state[key][end].cpu() for key in ("exp_avg", "exp_avg_sq")),
        ]
        theirs = [twin.detach(), *(expected.state[twin][key] for key in ("exp_avg", "exp_avg_sq"))]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (param.detach()[last:-last] == 0).all()
