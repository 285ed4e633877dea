"""Not a pytest file: builds sdist and wheel, and uses them beside Hugging Face's `kernels` package
(`make wheel`).
"""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv

ROOT = pathlib.Path(__file__).parents[2]

USE = """
import pathlib, sys, torch, fused_adam, fused_adam_bench.cli, fused_adam_kernels.adam
site = pathlib.Path(sys.prefix)
for module in (fused_adam, fused_adam_bench, fused_adam_kernels):
    assert site in pathlib.Path(module.__file__).parents, module.__file__
assert (pathlib.Path(fused_adam.__file__).parent / "py.typed").exists()
param = torch.nn.Parameter(torch.ones(3)); param.grad = torch.ones(3)
fused_adam.FusedAdamW([param], lr=0.5).step()
assert (param < 1).all()
"""
KERNELS_IS_THEIRS = """
import kernels
assert hasattr(kernels, "get_kernel"), kernels.__file__
print(kernels.__file__)
"""


def run(*command: object, cwd: pathlib.Path, **environment: str) -> str:
    """Run and return standard output; a failure shows everything and ends the check."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        # The wheel is built from the sdist, so both are complete.
        run(sys.executable, "-m", "build", "--outdir", work / "dist", ROOT, cwd=work)
        [wheel] = (work / "dist").glob("*.whl")
        [sdist] = (work / "dist").glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        for page in ("CONTRIBUTING.md", "docs/design.md", "examples/fsdp2.py"):
            assert page in names, f"{page} is not in {sdist.name}, but README.md links to it"
        venv.create(work / "env", with_pip=True)
        bin_ = work / "env" / "bin"
        python = bin_ / "python"
        # Torch and triton are this environment's: a path file lends them without another gigabyte
        # of install.
        site = run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=work
        ).strip()
        (pathlib.Path(site) / "lent.pth").write_text(sysconfig.get_path("purelib"))
        install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*install, "-c", ROOT / "constraints.txt", "kernels", cwd=work)
        theirs = run(python, "-c", KERNELS_IS_THEIRS, cwd=work)
        run(*install, "--no-deps", wheel, cwd=work)
        run(python, "-c", USE, cwd=work)
        assert "demo" in run(bin_ / "fused-adam-bench", "--help", cwd=work)
        assert run(python, "-c", KERNELS_IS_THEIRS, cwd=work) == theirs
        # At the root of a checkout our folder of the same name must not hide it.
        assert run(python, "-c", KERNELS_IS_THEIRS, cwd=ROOT) == theirs
        run(
            python,
            "-c",
            "import fused_adam_kernels.adam",
            cwd=ROOT,
            PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}",
        )
        uninstall = (python, "-m", "pip", "uninstall", "--quiet", "--yes", "fused-adam")
        run(*uninstall, cwd=work)
        assert run(python, "-c", KERNELS_IS_THEIRS, cwd=work) == theirs
        # An editable install finds the same packages in the checkout.
        run(*install, "--no-deps", "--editable", ROOT, cwd=work)
        run(
            python,
            "-c",
            USE.replace("pathlib.Path(sys.prefix)", f"pathlib.Path({str(ROOT)!r})"),
            cwd=work,
        )
        assert run(python, "-c", KERNELS_IS_THEIRS, cwd=work) == theirs
        run(*uninstall, cwd=work)
        assert run(python, "-c", KERNELS_IS_THEIRS, cwd=work) == theirs
    print(f"{wheel.name}: built, installed beside kernels (also editable), used, uninstalled")


if __name__ == "__main__":
    main()
