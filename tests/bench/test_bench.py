"""The demo: its verdict, its text, its picture and its command line. Training here is three steps
long.
"""

import json
import math
import sys
import sysconfig
from dataclasses import replace

import pytest
import torch

from bench import cli, demo
from bench.harness import gpt, plots, results, session
from bench.harness.corpus import LIMIT_CHARACTERS, draw_batch, load_corpus, read_text
from bench.harness.oracle import MARGIN, compare_losses, loss_tolerances, resolution

STEPS = 60
REFERENCE = [2 + 2 * math.exp(-step / 20) for step in range(STEPS)]
YARDSTICK = [loss + 1e-6 * math.sin(step) for step, loss in enumerate(REFERENCE)]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The command as a user runs it, three steps long: exit code, picture, record, outcome."""
    folder = tmp_path_factory.mktemp("demo")
    out, record = folder / "curves.png", folder / "record.json"
    outcomes = []
    train = demo.train

    def keep(*args):
        outcomes.append(train(*args))
        return outcomes[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "train", keep)
        code = cli.main(
            [
                "demo",
                "--steps",
                "3",
                "--seed",
                "1",
                "--device",
                "cpu",
                "--plot",
                str(out),
                "--json",
                str(record),
            ]
        )
    return code, out, json.loads(record.read_text()), outcomes[0]


def test_equal_losses_agree():
    verdict = compare_losses(REFERENCE, REFERENCE, YARDSTICK)
    assert verdict.agree and verdict.ratio == 0


def test_losses_off_by_less_than_the_yardstick_agree():
    near = [loss + 1e-6 * math.cos(step) for step, loss in enumerate(REFERENCE)]
    assert compare_losses(REFERENCE, near, YARDSTICK).agree


def test_one_step_beyond_the_tolerance_fails_and_is_named():
    limit = loss_tolerances(REFERENCE, YARDSTICK)[29]
    for factor, agree in ((0.99, True), (1.01, False)):
        found = list(REFERENCE)
        found[29] += factor * limit
        verdict = compare_losses(REFERENCE, found, YARDSTICK)
        assert verdict.agree is agree
        assert verdict.step == 30 and verdict.ratio == pytest.approx(factor, rel=1e-3)


def test_a_drift_fails_early():
    """A difference that grows is caught where the tolerance is still small, whatever the yardstick
    does later.
    """
    wild_end = [*YARDSTICK[:-1], YARDSTICK[-1] + 1]
    drift = [loss + 1e-6 * step for step, loss in enumerate(REFERENCE)]
    verdict = compare_losses(REFERENCE, drift, wild_end)
    assert not verdict.agree and verdict.step < STEPS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1], ids=["reference", "candidate"])
def test_losses_that_are_not_finite_never_agree(bad, where):
    curves = [list(REFERENCE), list(REFERENCE)]
    curves[where][5] = bad
    assert not compare_losses(*curves, YARDSTICK).agree


def test_the_tolerance_never_shrinks_below_the_losses_own_digits():
    assert loss_tolerances([3.0], [3.0]) == [MARGIN * 2 * 2**-22]
    for loss in (0.7, 1.0, 2.3, 4.4):
        number = torch.tensor(loss)
        assert resolution(float(number)) == float(
            torch.nextafter(number, torch.tensor(math.inf)) - number
        )


@pytest.mark.parametrize("lengths", [(0, 0, 0), (2, 1, 2), (2, 2, 3)])
def test_curves_of_other_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match=f"{lengths[0]}, {lengths[1]} and {lengths[2]} losses"):
        compare_losses(*([1.0] * length for length in lengths))


def test_the_text_is_long_and_always_the_same():
    corpus, again = load_corpus(), load_corpus()
    assert torch.equal(corpus.train, again.train) and torch.equal(
        corpus.validation, again.validation
    )
    assert corpus.characters == again.characters and corpus.characters.isascii()
    assert len(corpus.train) + len(corpus.validation) == LIMIT_CHARACTERS
    assert 60 < len(corpus.characters) < 128
    assert int(corpus.train.max()) == len(corpus.characters) - 1
    whole = read_text()
    assert "".join(corpus.characters[i] for i in corpus.train[:1000]) == whole[:1000]
    assert read_text(1000) == whole[:1000]


def test_targets_are_the_next_characters():
    numbers = torch.arange(50)
    inputs, targets = draw_batch(numbers, 64, 10, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (64, 10)
    assert torch.equal(inputs + 1, targets)
    assert int(targets.max()) == 49 and int(inputs.min()) == 0


def test_a_python_without_sources_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert cli.main(["demo", "--steps", "1"]) == 2
    assert f"the folder {tmp_path} has no Python source files" in capsys.readouterr().err


def test_the_demo_passes_and_writes_what_it_says(short_run):
    code, out, record, _ = short_run
    assert code == 0
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000
    assert (record["schema"], record["command"]) == ("fused-adam-bench/1", "demo")
    assert set(record["machine"]["versions"]) >= {"fused_adam", "torch", "python"}
    [record] = record["results"]
    assert set(record) == {"device", "seed", "steps", "parameters", "runs", "verdict"}
    assert (record["seed"], record["steps"]) == (1, 3) and 1e6 < record["parameters"] < 3e6
    assert set(record["runs"]) == {demo.TORCH, demo.FUSED, demo.FLAT, demo.YARDSTICK}
    for run in record["runs"].values():
        assert len(run["losses"]) == 3 and run["losses"][2] < run["losses"][0]
        assert 0 < run["optimizer_ms"] < run["step_ms"] and 0 < run["optimizer_share"] < 1
        assert 8 * record["parameters"] < run["state_bytes"] < 8.01 * record["parameters"]
        assert math.isfinite(run["train_loss"]) and math.isfinite(run["validation_loss"])
    verdict = record["verdict"]
    assert (
        verdict["passed"]
        and verdict["agree"]
        and verdict["same_bits"]
        and 0 <= verdict["ratio"] <= 1
    )


def test_the_demo_leaves_torch_as_it_was():
    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
        )

    before = settings()
    with gpt.determinism():
        torch.manual_seed(5)
        assert torch.are_deterministic_algorithms_enabled()
    assert settings() == before


def test_one_changed_bit_is_found(short_run):
    outcome = short_run[3]
    fused, flat = outcome.runs[demo.FUSED], outcome.runs[demo.FLAT]
    assert demo.same_bits(fused, flat)
    assert not demo.same_bits(fused, outcome.runs[demo.TORCH])
    for tensor in (flat.model.blocks[0].norm1.bias, gpt.state_tensors(flat.optimizer)[-2]):
        with torch.no_grad():
            before = tensor.clone()
            tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(math.inf))
            assert not demo.same_bits(fused, flat)
            tensor.copy_(before)
    assert demo.same_bits(fused, flat)


def test_a_wrong_optimizer_fails_the_demo(tmp_path, monkeypatch, capsys):
    # One in ten thousand is within the tolerance of three steps on some texts, and each Python's
    # library is another.
    class OffByOneInAThousand(torch.optim.AdamW):
        def __init__(self, groups, lr, flatten):
            super().__init__(groups, lr=lr * (1.001 if flatten else 1.002))

    monkeypatch.setattr(demo, "FusedAdamW", OffByOneInAThousand)
    assert (
        cli.main(["demo", "--steps", "3", "--device", "cpu", "--plot", str(tmp_path / "wrong.png")])
        == 1
    )
    printed = capsys.readouterr().out
    assert "DOES NOT AGREE" in printed and "DIFFER IN BITS" in printed


def test_without_rich_progress_and_table_are_plain(short_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(demo, "train", lambda *args: args[-1]("step 3/3", 1.0) or short_run[3])
    monkeypatch.setattr(session, "draw", lambda *args: None)
    assert cli.main(["demo", "--steps", "3", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demo: step 3/3" and lines[2].startswith("run ")
    assert [line.split("  ")[0] for line in lines[3:6]] == [demo.TORCH, demo.FUSED, demo.FLAT]


def test_without_matplotlib_the_demo_says_so(short_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(demo, "train", lambda *args: short_run[3])
    out = tmp_path / "none.png"
    assert cli.main(["demo", "--plot", str(out)]) == 0
    assert "because matplotlib is not installed" in capsys.readouterr().out and not out.exists()


@pytest.mark.parametrize("end", [9.0, math.nan], ids=["drift", "nan"])
def test_the_picture_shows_failures_too(end, short_run, tmp_path):
    """So do the record and the table, which tell what a loss that is not finite is."""
    runs = dict(short_run[3].runs)
    runs[demo.FUSED] = replace(runs[demo.FUSED], losses=[*runs[demo.FUSED].losses[:2], end])
    losses = (runs[name].losses for name in (demo.TORCH, demo.FUSED, demo.YARDSTICK))
    comparison = compare_losses(*losses)
    assert not comparison.agree and comparison.step == 3
    outcome = replace(short_run[3], runs=runs, comparison=comparison, same_bits=False)
    recorder = results.Recorder("demo", {}, torch.device("cpu"), [demo.result(outcome)])
    out, path = tmp_path / "failed.png", tmp_path / "failed.json"
    results.write(recorder.record(), path)
    plots.draw([results.read(path)], out)
    assert out.stat().st_size > 10_000
    [table] = demo.tables(results.read(path))
    assert ("not finite" in table.rows[1][1]) == math.isnan(end)
    assert "DOES NOT AGREE" in table.notes[1]


def test_smoothing_keeps_length_ends_and_straight_lines():
    assert plots.smooth([1.0], 15) == [1.0]
    line = [float(i) for i in range(40)]
    assert plots.smooth(line, 15)[:33] == pytest.approx(line[:33])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1 to 1000000"),
        (["--steps", "many"], "argument --steps: 'many' is not a whole number from 1 to 1000000"),
        (["--seed", "-1"], "argument --seed"),
        (["--device", "gpu"], "argument --device: 'gpu' is not known; allowed: auto, cpu, cuda"),
        (
            ["--plot", "demo.jpg"],
            "argument --plot: 'demo.jpg' is not a file name that ends in .png",
        ),
        (
            ["--plot", "no/such/demo.png"],
            "argument --plot: 'no/such/demo.png' cannot be written: the folder 'no/such'",
        ),
        (
            ["--json", "record.txt"],
            "argument --json: 'record.txt' is not a file name that ends in .json",
        ),
        (
            ["--step", "3"],
            "'--step' is not known; allowed: -h, --help, --device, --json, --plot, --steps, --seed",
        ),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_named_with_what_is_allowed(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["dmeo"])
    assert stop.value.code == 2
    assert "'dmeo' (choose from" in capsys.readouterr().err
