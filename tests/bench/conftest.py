"""What every test of the benchmark shares."""

import pytest
import torch

from bench.harness import timing


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """A gigabyte of copying tells nothing here; settings that commands make are put back."""
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 16)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
