"""What only a GPU can show: no access outside of memory, a thousand replays, FSDP2 over NCCL."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from graphs import CudaGraph, params_of, set_gradients
from torch import distributed, nn
from training import parameters, results, same_bits

from fused_adam import FusedAdamW

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.gpu
CHECKED = (
    "nothing_around and triton and offset17 or twins_round or twins_encode or kernels_sum"
    " or test_a_gpu_gives_the_bits and triton and (split32-bf16 or split24-int8)"
)
CHECKER_LIMIT_S = 100
RECIPES = [
    (torch.float32, None),
    (torch.bfloat16, "split32-bf16"),
    (torch.bfloat16, "split24-int8"),
]


def test_the_memory_checker_finds_nothing():
    """NVIDIA's compute-sanitizer over kernel tests, with every tensor in an allocation of its own.

    Under it a launch takes tens of times as long: of each kind of access one test, and sizes around
    a vector and a block, on the kernels alone.
    """
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [
            *(checker, "--tool", "memcheck", "--error-exitcode", "99"),
            *(sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-k", CHECKED),
            *(
                ROOT / "tests" / "numerics" / f"test_{name}.py"
                for name in ("kernel", "codecs", "recipes", "clip")
            ),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=CHECKER_LIMIT_S,
    )
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout, (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize(("dtype", "precision"), RECIPES, ids=str)
def test_a_thousand_replays_equal_the_reference(dtype, precision):
    """One captured step, with other gradients and another learning rate every time; the reference
    steps on the CPU.
    """
    shapes = [(5,), (33, 65), (), (3000,)]
    lr = torch.tensor(1e-2, device="cuda")
    options = {"precision": precision, "max_grad_norm": 0.5, "weight_decay": 0.1}
    captured = FusedAdamW(parameters(dtype, shapes, "cuda"), lr=lr, capturable=True, **options)
    # The tensor holds 0.01 rounded to float32.
    reference = FusedAdamW(parameters(dtype, shapes), lr=lr.item(), **options)
    set_gradients(captured, 0)
    set_gradients(reference, 0)
    captured.step()
    reference.step()
    graph = CudaGraph()
    graph.capture(captured.step)
    for step in range(1, 1001):
        lr.fill_(1e-2 / step)
        reference.param_groups[0]["lr"] = lr.item()
        set_gradients(captured, step, in_place=True)
        set_gradients(reference, step, in_place=True)
        graph.replay()
        reference.step()
    assert int(captured.state[params_of(captured)[0]]["step"]) == 1001
    assert same_bits(results(captured), results(reference))


@pytest.mark.parametrize(("dtype", "precision"), RECIPES, ids=str)
def test_fsdp2_over_nccl(dtype, precision):
    """One process: the path of shards and collectives, with the bits of plain parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options = {"lr": 1e-2, "precision": precision, "max_grad_norm": 0.5, "skip_nonfinite": True}

    def trained(shard):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 33), nn.GELU(), nn.Linear(33, 4)).to("cuda", dtype)
        if shard:
            fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
        optimizer = FusedAdamW(model.parameters(), **options)
        for step in range(5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(8, 16).to("cuda", dtype)).square().mean().backward()
            optimizer.step()
        return [
            {
                key: getattr(value, "_local_tensor", value).detach().cpu().clone()
                for key, value in entry.items()
            }
            for entry in ({"param": p, **optimizer.state[p]} for p in params_of(optimizer))
        ], optimizer.grad_norm.item()

    store = distributed.HashStore()
    distributed.init_process_group(
        "nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    try:
        (sharded, norm), (plain, expected) = trained(True), trained(False)
    finally:
        distributed.destroy_process_group()
    assert norm == pytest.approx(expected, rel=1e-6) and same_bits(sharded, plain)
