"""examples/ run as their first lines say. docs/frameworks.md shows those of the frameworks."""

import os
import re
import subprocess
import sys

import pytest
from process import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FRAMEWORKS = [path for path in EXAMPLES if path.name != "fsdp2.py"]


def run(*command, folder):
    """The output of a command that runs as a user's would, in a folder of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", FRAMEWORKS, ids=lambda path: path.stem)
def test_every_framework_example_runs_and_writes_what_it_says(path, tmp_path):
    run(path, folder=tmp_path)
    [said] = re.findall(r"^Writes (.*) into the current folder\.$", path.read_text(), re.M)
    names = set(re.findall(r"[\w.]+(?=/)|[\w.]+\.(?:safetensors|pt)", said))
    assert names and names == {each.name for each in tmp_path.iterdir()}


def test_every_framework_has_an_example():
    text = "\n".join(path.read_text() for path in FRAMEWORKS)
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) - {"torch", "fused_adam"}
    data = {"datasets", "tokenizers"}
    assert imported - data == {
        "accelerate",
        "lightning",
        "peft",
        "safetensors",
        "torchtitan",
        "transformers",
        "trl",
    }


def test_every_example_says_how_to_run_it():
    for path in EXAMPLES:
        assert f"examples/{path.name}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp2(processes, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    printed = run(*torchrun, ROOT / "examples" / "fsdp2.py", tmp_path, folder=tmp_path)
    lines = re.findall(r"^step (\d+): loss ([\d.]+), gradient norm ([\d.]+)$", printed, re.M)
    assert [int(step) for step, *_ in lines] == [5, 10, 15, 20]
    losses = [float(loss) for _, loss, _ in lines]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2
    assert (tmp_path / ".metadata").exists()
