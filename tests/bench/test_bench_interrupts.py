"""What a run leaves behind when it is interrupted, when time is short, or when output is closed."""

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
from concurrent.futures import Future

import pytest
import torch

from bench import cli, convergence, demo, env, host, step, suite, verify
from bench.harness import console, optimizers, plots, timing

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
FEW = ["--device", "cpu", "--backend", "reference", "--flatten", "off", "--peers", "torch-fused"]
ONE_LINE = "fused-adam-bench: interrupted\n"
NAMES = {"FusedAdamW reference", "torch fused"}


@pytest.fixture
def shapes(tmp_path):
    path = tmp_path / "little.json"
    path.write_text("[[30, 40], [7]]")
    return ["--shapes", str(path)]


@pytest.fixture
def run(tmp_path, capsys):
    """Run a command with --json: exit code, record if one was written, output, error output."""

    def call(*argv):
        path = tmp_path / "record.json"
        code = cli.main([*argv, "--json", str(path)])
        record = json.loads(path.read_text()) if path.exists() else None
        return code, record, *capsys.readouterr()

    return call


def interrupt_at(monkeypatch, number):
    """The step of that number over all FusedAdamW is interrupted."""
    steps = []

    class Interrupted(optimizers.FusedAdamW):
        def step(self, closure=None):
            steps.append(None)
            if len(steps) == number:
                raise KeyboardInterrupt
            super().step(closure)

    monkeypatch.setattr(optimizers, "FusedAdamW", Interrupted)


def test_an_interrupted_step_keeps_whole_rounds(run, shapes, monkeypatch):
    monkeypatch.setattr(step, "residency", lambda specs, job: (True, 1))
    interrupt_at(monkeypatch, 5 + 2 + 4)  # the parity check, warming up, and in the 4th round
    code, record, out, error = run("step", *shapes, *FEW, "--seconds", "60")
    assert (code, error) == (130, ONE_LINE)
    rounds = {r["optimizer"]: r["step_ms"]["rounds"] for r in record["results"]}
    assert rounds == dict.fromkeys(NAMES, 3)
    assert record["notes"] == ["interrupted: only what was measured until then is here"]
    assert "torch fused" in out and record["notes"][0] in out


@pytest.mark.parametrize("resident", [True, False])
def test_a_step_without_a_whole_round_leaves_nothing(resident, run, shapes, monkeypatch):
    monkeypatch.setattr(step, "residency", lambda specs, job: (resident, 1))
    interrupt_at(monkeypatch, 5 + 2 + 1)
    code, record, out, error = run("step", *shapes, *FEW)
    assert (code, record, error) == (130, None, ONE_LINE) and "ms per step" not in out


def test_an_interrupt_between_turns_keeps_those_before(run, shapes, monkeypatch):
    monkeypatch.setattr(step, "residency", lambda specs, job: (False, 1))
    interrupt_at(monkeypatch, 5 + 2 * 5 + 1)  # a turn is 2 steps to warm up, and 3 that are timed
    code, record, *_ = run("step", *shapes, *FEW, "--seconds", "60")
    assert code == 130
    assert {r["step_ms"]["rounds"] for r in record["results"]} == {2}


def test_an_interrupted_host_keeps_whole_rounds(run, monkeypatch):
    monkeypatch.setattr(host, "no_interpreter", lambda: "left out")
    interrupt_at(monkeypatch, 3 + 3)
    code, record, *_ = run("host", "--tensors", "3,5", *FEW, "--seconds", "60")
    assert code == 130
    assert {(r["tensors"], r["step_us"]["rounds"]) for r in record["results"]} == {(3, 2)}


def test_an_interrupted_suite_keeps_the_part_under_way(run, monkeypatch):
    def interrupted(suite, own, progress):
        own.results.append({"check": "copy", "gb_per_s": timing.statistic([1.0])})
        raise KeyboardInterrupt

    monkeypatch.setitem(suite.PARTS, "verify", interrupted)
    code, record, out, error = run("suite", "--quick", *FEW)
    assert (code, error) == (130, ONE_LINE) and "copy bandwidth: 1.00" in out
    assert [part["command"] for part in record["results"]] == ["verify"]


def test_an_interrupted_demo_compares_the_steps_it_made(run, tmp_path, monkeypatch):
    """The step under way ends first, so that all runs have made as many."""
    train_step = demo.Run.train_step

    def interrupted(self, *batch):
        if self.name == demo.FUSED and len(self.losses) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        train_step(self, *batch)

    monkeypatch.setattr(demo.Run, "train_step", interrupted)
    picture = tmp_path / "demo.png"
    code, record, out, error = run("demo", "--device", "cpu", "--plot", str(picture))
    assert (code, error) == (130, ONE_LINE) and picture.stat().st_size > 10_000
    [result] = record["results"]
    assert result["steps"] == 2 and result["verdict"]["same_bits"]
    assert {len(own["losses"]) for own in result["runs"].values()} == {2}
    assert "interrupted: " in out and signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Inline:
    """A process pool that runs everything here, at once."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, call, *arguments):
        future = Future()
        future.set_result(call(*arguments))
        return future


@pytest.mark.parametrize("done, seeds", [(2, 0), (3, 1), (8, 2)])
def test_an_interrupted_convergence_keeps_complete_seeds(done, seeds, run, tmp_path, monkeypatch):
    def as_completed(futures):
        yield from list(futures)[:done]
        raise KeyboardInterrupt

    def train_run(name, steps, seed, device):
        losses = {"train_loss": 2.0, "validation_loss": 2.0 + 0.1 * seed, "curve": [3.0, 2.0]}
        return {**losses, "parameters": 10, "state_bytes": 8.0}

    monkeypatch.setattr(convergence, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(convergence, "as_completed", as_completed)
    monkeypatch.setattr(convergence, "train_run", train_run)
    picture = ["--plot", str(tmp_path / "picture.png")]
    code, record, out, error = run("convergence", "--precision", "split32", *picture)
    assert (code, error) == (130, ONE_LINE)
    if not seeds:
        assert record is None
        return
    assert record["arguments"]["seeds"] == seeds
    assert {len(result["validation_losses"]) for result in record["results"]} == {seeds}
    # One seed gives no limit, so there is no verdict; two do.
    assert record["results"][2]["passed"] is (None if seeds == 1 else True)
    assert "at most not known from" in out if seeds == 1 else "at most 0.1000 from" in out


# Time.


def test_a_quick_step_leaves_out_what_the_time_does_not_allow(run, monkeypatch):
    monkeypatch.setattr(step, "QUICK_LIMIT", -1.0)
    models = ["--model", "resnet50/64,gpt2/64"]
    code, record, out, _ = run("step", *models, *FEW, "--quick", "--seconds", "0.05")
    assert code == 0 and {r["model"] for r in record["results"]} == {"resnet50/64"}
    [left] = [entry for entry in record["left_out"] if entry["name"] == "gpt2/64"]
    assert left["reason"].startswith("no time left of ") and left["reason"] in out


@pytest.mark.parametrize("load, taken", [(0.1, True), (100.0, False)])
def test_a_quick_step_does_not_compile_on_a_busy_machine(load, taken, run, shapes, monkeypatch):
    measured = []
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(step, "measure", lambda recorder, specs, *_: measured.extend(specs))
    arguments = ["--device", "cpu", "--peers", "none", "--quick"]
    _, record, *_ = run("step", *shapes, *arguments)
    assert ("FusedAdamW compiled" in {spec.name for spec in measured}) == taken
    assert ("FusedAdamW compiled" in {e["name"] for e in record["left_out"]}) != taken
    measured.clear()
    run("step", *shapes, *arguments, "--backend", "compiled")
    assert {spec.backend for spec in measured} == {"compiled"}


def test_verify_checks_one_hash_however_slow_the_machine(run, monkeypatch):
    monkeypatch.setattr(verify, "STEPS", 30)
    monkeypatch.setattr(verify, "HASH_SECONDS", -1.0)
    monkeypatch.setattr(verify, "GLANCE_LIMIT", -1.0)
    code, record, out, _ = run("verify", "--device", "cpu")
    hashes = [result for result in record["results"] if result["check"] == "hash"]
    assert code == 0 and [(r["flatten"], r["same"]) for r in hashes] == [(False, True)]
    assert out.count("no time left after 0 of 30 steps") == 2 and "not measured: resnet50" in out


def test_help_does_not_wait_for_torch():
    code = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from bench import cli
for command in ((), *((name,) for name in cli.COMMANDS)):
    try:
        cli.main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "convergence" in done.stdout and "llama-3-8b" in done.stdout


@pytest.mark.parametrize("command", ["memory", "accuracy", "verify", "env", "demo", "convergence"])
def test_an_option_stands_only_where_it_acts(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--seconds", "3"])
    assert stop.value.code == 2 and "'--seconds' is not known" in capsys.readouterr().err


# Reports.


def test_a_report_of_nothing_says_what_it_needs(capsys):
    assert cli.main(["report"]) == 2
    said = "fused-adam-bench: error: report needs RECORD files, or a document with --update\n"
    assert capsys.readouterr() == ("", said)


@pytest.fixture
def record(run, shapes):
    return run("step", *shapes, *FEW, "--seconds", "0.01")[1]


@pytest.mark.parametrize(
    "change",
    [
        {"results": 3},
        {"results": [3]},
        {"results": [{}]},
        {"results": [{"optimizer": 1}]},
        {"machine": "mine"},
        {"machine": {}},
        {"left_out": [1]},
        {"notes": "none"},
        {"command": ["step"]},
        {"command": "host"},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [[], ["--markdown"], ["--plot"], ["--update"]], ids=str)
def test_a_record_of_wrong_types_is_named_in_one_line(change, how, record, tmp_path, capsys):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**record, **change}))
    document = tmp_path / "page.md"
    document.write_text("<!-- bench: broken.json -->\n<!-- /bench -->\n")
    more = {"--plot": [str(tmp_path / "x.png")], "--update": [str(document)]}
    arguments = [*how, *more.get(how[0] if how else "", [])]
    assert cli.main(["report", *([] if "--update" in how else [str(path)]), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "broken.json" in error


@pytest.mark.parametrize("output", ["closed", "nobody reads"])
def test_a_closed_output_is_one_line(output):
    path = ROOT / "bench" / "results" / "cpu-step.json"
    command = [sys.executable, "-m", "bench", "report", *[str(path)] * 40]
    if output == "closed":
        command = ["bash", "-c", 'exec "$@" >&-', "bash", *command]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    with process.stderr:
        error = process.stderr.read()
    assert process.wait() == 2
    assert error == "fused-adam-bench: error: standard output is closed\n"


# Pictures.


def texts_of(figure):
    axes = figure.axes
    legends = [text.get_text() for a in axes if a.get_legend() for text in a.get_legend().texts]
    return "\n".join([*legends, *(text.get_text() for text in figure.texts)])


@pytest.mark.parametrize(
    "device, rate, explained", [("cpu", 2.0, True), ("cpu", 0.5, False), ("cuda", 2.0, False)]
)
def test_bars_beyond_a_copy_explain_themselves(device, rate, explained, record):
    record["machine"]["device"] = device
    for result in record["results"]:
        result["copy_gb_per_s"] = result["ceiling_gb_per_s"] = timing.statistic([1.0])
        result["gb_per_s"] = timing.statistic([rate])
        result["share_of_copy"] = timing.statistic([rate])
    text = texts_of(plots.panel_figure([record]))
    assert "copy of a large buffer: 1.00 GB/s" in text
    assert ("an update in place does not" in text) == explained


def test_the_demos_picture_says_what_its_yardstick_is(run, tmp_path):
    picture = ["--plot", str(tmp_path / "demo.png")]
    _, record, *_ = run("demo", "--device", "cpu", "--steps", "2", *picture)
    text = texts_of(plots.demo_figure(record))
    assert "The yardstick is torch's AdamW" in text and "four float32 roundings" in text


def test_bytes_are_not_rounded():
    """3.125 bytes of state is a recipe's exact size; 3.12 is nobody's."""
    assert console.exact_bytes(3.125) == "3.125" and console.exact_bytes(8) == "8.000"
    text = (ROOT / "bench" / "results" / "cpu-recipes.json").read_text()
    record = json.loads(text)
    [upper, _] = plots.convergence_figure(record).axes
    labels = [label.get_text() for label in upper.get_yticklabels()]
    for label, result in zip(labels, record["results"], strict=True):
        assert label == f"{result['name']}, {result['state_bytes']:.4g} B"
        assert abs(float(label.split()[-2]) - result["state_bytes"]) < 5e-4
    assert torch.tensor([r["state_bytes"] for r in record["results"]]).min() < 3


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
