"""`pytest --ptx sm_90`: kernels are compiled for that GPU, and what was compiled runs on the CPU.

Tests that launch no kernel are left out: the option changes nothing for them.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections import Counter
from typing import Any

import ptx_machine
import pytest

DRIVER = pytest.StashKey[Any]()
COUNTS = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptx",
        metavar="ARCH",
        help="compile kernels for this GPU, as in sm_90, and run what was compiled on the CPU",
    )


def why_not() -> str:
    """Why nothing compiled can run here, or "" if it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    return ptx_machine.why_not()


def pytest_configure(config: pytest.Config) -> None:
    arch = config.getoption("--ptx")
    if arch is None:
        return
    if not re.fullmatch(r"sm_\d+", arch):
        raise pytest.UsageError(f"--ptx {arch!r} names no GPU; allowed: sm_80, sm_90, ...")
    config.stash[COUNTS] = Counter()
    if not why_not():
        import ptx_driver  # imports triton, which reads the environment then

        from fused_adam.backends import choose

        config.stash[DRIVER] = ptx_driver.install(arch, config.rootpath / ".ptx_cache")
        # The kernels do run on a CPU here, without the interpreter.
        choose._interpreting = lambda: True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that launch no kernel: for them the option changes nothing."""
    if config.getoption("--ptx") is None:
        return
    left_out = [item for item in items if not launches_kernels(item)]
    items[:] = [item for item in items if launches_kernels(item)]
    config.hook.pytest_deselected(items=left_out)
    if reason := why_not():
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"--ptx {reason}"))


def launches_kernels(item: pytest.Item) -> bool:
    """Whether a test uses the kernels, by its mark, parameters, fixtures or text."""
    assert isinstance(item, pytest.Function)
    if item.get_closest_marker("gpu"):
        return False
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "backend" in params:
        return bool(params["backend"] == "triton")
    if item.get_closest_marker("ptx") or "kernel_device" in item.fixturenames:
        return True
    return '"triton"' in inspect.getsource(item.function)


@pytest.fixture
def ptx_driver(request: pytest.FixtureRequest) -> Any:
    """The driver that kernels are launched on; without --ptx the test is skipped."""
    driver = request.config.stash.get(DRIVER, None)
    if driver is None:
        pytest.skip("runs compiled kernels, under `pytest --ptx sm_90`")
    return driver


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Count what this process launched; a worker of pytest-xdist hands its counts over."""
    driver = session.config.stash.get(DRIVER, None)
    if driver is None:
        return
    counts = session.config.stash[COUNTS]
    for machine in driver.machines:
        counts["kernels"] += 1
        counts["launches"] += machine.launches
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ptx"] = dict(counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the counts of a worker."""
    node.config.stash.setdefault(COUNTS, Counter()).update(
        getattr(node, "workeroutput", {}).get("ptx", {})
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if arch := config.getoption("--ptx"):
        counts = config.stash[COUNTS]
        terminalreporter.write_line(
            f"{arch}: {counts['kernels']} compiled kernels, {counts['launches']} launches"
        )
