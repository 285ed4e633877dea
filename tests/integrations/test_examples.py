"""examples/ run as their first lines say."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp2(processes, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    done = subprocess.run(
        [*torchrun, ROOT / "examples" / "fsdp2.py", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step (\d+): loss ([\d.]+), gradient norm ([\d.]+)$", done.stdout, re.M)
    assert [int(step) for step, *_ in lines] == [5, 10, 15, 20]
    losses = [float(loss) for _, loss, _ in lines]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2
    assert (tmp_path / ".metadata").exists()
