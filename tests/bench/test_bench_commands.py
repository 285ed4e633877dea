"""Every sub-command of the benchmark through its real entry point, tiny. No time is asserted."""

import contextlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from bench import accuracy, cli, env, verify
from bench.harness import optimizers, plots, rotation
from bench.harness import shapes as shapes_module

ROOT = pathlib.Path(__file__).parents[2]
ONE = ["--device", "cpu", "--backend", "reference", "--flatten", "off"]
FEW = [*ONE, "--seconds", "0.05"]
TWO = ["--peers", "torch-fused,torch-single"]


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


def by_name(record):
    return {result["optimizer"]: result for result in record["results"]}


def test_step(run, shapes, tmp_path):
    picture = tmp_path / "step.png"
    code, record, out = run("step", *shapes, *FEW, *TWO, "--plot", str(picture), "--threads", "1")
    assert code == 0
    assert (record["schema"], record["command"]) == ("fused-adam-bench/1", "step")
    assert (
        record["arguments"]["backend"] == "reference" and record["arguments"]["dtype"] == "float32"
    )
    assert record["arguments"]["shapes"] == "little.json"  # no path of this machine
    results = by_name(record)
    assert set(results) == {"FusedAdamW reference", "torch fused", "torch single"}
    for result in results.values():
        assert (result["model"], result["tensors"], result["parameters"]) == ("little", 4, 1248)
        assert (result["held_bytes"], result["moved_bytes"]) == (8, 28)
        assert result["step_ms"]["rounds"] >= 3
        assert (
            result["gb_per_s"]["high"]
            >= 28 * 1248 / (result["step_ms"]["median"] * 1e-3) / 1e9 * 0.999
        )
        assert result["gate"]["error"] <= result["gate"]["allowed"] and result["buffer_sets"] > 1
    assert results["torch fused"]["speedup"]["median"] == 1
    assert set(results["torch fused"]["pairs"]) == {"FusedAdamW reference"}
    assert "little: 1,248 parameters in 4 tensors, float32; eager" in out and "torch single" in out
    assert "copy bandwidth in the same rounds" in out and "machine: " in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_step_with_other_gradients_leaves_torch_out(run, shapes):
    code, record, out = run(
        "step", *shapes, *FEW, *TWO, "--dtype", "bfloat16", "--grad-dtype", "float32", "--clip", "1"
    )
    assert code == 0
    [result] = record["results"]
    assert (result["held_bytes"], result["moved_bytes"], result["speedup"]) == (4, 20, None)
    reason = "gradients must have the parameter's dtype"
    assert {"name": "torch fused", "reason": reason} in record["left_out"]
    assert f"not measured: torch fused: {reason}" in out


@pytest.mark.parametrize("command", ["step", "host"])
def test_the_interpreters_time_says_nothing(command, run, shapes):
    what = shapes if command == "step" else ["--tensors", "3"]
    _, record, _ = run(
        command,
        *what,
        "--device",
        "cpu",
        "--backend",
        "triton",
        "--flatten",
        "off",
        *TWO[:1],
        "torch-fused",
    )
    assert "FusedAdamW triton" not in by_name(record)
    assert {
        "name": "FusedAdamW triton",
        "reason": "runs in Triton's interpreter here, whose time says nothing",
    } in (record["left_out"])


def test_every_other_optimizer_is_measured_or_has_a_reason(run, shapes):
    """Whatever is installed here. Those that compile for long only when they are named."""
    _, record, _ = run("step", *shapes, *FEW, "--quick")
    names = {result["optimizer"] for result in record["results"]} | {
        entry["name"] for entry in record["left_out"]
    }
    assert names == {"FusedAdamW reference", *(spec.name for spec in optimizers.peers().values())}
    assert all(entry["reason"] for entry in record["left_out"])


@pytest.mark.parametrize(
    "limit, code, said", [("1e-9", 0, "every case reaches"), ("1e9", 1, "check: FAILED: little")]
)
@pytest.mark.parametrize("command", ["step", "host"])
def test_check(command, limit, code, said, run, shapes):
    what = shapes if command == "step" else ["--tensors", "3"]
    found, _, out = run(command, *what, *FEW, "--peers", "torch-fused", "--check", limit)
    assert (
        found == code
        and (said if command == "step" else said.replace("little", "3 tensors")) in out
    )


def test_check_without_torch_fused_fails(run, shapes):
    code, _, out = run("step", *shapes, *FEW, "--peers", "none", "--check", "0.1")
    assert code == 1 and "nothing of ours was measured with torch fused" in out


def test_a_wrong_optimizer_gets_no_time(run, shapes, monkeypatch):
    class Slow(optimizers.FusedAdamW):
        def __init__(self, params, **arguments):
            super().__init__(params, **{**arguments, "lr": arguments["lr"] * 1.01})

    monkeypatch.setattr(optimizers, "FusedAdamW", Slow)
    code, record, out = run("step", *shapes, *FEW, *TWO)
    assert code == 1 and set(by_name(record)) == {"torch fused", "torch single"}
    assert "FAILED: FusedAdamW reference: wrong: after 5 steps" in out


def test_memory_holds_one_at_a_time(run, shapes, monkeypatch):
    """Each optimizer is then made anew for every turn, and measured as often as the others."""
    monkeypatch.setattr(rotation, "free_bytes", lambda device: 290_000)
    _, record, out = run("step", *shapes, *FEW, *TWO)
    assert [result["resident"] for result in record["results"]] == [False] * 3
    assert {result["step_ms"]["rounds"] for result in record["results"]} == {2}
    assert "one optimizer in memory at a time" in out


@pytest.mark.parametrize("command", ["step", "memory"])
def test_too_little_memory_is_one_line(command, monkeypatch, capsys):
    monkeypatch.setattr(rotation, "free_bytes", lambda device: 10**9)
    assert cli.main([command, *ONE, *TWO, "--model", "gpt2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        "gpt2 in float32 needs 3.1 GB on cpu for one optimizer, 1.0 GB are free; "
        "try a shard (gpt2/64)" in error
    )


@pytest.mark.parametrize("grads, caches", [("kept", "warm"), ("new", "cold")])
def test_host(grads, caches, run, tmp_path):
    picture = tmp_path / "host.png"
    code, record, out = run(
        "host",
        "--tensors",
        "2,5",
        *FEW,
        *TWO,
        "--grads",
        grads,
        "--caches",
        caches,
        "--plot",
        str(picture),
    )
    assert code == 0
    stubbed = "FusedAdamW triton, no launch"
    assert {(r["optimizer"], r["tensors"]) for r in record["results"]} == {
        (name, count)
        for name in ("FusedAdamW reference", "torch fused", "torch single", stubbed)
        for count in (2, 5)
    }
    for result in record["results"]:
        assert result["ns_per_parameter"] == pytest.approx(
            result["step_us"]["median"] * 1e3 / result["tensors"]
        )
        assert (result["grads"], result["caches"]) == (grads, caches)
        assert result["family"] == ("torch" if "torch" in result["optimizer"] else "ours")
    assert (
        " n\n" in out
        and "us per step" in out
        and "ns per parameter" in out
        and "times as fast as torch fused" in out
    )
    assert picture.stat().st_size > 10_000


def test_host_on_dtensors(run):
    code, record, _ = run("host", "--tensors", "3", *FEW, *TWO, "--dtensors")
    assert code == 0 and "FusedAdamW DTensor" in {
        result["optimizer"] for result in record["results"]
    }
    assert not torch.distributed.is_initialized()  # the group was this command's own


def test_memory(run):
    """Resident pages of a few MB: coarse, but state is counted exactly."""
    code, record, out = run("memory", "--model", "gpt2/64", *ONE, *TWO, "--amsgrad")
    assert code == 0
    for result in by_name(record).values():
        assert result["state_bytes"] == 12
        assert result["held_bytes"] is None or 6 < result["held_bytes"] < 40
        assert result["construct_peak_bytes"] is None or result["construct_peak_bytes"] > 6
    assert "bytes per parameter: gpt2/64" in out and "12.00" in out


def test_accuracy(run, monkeypatch):
    monkeypatch.setattr(accuracy.measure, "__defaults__", (500,))
    code, record, out = run("accuracy", *ONE, *TWO, "--dtype", "float32,bfloat16", "--steps", "5")
    assert code == 0
    cells = {(r["optimizer"], r["option"], r["dtype"]): r for r in record["results"]}
    assert len(cells) == 3 * len(accuracy.OPTIONS) * 2
    for (name, option, dtype), result in cells.items():
        unit = torch.finfo(getattr(torch, dtype)).eps / 2
        # Five roundings of half a unit at most each way, and as much again from the step.
        assert 0 < result["mean_error"] < 20 * unit, (name, option)
        assert result["mean_error"] <= result["max_error"]
    decay = "lr 1e-3, decay 0.1"
    ours, theirs = (
        cells["FusedAdamW reference", decay, "float32"],
        cells["torch single", decay, "float32"],
    )
    assert ours["mean_error"] < theirs["mean_error"]
    assert f"{theirs['mean_error']:.2e}" in out


def test_accuracy_of_recipes(run, monkeypatch):
    """All that is stored of a parameter counts: what split32 keeps beside it, too."""
    monkeypatch.setattr(accuracy.measure, "__defaults__", (500,))
    recipes = ["--precision", "none,split32", "--dtype", "bfloat16", "--peers", "none"]
    code, record, _ = run("accuracy", *ONE, *recipes, "--steps", "5")
    assert code == 0
    errors = {(r["optimizer"], r["option"]): r["mean_error"] for r in record["results"]}
    assert errors["FusedAdamW reference", "lr 1e-3"] > 1e-3
    assert (
        errors["FusedAdamW reference split32", "lr 1e-3"] < 20 * torch.finfo(torch.float32).eps / 2
    )


def test_an_overflow_is_recorded(run, monkeypatch):
    """In float16 1e-8 is zero, as are small second moments: torch divides by them."""
    monkeypatch.setattr(accuracy.measure, "__defaults__", (500,))
    arguments = ["--dtype", "float16", "--peers", "torch-single", "--steps", "50"]
    code, record, out = run("accuracy", *ONE, *arguments)
    assert code == 0 and "overflow" in out
    found = {r["mean_error"] is None for r in record["results"] if r["optimizer"] == "torch single"}
    assert found == {True}


def test_env(run):
    code, record, out = run("env", "--device", "cpu")
    assert code == 0 and {"torch fused", "FusedAdamW"} <= set(by_name(record))
    assert f"torch {torch.__version__}" in out and "not measured: apex: runs on CUDA only" in out


def test_verify(run):
    code, record, out = run("verify", "--quick", "--device", "cpu")
    assert code == 0
    hashes = [result for result in record["results"] if result["check"] == "hash"]
    assert [(r["backend"], r["flatten"], r["same"]) for r in hashes] == [
        ("reference", False, True),
        ("reference", True, True),
    ]
    assert out.count("```") == 2 and out.count("as promised") == 2
    assert "copy bandwidth: " in out and verify.HASHES[30][:16] in out


def test_verify_in_full(run, monkeypatch):
    """The kernel's own bits are test_hash.py's business: here, what is asked of whom, and the
    glance at the speed.
    """
    asked = []
    monkeypatch.setattr(
        verify,
        "trained_digest",
        lambda steps, *how: asked.append((steps, *how[:-1])) or verify.HASHES[steps],
    )
    monkeypatch.setitem(shapes_module.MODELS, "resnet50", lambda: [(10, 10)])
    monkeypatch.setattr(verify, "GLANCE_SECONDS", 0.05)
    code, record, out = run("verify", "--device", "cpu")
    cpu = torch.device("cpu")
    assert asked == [
        (1000, cpu, "reference", False),
        (1000, cpu, "reference", True),
        (30, cpu, "triton", False),
    ]
    assert code == 0 and out.count("as promised") == 3
    assert {r["optimizer"] for r in record["results"] if r["check"] == "step"} == {
        *("FusedAdamW", "FusedAdamW flatten", "torch fused")
    }
    assert "resnet50 float32, FusedAdamW: " in out


def test_verify_finds_other_bits(run, monkeypatch):
    monkeypatch.setitem(verify.HASHES, 30, "0" * 64)
    monkeypatch.setattr(
        verify, "plan", lambda device, quick: [verify.Check("reference", 30, False)]
    )
    code, _, out = run("verify", "--quick", "--device", "cpu")
    assert (
        code == 1
        and "NOT the promised 0000000000000000" in out
        and "FAILED: hash, reference, 30 steps" in out
    )


@pytest.fixture(scope="module")
def bare_suite(tmp_path_factory):
    """`python -m bench suite` where only torch and triton are there: rich, matplotlib, numpy and
    pytest are blocked.
    """
    folder = tmp_path_factory.mktemp("bare")
    names = ("rich", "matplotlib", "numpy", "pytest")
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in names)
    (folder / "sitecustomize.py").write_text(f"import sys\n{blocked}")
    environment = {
        **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join([str(folder), ".", "kernels"]),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "bench",
        "suite",
        "--quick",
        "--seconds",
        "3",
        "--device",
        "cpu",
    ]
    command += [
        "--backend",
        "reference",
        "--peers",
        "torch-fused",
        "--json",
        "-",
        "--plot",
        str(folder / "no.png"),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_suite_in_a_bare_checkout(bare_suite):
    assert bare_suite.returncode == 0, bare_suite.stderr
    record = json.loads(bare_suite.stdout)  # nothing but the record
    parts = {part["command"]: part for part in record["results"]}
    assert list(parts) == ["verify", "tests", "ceiling", "host", "accuracy", "step", "memory"]
    assert {"name": "sweep", "reason": "only with --sweep"} in record["left_out"]
    assert all(parts[name]["results"] for name in ("verify", "host", "accuracy", "step", "memory"))
    assert by_name(parts["step"])["FusedAdamW reference"]["model"] == "many-small"
    assert all(r["same"] for r in parts["verify"]["results"] if r["check"] == "hash")
    text = bare_suite.stderr
    assert (
        "many-small: 4,083,135 parameters in 2,000 tensors, float32; eager" in text
        and "─" not in text
    )
    assert "picture: none, because matplotlib is not installed" in text
    assert "Triton's interpreter needs numpy, which is not installed" in text


def test_report_tells_the_same_from_a_file(bare_suite, tmp_path, capsys):
    path, picture = tmp_path / "suite.json", tmp_path / "suite.png"
    path.write_text(bare_suite.stdout)
    assert cli.main(["report", str(path), "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    live = bare_suite.stderr.splitlines()
    rows = [line for line in live if "FusedAdamW" in line and not line.startswith("suite: ")]
    assert [line for line in lines if "FusedAdamW" in line] == rows and len(rows) >= 7
    assert picture.stat().st_size > 10_000


def test_report_writes_marked_tables_into_a_document(run, shapes, tmp_path, capsys):
    run("step", *shapes, *FEW, *TWO)
    document = tmp_path / "README.md"
    document.write_text("# Title\n\n<!-- bench: record.json -->\nold\n<!-- /bench -->\n\nend\n")
    assert cli.main(["report", "--update", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("# Title\n\n<!-- bench: record.json -->\n\nlittle: 1,248 parameters")
    assert (
        "| torch fused | " in text
        and "\nold\n" not in text
        and text.endswith("<!-- /bench -->\n\nend\n")
    )
    assert "updated" in capsys.readouterr().out
    assert cli.main(["report", "--update", str(document)]) == 0
    assert document.read_text() == text and "unchanged" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "record.json"), "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in text


def test_a_document_without_marks_and_a_record_without_pictures_are_named(run, tmp_path, capsys):
    document = tmp_path / "README.md"
    document.write_text("nothing\n")
    assert cli.main(["report", "--update", str(document)]) == 2
    assert "has no line '<!-- bench: FILE.json -->'" in capsys.readouterr().err
    run("env", "--device", "cpu")
    assert (
        cli.main(["report", str(tmp_path / "record.json"), "--plot", str(tmp_path / "no.png")]) == 2
    )
    assert "nothing to draw" in capsys.readouterr().err
    document.rename(tmp_path / "bad.json")
    assert cli.main(["report", str(tmp_path / "bad.json")]) == 2
    assert "bad.json' is not a JSON file" in capsys.readouterr().err


def test_the_results_in_the_repository_can_be_read(capsys):
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        assert cli.main(["report", str(path)]) == 0, path
    assert plots.drawable([]) == []


def test_precision_recipes_are_rows(run, shapes, capsys):
    """Each recipe is a row, in a dtype that all of them serve; an unknown one is an error."""
    recipes = ["--peers", "none", "--precision", "split32,sr-bf16"]
    names = ["FusedAdamW reference split32", "FusedAdamW reference sr-bf16"]
    _, record, _ = run("step", *shapes, *FEW, *recipes)
    assert list(by_name(record)) == names and not record["left_out"]
    assert {r["dtype"] for r in record["results"]} == {record["arguments"]["dtype"]} == {"bfloat16"}
    code, record, out = run("step", *shapes, *FEW, *recipes, "--dtype", "float32")
    assert code == 0
    assert not record["results"] and [entry["name"] for entry in record["left_out"]] == names
    assert (
        "not measured: FusedAdamW reference split32: "
        "precision 'split32' is for bfloat16 parameters, not float32 (see --dtype)"
    ) in out
    for command in ("step", "accuracy", "suite"):
        assert cli.main([command, "--device", "cpu", "--precision", "split33"]) == 2
        assert (
            "--precision: precision='split33' is no recipe; did you mean 'split32'?"
            in capsys.readouterr().err
        )


def test_a_recipe_runs_on_a_cpu_without_a_backend(run, shapes, capsys):
    """The compiled backend, which has no recipes, takes part only without one, or by its name."""
    few = ["--device", "cpu", "--flatten", "off", "--peers", "none"]
    for command in (["step", *shapes, "--seconds", "0.05"], ["memory", *shapes]):
        code, record, out = run(*command, *few, "--precision", "split32,none")
        assert code == 0 and not record["left_out"] and "not measured" not in out
        names = {"FusedAdamW split32", "FusedAdamW", "FusedAdamW compiled"}
        assert set(by_name(record)) == names
    assert cli.main(["step", *shapes, *few, "--precision", "split32", "--backend", "compiled"]) == 2
    assert (
        "--precision split32 cannot be combined with --backend compiled, because the compiled "
        "backend knows no precision recipes; allowed: auto, triton, reference"
    ) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipes", "dtype"),
    [
        ([], "float32"),
        (["none"], "float32"),
        (["native-bf16", "none"], "float32"),
        (["split32"], "bfloat16"),
        (["native-int8", "sr-bf16"], "bfloat16"),
        (["master32", "none"], "bfloat16"),
    ],
)
def test_the_dtype_is_one_that_every_recipe_serves(recipes, dtype):
    assert optimizers.common_dtype(recipes) == getattr(torch, dtype)


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_command_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(env, "run", interrupt)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "fused-adam-bench: interrupted\n"


def test_an_interrupted_start_says_so_in_one_line(monkeypatch, capsys):
    """Importing torch takes seconds."""
    module = types.ModuleType("bench.cli")
    module.__getattr__ = interrupt
    monkeypatch.setitem(sys.modules, "bench.cli", module)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench", run_name="__main__")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "fused-adam-bench: interrupted\n"


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("wait", [0.0, 0.5])
def test_an_interrupt_ends_the_processes_that_train_recipes(tmp_path, wait):
    """Ctrl-C goes to all processes of the terminal, also while they are being started."""
    out = ["--steps", "100000", "--plot", str(tmp_path / "none.png")]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "bench",
            "convergence",
            "--device",
            "cpu",
            "--precision",
            "split32",
            *out,
        ],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        while (
            len(children.read_text().split()) < 2 and process.poll() is None
        ):  # multiprocessing's tracker is the first
            time.sleep(0.05)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, error) == (130, "fused-adam-bench: interrupted\n")


MODELS = "gpt2, gpt2-xl, llama-3-8b, resnet50, vit-b16, many-small, one-big"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["step", "--model", "gpt3"],
            f"argument --model: 'gpt3' is not known; allowed: {MODELS}; each with /N",
        ),
        (["step", "--model", "gpt2/0"], "'gpt2/0' is not known"),
        (
            ["step", "--dtype", "int8"],
            "'int8' is not known; allowed: float32, bfloat16, float16, float64",
        ),
        (
            ["step", "--backend", "cuda"],
            "'cuda' is not known; allowed: auto, triton, reference, compiled",
        ),
        (
            ["step", "--peers", "adam"],
            "'adam' is not known; allowed: none, torch-fused, torch-foreach, torch-single",
        ),
        (["step", "--flatten", "yes"], "'yes' is not known; allowed: both, on, off"),
        (["step", "--clip", "-1"], "'-1' is not a number above 0"),
        (["step", "--check", "fast"], "'fast' is not a number above 0"),
        (["step", "--shapes", "no.json"], "'no.json' is not a file that is there"),
        (["step", "--json", "no/such.json"], "the folder 'no' does not exist"),
        (["host", "--tensors", "10,x"], "'x' is not a whole number from 1 to 1000000"),
        (["accuracy", "--steps", "0"], "'0' is not a whole number from 1 to 10000"),
        (["verify", "--plot", "x.png"], "'--plot' is not known; allowed: -h, --help, --device"),
        (["report", "none.json"], "'none.json' is not a file that is there"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_named_with_what_is_allowed(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    "command", ["step", "host", "memory", "accuracy", "verify", "suite", "env", "demo"]
)
def test_a_gpu_that_is_not_there_is_named(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--device", "cuda"])
    assert stop.value.code == 2
    assert "'cuda' is not available here; allowed: auto, cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is not a JSON file"),
        ("[]", "must hold a list (or an object) of shapes"),
        ("[[1, -2]]", "must hold a list (or an object) of shapes"),
    ],
)
def test_bad_shapes_are_named(content, said, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert cli.main(["step", "--shapes", str(path), *FEW]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, said",
    [
        (
            {"model_type": "mamba"},
            "has model_type 'mamba'; allowed: gpt2, llama, mistral, qwen2, qwen3, vit",
        ),
        ({"model_type": "llama"}, "lacks 'num_attention_heads', which model_type 'llama' needs"),
    ],
)
def test_bad_configs_are_named(config, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["step", "--hf-config", str(tmp_path), *FEW]) == 2
    assert said in capsys.readouterr().err
