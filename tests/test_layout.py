"""The house: who imports whom, what an import costs, and what every module says of itself."""

import ast
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from fused_adam.backends import choose

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(
    path
    for part in ("fused_adam", "kernels/fused_adam_kernels", "bench")
    for path in (ROOT / part).rglob("*.py")
)

# Top floor first: a file imports from its own room and from lower floors. A folder is one room.
FLOORS = [
    ["bench"],
    ["fused_adam.in_backward", "fused_adam.adamw", "fused_adam.reshard"],
    ["fused_adam.optimizer"],
    ["fused_adam.optimizer_state"],
    ["fused_adam.ema"],
    ["fused_adam.engine"],
    ["fused_adam.cached_plan"],
    ["fused_adam.grad_norms"],
    ["fused_adam.backends"],
    ["fused_adam.guards"],
    ["fused_adam.plan"],
    ["fused_adam.state"],
    ["fused_adam.arguments"],
    ["fused_adam.distributed"],
    ["fused_adam.groups"],
    ["fused_adam.numerics"],
    ["fused_adam.precision", "fused_adam.torch_private", "fused_adam.version"],
    ["fused_adam_kernels"],
]
FLOOR = {room: len(FLOORS) - i for i, rooms in enumerate(FLOORS) for room in rooms}
# The files outside the kernels that may import Triton: a kernel that measures, and scripts that
# compile ahead.
IMPORT_TRITON = ("fused_adam_kernels.", "bench.harness.stream", "bench.gpu.")


def name_of(path):
    parts = (
        path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT)
        .with_suffix("")
        .parts
    )
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Every module imported anywhere in the file, absolute, with `from package import module`
    resolved.
    """
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    filter(
                        None,
                        [*package.split(".")[: len(package.split(".")) - node.level + 1], base],
                    )
                )
            names = {f"{base}.{alias.name}" for alias in node.names}
            modules = names & {name_of(module) for module in MODULES}
            yield from modules or {base}


def room_of(module):
    """The room that a module of this project belongs to; None for others."""
    if module == "fused_adam":
        return None  # the public names
    return next((room for room in FLOOR if module == room or module.startswith(f"{room}.")), None)


def test_every_module_has_a_floor():
    without = {name for name in map(name_of, MODULES) if room_of(name) is None}
    assert without == {"fused_adam"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path):
    name = name_of(path)
    here = room_of(name)
    for module in imports_of(path):
        there = room_of(module)
        if here and there and here != there:
            assert FLOOR[there] < FLOOR[here], f"{name} on floor {FLOOR[here]} imports {module}"
        if module.split(".")[0] == "triton":
            assert name.startswith(IMPORT_TRITON)
            assert name != "fused_adam_kernels.table"  # the reference reads it


def test_private_names_of_torch_stand_in_one_module():
    """Except attributes of torch's objects, which that module's docstring lists."""
    package = [path for path in MODULES if name_of(path).startswith("fused_adam.")]
    apart = ROOT / "fused_adam" / "torch_private.py"
    listed = set(
        re.findall(r"^    \w+\.(_\w+)", ast.get_docstring(ast.parse(apart.read_text())), re.M)
    )
    read, imported, own = set(), set(), set()
    for path in set(package) - {apart}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute):
                (own if isinstance(node.ctx, ast.Store) else read).add(node.attr)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    public = {"_fields", "_replace", "_asdict"}  # of NamedTuples
    private = {name for name in read if re.match("_[^_]", name)}
    assert private - own - public <= listed <= read
    assert [name for name in imported if name.startswith("torch") and "._" in name] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_lives_there(path):
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip()


def run(code, *options):
    # Torch itself may need what else is set, such as LD_LIBRARY_PATH.
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "PATH": "/usr/bin:/bin",
    }
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, env=environment
    )


def test_import_does_not_load_triton():
    """Nor does a step on the reference; without triton installed both work just the same."""
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, fused_adam
param = torch.nn.Parameter(torch.ones(3)); param.grad = torch.ones(3)
optimizer = fused_adam.FusedAdam([param]); optimizer.step()
assert float(param.detach()[0]) < 1
print("ok")
"""
    done = run(code)
    assert done.stdout == "ok\n", done.stderr


def test_asking_for_triton_without_it_says_what_to_do():
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch, fused_adam
try:
    fused_adam.FusedAdam([torch.nn.Parameter(torch.ones(3))], backend="triton")
except RuntimeError as error:
    print(error)
"""
    done = run(code)
    assert "backend='triton' cannot run on cpu: triton is not installed" in done.stdout, done.stderr
    assert "backend='reference'" in done.stdout


def test_triton_on_a_cpu_needs_the_interpreter():
    code = """
import torch, fused_adam
try:
    fused_adam.FusedAdam([torch.nn.Parameter(torch.ones(3))], backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "TRITON_INTERPRET=1 set before triton is imported" in run(code).stdout


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        (
            {"triton": "3.6.0", "numpy": "2.4.1"},
            "Triton 3.6.0's interpreter fails with numpy 2.4.1",
        ),
        ({"triton": "3.6.0+git5f", "numpy": "3.0"}, "install numpy<2.4 or triton>=3.7"),
        ({"triton": "3.6.0"}, "Triton's interpreter needs numpy; install it, or use 'reference'"),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, None),
        ({"triton": "3.7.0", "numpy": "2.5.0"}, None),
    ],
    ids=str,
)
def test_an_interpreter_that_fails_with_this_numpy_is_refused(installed, reason, monkeypatch):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if reason is None:
        assert choose.choose("triton", torch.device("cpu")) == "triton"
        return
    with pytest.raises(RuntimeError, match="backend='triton' cannot run on cpu: ") as raised:
        choose.choose("triton", torch.device("cpu"))
    assert reason in str(raised.value)


def test_compiled_needs_a_compiler():
    code = """
import os, torch, fused_adam
os.environ["PATH"] = "/nowhere"
try:
    fused_adam.FusedAdam([torch.nn.Parameter(torch.ones(3))], backend="compiled")
except RuntimeError as error:
    print(error)
"""
    assert "torch.compile needs a C++ compiler" in run(code).stdout


def test_compiled_needs_torch_compile():
    """torch would run the same functions as they are, and its square root rounds otherwise."""
    code = """
import os
os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch, fused_adam
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
try:
    fused_adam.FusedAdam([param], backend="compiled").step()
except RuntimeError as error:
    print(error, param.tolist())
"""
    done = run(code)
    assert "needs torch.compile, which is switched off" in done.stdout, done.stderr
    assert "[1.0, 1.0, 1.0]" in done.stdout
