"""Every block of the README that needs a training framework runs as it stands."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python integration\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_every_framework_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes checkpoints
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert list(tmp_path.iterdir())


def test_every_framework_has_a_block():
    imported = set(re.findall(r"^(?:from|import) (\w+)", "\n".join(BLOCKS), re.M)) - {
        "torch",
        "fused_adam",
    }
    assert imported == {"accelerate", "lightning", "peft", "safetensors", "transformers"}
