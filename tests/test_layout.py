"""The house: who imports whom, what an import costs, and what every module says of itself."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(
    path for part in ("fused_adam", "kernels/fused_adam_kernels", "bench") for path in (ROOT / part).glob("*.py")
)

# Module -> what it may import of this project. Imports run one way; a new module has to find its place here.
ALLOWED = {
    "fused_adam": {"fused_adam.groups", "fused_adam.optimizer", "fused_adam.release", "fused_adam.version"},
    "fused_adam.arguments": {"fused_adam.scalars"},
    "fused_adam.groups": {"fused_adam.scalars"},
    "fused_adam.release": {"fused_adam.optimizer"},
    "fused_adam.version": set(),
    "fused_adam.arena": {"fused_adam.distributed", "fused_adam.precision"},
    "fused_adam.codecs": {"fused_adam.precision"},
    "fused_adam.precision": set(),
    "fused_adam.reference": {"fused_adam.codecs", "fused_adam.precision"},
    "fused_adam.scalars": {"fused_adam_kernels.table"},
    "fused_adam.norm": {"fused_adam_kernels.table"},
    "fused_adam.flatten": {"fused_adam.arena"},
    "fused_adam.distributed": {"fused_adam.norm", "fused_adam.precision"},
    "fused_adam.plan": {
        *("fused_adam.arena", "fused_adam.convert", "fused_adam.distributed", "fused_adam.flatten"),
        "fused_adam.precision",
    },
    "fused_adam.shapes": {
        *("fused_adam.arena", "fused_adam.distributed", "fused_adam.plan", "fused_adam.precision"),
        "fused_adam_kernels.table",
    },
    "fused_adam.checkpoint": {
        "fused_adam.shapes",
        *("fused_adam.arena", "fused_adam.codecs", "fused_adam.convert", "fused_adam.distributed"),
        *("fused_adam.precision", "fused_adam.scalars"),
    },
    "fused_adam.convert": {
        *("fused_adam.arena", "fused_adam.codecs", "fused_adam.distributed", "fused_adam.precision"),
    },
    "fused_adam.watch": {"fused_adam.arena", "fused_adam.distributed", "fused_adam.flatten"},
    "fused_adam.host": {
        *("fused_adam.arena", "fused_adam.codecs", "fused_adam.norm", "fused_adam.plan", "fused_adam.precision"),
        *("fused_adam.reference", "fused_adam.scalars", "fused_adam_kernels.table"),
    },
    "fused_adam.device": {
        *("fused_adam.arena", "fused_adam.plan", "fused_adam.scalars"),
        *("fused_adam_kernels.adam", "fused_adam_kernels.norm"),
        *("fused_adam_kernels.scalars", "fused_adam_kernels.table"),
    },
    "fused_adam.backend": {
        *("fused_adam.device", "fused_adam.host", "fused_adam.plan", "fused_adam.reference", "fused_adam.scalars"),
    },
    "fused_adam.engine": {
        "fused_adam.arguments",
        *("fused_adam.arena", "fused_adam.backend", "fused_adam.distributed", "fused_adam.flatten"),
        *("fused_adam.plan", "fused_adam.scalars", "fused_adam.watch", "fused_adam_kernels.table"),
        "fused_adam.shapes",
    },
    "fused_adam.optimizer": {
        *("fused_adam.arena", "fused_adam.arguments", "fused_adam.backend", "fused_adam.checkpoint"),
        "fused_adam.distributed",
        *("fused_adam.engine", "fused_adam.flatten", "fused_adam.offload", "fused_adam.precision"),
        "fused_adam.shapes",
        *("fused_adam.scalars", "fused_adam_kernels.table"),
    },
    "fused_adam.offload": {"fused_adam.arena", "fused_adam.distributed", "fused_adam.precision"},
    "fused_adam_kernels": set(),
    "fused_adam_kernels.table": set(),
    "fused_adam_kernels.math": set(),
    "fused_adam_kernels.codecs": set(),
    "fused_adam_kernels.launch": set(),
    "fused_adam_kernels.scalars": {"fused_adam_kernels.launch", "fused_adam_kernels.table"},
    "fused_adam_kernels.norm": {"fused_adam_kernels.adam", "fused_adam_kernels.launch", "fused_adam_kernels.table"},
    "fused_adam_kernels.inspect": {
        *("fused_adam_kernels.adam", "fused_adam_kernels.config", "fused_adam_kernels.norm"),
        "fused_adam_kernels.scalars",
    },
    "fused_adam_kernels.adam": {
        *("fused_adam_kernels.codecs", "fused_adam_kernels.config", "fused_adam_kernels.launch"),
        *("fused_adam_kernels.math", "fused_adam_kernels.table"),
    },
    "fused_adam_kernels.config": {"fused_adam_kernels.codecs"},
    # The update's access pattern without arithmetic, launched as the update is.
    "bench.ceiling": {"fused_adam_kernels.config"},
    # The names and bytes of recipes, and the parameters they are for.
    "bench.recipes": {"fused_adam.precision"},
    "bench.peers": {"fused_adam.precision"},
    # Takes launches away or reshapes them, to time Python alone or to find better shapes: no public name does that.
    "bench.stub": {"fused_adam_kernels.adam", "fused_adam_kernels.config", "fused_adam_kernels.launch"},
}


def name_of(path):
    parts = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Every module imported anywhere in the file, absolute, with `from package import module` resolved."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*package.split(".")[: len(package.split(".")) - node.level + 1], base]))
            names = {f"{base}.{alias.name}" for alias in node.names}
            modules = names & {name_of(module) for module in MODULES}
            yield from modules or {base}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path):
    name = name_of(path)
    found = set(imports_of(path))
    own = {module for module in found if module.split(".")[0] in ("fused_adam", "fused_adam_kernels", "bench", "tests")}
    if name.split(".")[0] == "bench":
        assert {module for module in own if not module.startswith("bench")} <= {
            "fused_adam",
            *ALLOWED.get(name, ()),
        }
    else:
        assert own <= ALLOWED[name]
    triton = any(module.split(".")[0] == "triton" for module in found)
    assert not triton or name.startswith("fused_adam_kernels.") or name == "bench.ceiling"
    assert not triton or name != "fused_adam_kernels.table"
    assert name != "fused_adam_kernels.table" or not found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_lives_there(path):
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip()


def run(code, *options):
    # Torch itself may need what else is set, such as LD_LIBRARY_PATH.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, env=environment)


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
