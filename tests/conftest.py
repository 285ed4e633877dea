"""What every test shares: where kernels run, and visible skips.

`pytest` runs the real kernels in Triton's interpreter, on CPU tensors, with or without a GPU;
`pytest -m gpu` runs the tests marked `gpu` natively; `pytest --ptx sm_90` runs the kernels as
compiled for that GPU, on CPU tensors (tests/machine). One process does one of the three: triton
decides when it is imported.
"""

import gc
import os
import signal

import pytest
import torch

from fused_adam.backends import choose

# Helpers that assert show values when they fail, as test files do.
pytest.register_assert_rewrite("next_to_torch", "report_runs")

torch.set_num_threads(1)  # two workers share two cores; results do not depend on it

pytest_plugins = ["ptx_plugin"]

# A kernel that hangs must not take the whole run with it. Compiling for a dtype mix takes seconds.
GPU_LIMIT_S = 120


@pytest.hookimpl(tryfirst=True)  # plugins may import triton
def pytest_configure(config: pytest.Config) -> None:
    # Background jobs of a shell ignore Ctrl-C, and so do their children. Some tests send one.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr == "gpu" or config.option.ptx:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    native = config.option.markexpr == "gpu"
    reason = "there is no GPU here" if native else "runs natively, under `pytest -m gpu`"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.timeout(GPU_LIMIT_S))
            if not (native and torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    # 8000 tests and what they import live on: the garbage collector need not look at them again and
    # again.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """Skip what needs Triton's interpreter where it fails with the numpy that is installed."""
    try:
        return (yield)
    except Exception as error:
        reason = choose._no_interpreter()
        if reason and (type(error).__name__ == "InterpreterError" or reason in str(error)):
            pytest.skip(reason)
        raise


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`kernel_device`: where the Triton kernel runs: in the interpreter on CPU, or on a GPU."""
    if "kernel_device" in metafunc.fixturenames:
        metafunc.parametrize("kernel_device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched, in order."""
    from fused_adam_kernels.launch import Launcher

    names: list[str] = []
    launch = Launcher.__call__

    def noted(self: Launcher, programs: int, *args: object) -> None:
        names.append(self.kernel.__name__)
        launch(self, programs, *args)

    monkeypatch.setattr(Launcher, "__call__", noted)
    return names
