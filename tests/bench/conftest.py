"""What every test of the benchmark shares."""

import json

import pytest
import torch

from bench import cli
from bench.harness import timing


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """A gigabyte of copying tells nothing here; settings that commands make are put back."""
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 16)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shapes(tmp_path):
    path = tmp_path / "little.json"
    path.write_text("[[30, 40], [40], [7], [1]]")
    return ["--shapes", str(path)]


@pytest.fixture
def run(tmp_path, capsys):
    """Run a command with --json; returns exit code, record and what was printed."""

    def call(*argv):
        path = tmp_path / "record.json"
        code = cli.main([*argv, "--json", str(path)])
        return code, json.loads(path.read_text()), capsys.readouterr().out

    return call
