"""What every test shares: where kernels run, and visible skips."""

import os

import pytest
import torch

# Before triton is imported: without a GPU the real kernels run in Triton's interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
torch.set_num_threads(1)  # two workers share two cores; results do not depend on it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a GPU, and Triton compiling for it (no TRITON_INTERPRET)")
    for item in items:
        if item.get_closest_marker("gpu") and (INTERPRETED or not torch.cuda.is_available()):
            item.add_marker(no_gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`kernel_device`: where the Triton kernel runs: the interpreter on CPU, and a GPU where there is one."""
    if "kernel_device" in metafunc.fixturenames:
        native = pytest.mark.skipif(not INTERPRETED, reason="the interpreter needs TRITON_INTERPRET=1 in this process")
        metafunc.parametrize(
            "kernel_device", [pytest.param("cpu", marks=native), pytest.param("cuda", marks=pytest.mark.gpu)]
        )
