"""Other shapes of the update kernel next to today's, in one process: the same bits? how many GB/s?

    python variants.py [--json FILE] [--seconds S] [--mixes fp32,bf16,...] [--only NAME ...]
                       [--numel N]
    python variants.py --compile I/N   compile every N-th kernel from the I-th on, and end
    python variants.py --check         bits alone, on small tensors; runs on a CPU under
                                       TRITON_INTERPRET=1 too

A variant is an entry for `fused_adam_kernels/config.py` (a winner is a change of one line there),
or edits of the kernels' sources where the kernel itself has to do something else. Edits are made in
copies, which then run under the real optimizer. An edit whose place is no longer in the sources is
named, and the other variants go on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.gpu.edits import NotPatched, Variant, variants
from bench.harness.timing import (
    Bandwidth,
    CopyBandwidth,
    give_back_memory,
    interleaved,
    seconds_of,
    statistic,
    synchronize,
    warm_up_seconds,
)
from fused_adam import FusedAdamW
from fused_adam.backends import triton as device
from fused_adam.precision import parse
from fused_adam_kernels import config
from fused_adam_kernels.config import Config

Mix = tuple[torch.dtype, torch.dtype, str, str]
KERNELS = Path(config.__file__).parent
F32, BF16 = torch.float32, torch.bfloat16
# name -> dtype of parameters and gradients, precision recipe, AMSGrad
MIXES: dict[str, tuple[torch.dtype, str | None, bool]] = {
    "fp32": (F32, None, False),
    "bf16": (BF16, None, False),
    "split32-bf16": (BF16, "split32-bf16", False),
    "sr-bf16": (BF16, "sr-bf16", False),
    "split24-int8": (BF16, "split24-int8", False),
    "split24-bf16": (BF16, "split24-bf16", False),
    "native-bf16": (F32, "native-bf16", False),
    "native-int8": (F32, "native-int8", False),
    "split24-bf16-amsgrad": (BF16, "split24-bf16", True),
    "split24-int8-amsgrad": (BF16, "split24-int8", True),
}
# Around a block, a group and a vector; one tensor starts off a vector's alignment.
CHECKED = ((5000, 0), (1, 0), (33, 0), (1024, 0), (2049, 1))
STEPS_PER_SAMPLE = 8


class Build:
    """A variant's kernels, as `fused_adam.backends.triton` uses them."""

    def __init__(self, name: str, variant: Variant, folder: Path) -> None:
        self.variant = variant
        package = "variant_" + "".join(c if c.isalnum() else "_" for c in name)
        if not (folder / package).exists():
            shutil.copytree(KERNELS, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
            for file, old, new in variant.edits:
                path = folder / package / file
                text = path.read_text()
                if text.count(old) != 1:
                    raise NotPatched(
                        f"{old.strip().splitlines()[0]!r} is {text.count(old)} times in {file}, "
                        "not once"
                    )
                path.write_text(text.replace(old, new))
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == package]:
            del sys.modules[loaded]  # of an earlier folder
        self.modules: dict[str, ModuleType] = {
            module: importlib.import_module(f"{package}.{module}")
            for module in ("adam", "norm", "scalars", "table")
        }
        self.modules["adam"].launch_config = self.own_config  # type: ignore[attr-defined]

    def own_config(self, *mix: Any) -> Config:
        """Today's entry with the variant's changes; in the interpreter too, which computes the same
        in any shape.
        """
        return config.CONFIGS[config.kind_of(*mix)]._replace(**self.variant.changes)

    def adam_step(self, *mix: Any) -> Callable[..., None]:
        """As `adam.adam_step`."""
        launcher: Callable[..., None] = self.modules["adam"].adam_step(*mix)
        if not self.variant.programs_per_sm:
            return launcher

        def launch(programs: int, rows: Any, blocks: Any, scalars: Any) -> None:
            sms = (
                torch.cuda.get_device_properties(0).multi_processor_count
                if torch.cuda.is_available()
                else 1
            )
            launcher(
                min(programs, sms * self.variant.programs_per_sm), rows, blocks, scalars, programs
            )

        return launch

    def table_config(self, *mix: Any) -> Config:
        """What the host cuts rows by."""
        found = self.own_config(*mix)
        return found._replace(block=found.block * self.variant.chunks)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Steps under it run these kernels."""
        adam = SimpleNamespace(adam_step=self.adam_step, launch_config=self.table_config)
        modules: dict[str, Any] = {**self.modules, "adam": adam}
        with mock.patch.multiple(device, **modules):
            yield


def mix_of(name: str) -> Mix:
    """Element types and recipe as the kernels name them."""
    dtype, precision, _ = MIXES[name]
    recipe = parse(precision)
    return dtype, dtype, recipe.weights or "native", recipe.states or "native"


def compile_update(build: Build, name: str, where: torch.device) -> None:
    """Compile the update kernel of a mix by a launch over a row without elements."""
    mix, amsgrad = mix_of(name), MIXES[name][2]
    table = build.modules["table"]
    rows = torch.zeros(1, table.ROW, dtype=torch.int64, device=where)
    blocks = torch.zeros(1, 2, dtype=torch.int32, device=where)
    compute = torch.float64 if mix[0] == torch.float64 else torch.float32
    scalars = torch.zeros(1, table.SCALARS, dtype=compute, device=where)
    build.adam_step(*mix, amsgrad)(1, rows, blocks, scalars)


def make(
    name: str, build: Build, sizes: Sequence[tuple[int, int]], where: torch.device
) -> FusedAdamW:
    """An optimizer over random parameters; sizes: (elements, offset in its memory) of each."""
    dtype, precision, amsgrad = MIXES[name]
    generator = torch.Generator(where).manual_seed(0)
    params = []
    for numel, offset in sizes:
        values, grads = (
            torch.randn(numel + offset, generator=generator, device=where)
            .mul_(scale)
            .to(dtype)[offset:]
            for scale in (0.02, 1e-3)
        )
        param = torch.nn.Parameter(values)
        param.grad = grads
        params.append(param)
    return FusedAdamW(params, precision=precision, amsgrad=amsgrad, backend="triton")


def bits(optimizer: FusedAdamW) -> list[torch.Tensor]:
    """Parameters and state after two steps."""
    params = optimizer.param_groups[0]["params"]
    tensors = [*params, *(value for param in params for value in optimizer.state[param].values())]
    return [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in tensors]


def check(
    name: str, builds: dict[str, Build], where: torch.device, wrong: list[dict[str, str]]
) -> dict[str, Build]:
    """Those whose bits are the first one's; the others go to `wrong` with the reason."""
    right: dict[str, Build] = {}
    expected: list[torch.Tensor] | None = None
    for title, build in builds.items():
        try:
            with build.in_use():
                optimizer = make(name, build, CHECKED, where)
                optimizer.step()
                optimizer.step()
            found = bits(optimizer)
        except Exception as error:  # a shape that does not compile or launch here is an answer
            wrong.append(
                {
                    "mix": name,
                    "variant": title,
                    "reason": f"{type(error).__name__}: {str(error)[:200]}",
                }
            )
            continue
        if expected is None:
            expected = found
        if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            right[title] = build
        else:
            wrong.append({"mix": name, "variant": title, "reason": "other bits"})
    return right


class Timed:
    """Times steps of one variant over one large parameter."""

    def __init__(self, name: str, build: Build, numel: int, where: torch.device) -> None:
        self.build, self.where = build, where
        with build.in_use():
            self.optimizer = make(name, build, [(numel, 0)], where)
            self.optimizer.step()
        [param] = self.optimizer.param_groups[0]["params"]
        state = [value for key, value in self.optimizer.state[param].items() if key != "step"]
        assert param.grad is not None
        self.bytes = 2 * param.nbytes + param.grad.nbytes + 2 * sum(value.nbytes for value in state)

    def measure(self) -> float:
        """Seconds per step."""
        with self.build.in_use():
            return seconds_of(self.optimizer.step, self.where, STEPS_PER_SAMPLE)

    def gb_per_s(self, seconds: float) -> float:
        """Of a step that took so long."""
        return float(self.bytes / seconds / 1e9)


def time_all(
    name: str, builds: dict[str, Build], numel: int, seconds: float, where: torch.device
) -> list[Any]:
    """GB/s of every variant, of a copy and of the update's accesses, interleaved."""
    from bench.harness.stream import AccessBandwidth

    limits: dict[str, Bandwidth] = {
        title: Timed(name, build, numel, where) for title, build in builds.items()
    }
    limits |= {"copy": CopyBandwidth(where), "accesses alone": AccessBandwidth(where, numel // 2)}
    measures = {title: limit.measure for title, limit in limits.items()}
    samples = interleaved(measures, seconds, warm_up=warm_up_seconds(where))
    rates = {title: [limit.gb_per_s(s) for s in samples[title]] for title, limit in limits.items()}
    ceiling = max(statistics.median(rates[title]) for title in ("copy", "accesses alone"))
    return [
        {
            "mix": name,
            "variant": title,
            "ms": statistic([s * 1e3 for s in samples[title]]),
            "gb_per_s": statistic(own),
            "share_of_ceiling": statistics.median(own) / ceiling,
        }
        for title, own in rates.items()
    ]


def builds_of(names: Sequence[str], folder: Path, wrong: list[dict[str, str]]) -> dict[str, Build]:
    """The kernels of the variants named; those that cannot be patched go to `wrong`."""
    known, found = variants(), {}
    for name in names or known:
        if name not in known:
            sys.exit(f"--only {name!r} is not known; allowed: {', '.join(known)}")
        try:
            found[name] = Build(name, known[name], folder)
        except NotPatched as error:
            wrong.append({"mix": "all", "variant": name, "reason": f"not patched: {error}"})
    return found


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--seconds", type=float, default=90.0, help="for all mixes together")
    parser.add_argument("--mixes", default=",".join(MIXES), help=f"of: {', '.join(MIXES)}")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        help="names of variants; the first is what others must equal",
    )
    parser.add_argument(
        "--numel", type=int, default=1 << 27, help="elements of the parameter that is timed"
    )
    parser.add_argument(
        "--compile", metavar="I/N", help="compile every N-th kernel from the I-th on, and end"
    )
    parser.add_argument("--check", action="store_true", help="bits alone")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 1 if a variant has other bits, fails or cannot be patched."""
    options = make_parser().parse_args(argv)
    if not torch.cuda.is_available() and not options.check:
        sys.exit("there is no GPU here; --check compares bits in Triton's interpreter")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixes = options.mixes.split(",")
    wrong: list[dict[str, str]] = []
    results: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        builds = builds_of(options.only, Path(name), wrong)
        if options.compile:
            first, number = map(int, options.compile.split("/"))
            for mix, build in [(mix, build) for mix in mixes for build in builds.values()][
                first::number
            ]:
                with contextlib.suppress(Exception):  # the run itself says what does not compile
                    compile_update(build, mix, where)
            synchronize(where)
            return 0
        for mix in mixes:
            right = check(mix, builds, where, wrong)
            print(f"{mix}: same bits: {', '.join(right)}", flush=True)
            if options.check or not right:
                continue
            found = time_all(mix, right, options.numel, options.seconds / len(mixes), where)
            results += found
            for row in sorted(found, key=lambda row: -row["gb_per_s"]["median"]):
                print(
                    f"{mix:13s} {row['variant']:25s} {row['ms']['median']:8.3f} ms "
                    f"{row['gb_per_s']['median']:6.0f} GB/s {row['share_of_ceiling']:6.1%} "
                    "of the ceiling",
                    flush=True,
                )
            give_back_memory()
            if options.json:  # after every mix: a run that is cut short keeps what it has
                options.json.write_text(
                    json.dumps({"results": results, "wrong": wrong}, indent=1) + "\n"
                )
    for row in wrong:
        print(f"WRONG {row['mix']}: {row['variant']}: {row['reason']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"results": results, "wrong": wrong}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
