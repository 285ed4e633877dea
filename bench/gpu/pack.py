"""Pack what a run on a GPU needs into a folder: the scripts, and Triton's cache compiled here for
sm_90.

    python pack.py [--out .gpu] [--python 3.12] [--no-cache]

No GPU takes part: kernels are launched on a driver that compiles and runs nothing, so that the
cache has the keys of real launches. A key also holds a hash of Triton's own binary, which differs
between versions of Python: `--python` names that of the machine with the GPU. Under another Triton
or Python the run compiles everything anew.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCRIPTS = ("gpu_run.sh", "smoke.py", "variants.py", "launches.py")
# Triton's cache names its files by absolute paths: the run puts its own folder in this place.
CACHE_MARK = "@CACHE@"
PROCESSES = 2

sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if TYPE_CHECKING:
    from bench.gpu import variants

Job = tuple[str, Callable[[], None]]  # a name, and a launch that compiles one kernel


class Driver:
    """All that compiling and launching ask of a GPU's driver; says it is an H100."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.utils = self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        return self, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None


def update_mixes() -> list[variants.Mix]:
    """What the update is compiled for: dtypes of parameter and gradient, weights, states."""
    import torch

    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    mixes: list[variants.Mix] = [
        (param, grad, "native", "native")
        for param, grad in itertools.product((f32, bf16, f16, f64), repeat=2)
    ]
    for weights, states, param in (
        *(("native", states, f32) for states in ("bf16", "int8")),
        *(("master32", "fp32", dtype) for dtype in (bf16, f16)),
        *(
            (weights, states, bf16)
            for weights in ("split32", "split24")
            for states in ("fp32", "bf16", "int8")
        ),
        *(("sr", states, bf16) for states in ("bf16", "int8")),
        ("native", "fp32", bf16),
    ):
        mixes += [(param, grad, weights, states) for grad in {param: 0, f32: 0}]
    return mixes


def optimizer_jobs() -> list[Job]:
    """Everything that the optimizer launches, by name."""
    import torch

    from fused_adam_kernels import adam, norm, scalars, table

    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

    def update(mix: variants.Mix, amsgrad: bool) -> None:
        rows, blocks = (
            torch.zeros(1, table.ROW, dtype=torch.int64),
            torch.zeros(1, 2, dtype=torch.int32),
        )
        values = torch.zeros(1, table.SCALARS, dtype=f64 if mix[0] == f64 else f32)
        adam.adam_step(*mix, amsgrad)(1, rows, blocks, values)

    def prologue(compute: torch.dtype) -> None:
        values = torch.zeros(1, table.SCALARS, dtype=compute)
        tables = (
            torch.zeros(1, table.ROW, dtype=torch.int64),
            torch.zeros(1, table.HYPER, dtype=f64),
            values,
        )
        flags = (
            torch.zeros(1),
            torch.zeros(1),
            torch.zeros(1, dtype=f64),
            torch.zeros(table.STATS, dtype=f64),
        )
        scalars.prologue()(1, *tables, *flags, 1)

    def square_sum(grad: torch.dtype) -> None:
        rows, blocks = (
            torch.zeros(1, table.ROW, dtype=torch.int64),
            torch.zeros(1, 3, dtype=torch.int32),
        )
        norm.square_sum(grad)(1, rows, blocks, torch.zeros(1, dtype=f64))

    def total() -> None:
        norm.total()(1, torch.zeros(1, dtype=f64), torch.zeros(1, dtype=f64), 1)

    updates: list[Job] = [
        (f"update {mix} {amsgrad}", functools.partial(update, mix, amsgrad))
        for mix in update_mixes()
        for amsgrad in (False, True)
    ]
    prologues = [(f"prologue {dtype}", functools.partial(prologue, dtype)) for dtype in (f32, f64)]
    norms = [
        (f"norm {dtype}", functools.partial(square_sum, dtype)) for dtype in (f32, bf16, f16, f64)
    ]
    return [*updates, *prologues, *norms, ("norm", total)]


def jobs(folder: Path) -> list[Job]:
    """Everything that the optimizer, the benchmark and the variants launch, by name.

    Args:
        folder: for the copies of the kernels' sources that variants are.
    """
    import torch

    from bench.gpu import variants
    from bench.harness.stream import move

    def accesses() -> None:
        move(*(torch.zeros(1 << 14) for _ in range(4)))

    cpu = torch.device("cpu")
    builds = variants.builds_of([], folder, [])
    of_variants = [
        (
            f"{name} {mix}",
            functools.partial(variants.compile_update, build, mix, cpu),
        )
        for name, build in builds.items()
        for mix in variants.MIXES
    ]
    return [*optimizer_jobs(), ("accesses", accesses), *of_variants]


def compile_share(number: int, folder: Path, library: str | None) -> list[str]:
    """Compile every PROCESSES-th job into the cache; returns what failed, with the reason.

    Args:
        library: SHA-256 of the libtriton.so that the cache is for, if it is not this one.
    """
    from triton.runtime.driver import driver

    driver.set_active(Driver())
    if library:
        answer_for(library)
    failed = []
    for name, job in jobs(folder)[number::PROCESSES]:
        try:
            job()
        except Exception as error:  # the run compiles what is missing
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
    return failed


def answer_for(library: str) -> None:
    """Make cache keys with the hash of another build's libtriton.so in the place of this one's."""
    import triton
    from triton.runtime import cache

    own = hashlib.sha256(
        (Path(triton.__file__).parent / "_C" / "libtriton.so").read_bytes()
    ).hexdigest()
    key = cache.triton_key()
    if own not in key:
        raise RuntimeError(
            f"Triton {triton.__version__} makes its cache's keys in another way; "
            "use --python of this one"
        )
    cache.triton_key = lambda: key.replace(own, library)


def library_of(python: str, version: str, folder: Path) -> str:
    """SHA-256 of libtriton.so in Triton's wheel for another Python, which pip downloads."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += [
        "--only-binary",
        ":all:",
        "--implementation",
        "cp",
        "--python-version",
        python,
        "--dest",
        str(folder),
    ]
    command += [
        "--platform",
        "manylinux_2_27_x86_64",
        "--platform",
        "manylinux_2_28_x86_64",
        f"triton=={version}",
    ]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("triton-*.whl")
    with zipfile.ZipFile(wheel) as content:
        return hashlib.sha256(content.read("triton/_C/libtriton.so")).hexdigest()


def fill_cache(python: str, archive: Path) -> None:
    """Compile every job and write the cache as an archive, with CACHE_MARK for its folder."""
    import triton

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        cache = work / "cache"
        cache.mkdir()
        os.environ["TRITON_CACHE_DIR"] = str(cache)
        library = None
        if python != f"{sys.version_info.major}.{sys.version_info.minor}":
            (work / "wheel").mkdir()
            library = library_of(python, triton.__version__, work / "wheel")
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            shares = [
                (number, Path(tempfile.mkdtemp(dir=work)), library) for number in range(PROCESSES)
            ]
            failed = pool.starmap(compile_share, shares)
        for text in itertools.chain(*failed):
            print(f"pack: not compiled: {text}")
        for path in cache.glob("*/__grp__*.json"):
            path.write_text(path.read_text().replace(str(cache), CACHE_MARK))
        with tarfile.open(archive, "w:gz") as file:
            for path in sorted(cache.glob("*/*")):
                file.add(path, path.relative_to(cache))
        print(
            f"pack: {len(list(cache.glob('*/*.cubin')))} kernels, "
            f"Triton {triton.__version__}, Python {python}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Pack, and say how to run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / ".gpu",
        help="folder that is written anew (default: .gpu)",
    )
    parser.add_argument(
        "--python", default="3.12", help="of the machine with the GPU (default: 3.12)"
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="scripts alone: the run compiles every kernel"
    )
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") and not options.no_cache:
        parser.error(
            "TRITON_INTERPRET is set, under which nothing is compiled; "
            "allowed: unset, 0, or --no-cache"
        )
    out: Path = options.out
    if out.exists() and not (out / SCRIPTS[0]).exists() and any(out.iterdir()):
        parser.error(
            f"--out {str(out)!r} holds other files; "
            "allowed: a new or empty folder, or one packed before"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for script in SCRIPTS:
        shutil.copy(HERE / script, out)
    if not options.no_cache:
        fill_cache(options.python, out / "cache.tgz")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(
        f"pack: {out}: {size / 1e6:.1f} MB; on the machine with the GPU, in the checkout: "
        f"bash {out.name}/gpu_run.sh"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
