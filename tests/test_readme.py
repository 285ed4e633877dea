"""Every block of the README runs as it stands, and the first one trains exactly as with
torch.optim.Adam.
"""

import contextlib
import io
import pathlib
import re
import tomllib

import pytest
import torch
from named import missing, named
from torch import nn

from bench.verify import HASH
from fused_adam.precision import parse

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def losses_of(block, monkeypatch):
    """Run a block; returns every loss its nn.MSELoss gave, and what it printed."""
    losses = []

    class Recording(nn.MSELoss):
        def forward(self, *args):
            loss = super().forward(*args)
            losses.append(loss.item())
            return loss

    torch.manual_seed(0)
    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(nn, "MSELoss", Recording)
        exec(compile(block, "README.md", "exec"), {})
    return losses, printed.getvalue()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_every_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a checkpoint
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, "README.md", "exec"), {})


def test_first_block_trains_as_with_torch(monkeypatch):
    ours, printed = losses_of(BLOCKS[0], monkeypatch)
    theirs, theirs_printed = losses_of(
        BLOCKS[0].replace(
            "from fused_adam import FusedAdam", "from torch.optim import Adam as FusedAdam"
        ),
        monkeypatch,
    )
    assert len(ours) == len(theirs) == 50
    # Per step a weight of size one rounds by an ulp at most: 50 ulps, and the loss is quadratic in
    # the error's size.
    torch.testing.assert_close(ours, theirs, rtol=50 * torch.finfo(torch.float32).eps, atol=1e-6)
    assert re.findall(r"epoch (\d+): loss \d", printed) == ["10", "20", "30", "40", "50"]
    assert printed == theirs_printed


def test_first_block_differs_from_torchs_only_in_the_import():
    assert len(BLOCKS) >= 2 and BLOCKS[0].count("FusedAdam") == 2
    assert "fused_adam" not in BLOCKS[0].replace("from fused_adam import FusedAdam", "")


@pytest.mark.parametrize(
    "line",
    re.findall(r'^\| `"(\S+)"` \| ([\d.]+) \| ([\d.]+) \|', README, re.M),
    ids=lambda line: line[0],
)
def test_recipes_cost_what_the_table_says(line):
    name, held, moved = line
    recipe = parse(name)
    bf16 = torch.bfloat16
    assert (recipe.held_bytes(bf16), recipe.moved_bytes(bf16, bf16)) == (float(held), float(moved))


def test_the_published_hash_is_the_tested_one():
    assert HASH in README


def test_the_oldest_versions_are_the_same_everywhere():
    """torch 2.11 and Triton 3.6 are the oldest that these tests pass with; Python 3.11 is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=")
    stated = dict(
        re.match(r"(\w+)>=([\d.]+)", dependency).groups() for dependency in project["dependencies"]
    )
    assert {"python": python, **stated} == {"python": "3.11", "torch": "2.11", "triton": "3.6"}
    wanted = (
        f"(Python >= {python}, torch >= {stated['torch']}, on Linux triton >= {stated['triton']};"
    )
    assert wanted in README and f"python3 ({python} or newer)" in README
    assert (
        f"install triton>={stated['triton']},"
        in (ROOT / "fused_adam" / "backends" / "choose.py").read_text()
    )
    assert re.search(rf"^TRITONS := {stated['triton']}\.0 ", (ROOT / "Makefile").read_text(), re.M)


def test_every_guarantee_names_tests_that_exist():
    section = re.search(r"## Guarantees\n(.*?)\n## ", README, re.S)[1]
    lines = re.findall(r"\n- (.*?)(?=\n- |\n\nNot guaranteed)", section, re.S)
    assert len(lines) == 10 and all(named(line) for line in lines)
    assert missing(README) == []
