"""`convergence`: its training, its verdict, its table and picture. Training here is three
steps long.
"""

import copy
import dataclasses
import json
import math
import sys

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from bench import cli, convergence
from bench.harness import plots, session
from bench.harness.optimizers import peers
from bench.harness.results import read

NAMES = ["split32-bf16", "native-int8"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The command as a user runs it: exit code, record, picture."""
    folder = tmp_path_factory.mktemp("recipes")
    out, path = folder / "convergence.png", folder / "convergence.json"
    arguments = [
        "--steps",
        "3",
        "--seeds",
        "2",
        "--seed",
        "4",
        "--device",
        "cpu",
        "--plot",
        str(out),
        "--json",
        str(path),
    ]
    code = cli.main(["convergence", "--precision", ",".join(NAMES), *arguments])
    return code, read(path), out


def test_the_record_holds_what_was_trained(short_run):
    code, record, out = short_run
    assert (record["schema"], record["command"]) == ("fused-adam-bench/1", "convergence")
    assert record["arguments"] == {
        "precision": NAMES,
        "peers": [],
        "steps": 3,
        "quick": False,
        "seed": 4,
        "seeds": 2,
    }
    results = {result["name"]: result for result in record["results"]}
    assert list(results) == [convergence.FP32, convergence.BF16, *NAMES]
    assert [result["weights"] for result in results.values()] == [
        "float32",
        "bfloat16",
        "bfloat16",
        "float32",
    ]
    # 8-bit state: 2 bytes, and 2 scales of 2 bytes per 32 elements; every tensor here is a whole
    # number of groups.
    assert [result["state_bytes"] for result in results.values()] == [8, 4, 6, 2.125]
    assert all(result["state_bytes"] == result["stated_state_bytes"] for result in results.values())
    for result in results.values():
        assert (
            len(result["train_losses"])
            == len(result["validation_losses"])
            == len(result["curves"])
            == 2
        )
        for curve, loss in zip(result["curves"], result["train_losses"], strict=True):
            assert len(curve) == 3 and curve[2] < curve[0] and sum(curve) / 3 == pytest.approx(loss)
    assert code == (0 if all(results[name]["passed"] for name in NAMES) else 1)
    assert (
        out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and 10_000 < out.stat().st_size < 150_000
    )


def test_runs_share_weights_and_batches_and_differ_in_the_optimizer(short_run):
    """The first loss is before any step: equal in fp32, and in bf16, for one seed; other seeds have
    another.
    """
    first = {
        result["name"]: [curve[0] for curve in result["curves"]]
        for result in short_run[1]["results"]
    }
    last = {
        result["name"]: [curve[2] for curve in result["curves"]]
        for result in short_run[1]["results"]
    }
    assert (
        first[convergence.FP32] == first["native-int8"]
        and first[convergence.BF16] == first["split32-bf16"]
    )
    assert first[convergence.FP32] == pytest.approx(first[convergence.BF16], abs=1e-3)
    assert first[convergence.FP32][0] != first[convergence.FP32][1]
    assert len({tuple(losses) for losses in last.values()}) == 4
    assert last[convergence.FP32] == pytest.approx(last["native-int8"], abs=1e-3)


def test_a_run_repeats_in_every_bit_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    one, two = (convergence.train_run("sr-bf16", 2, 0, torch.device("cpu")) for _ in range(2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), before)


def losses(**validation):
    return [
        {"name": name.replace("_", " "), "validation_losses": values}
        for name, values in {
            "torch_AdamW_fp32": [2.0, 2.1],
            "torch_AdamW_bf16": [2.3, 2.5],
            **validation,
        }.items()
    ]


@pytest.mark.parametrize(
    ("validation", "passed"),
    [
        ([2.0, 2.1], True),
        ([2.09, 2.2], True),
        ([2.1, 2.21], False),  # further than 0.1 from fp32's mean
        ([1.9, 1.99], False),
        ([2.0, math.nan], False),
        ([math.inf, 2.0], False),
    ],
)
def test_the_limit_is_what_lies_between_seeds(validation, passed):
    results = losses(ours=validation)
    convergence.add_verdicts(results)
    assert [result["passed"] for result in results] == [None, None, passed]
    assert results[2]["limit"] == pytest.approx(0.1)
    assert [result["within_limit"] for result in results] == [True, False, passed]


def test_a_recipe_that_is_worse_than_plain_bf16_fails():
    results = losses(ours=[2.03, 2.1])
    results[1]["validation_losses"] = [2.02, 2.1]
    convergence.add_verdicts(results)
    assert results[2]["within_limit"] and not results[2]["passed"]


def test_a_recipe_that_fails_is_shown_and_fails_the_command(
    short_run, tmp_path, monkeypatch, capsys
):
    results = copy.deepcopy(short_run[1]["results"])
    for result in results:
        result["curves"] = [[3.0, 2.0, math.nan]] * 2
    results[1]["validation_losses"] = results[0]["validation_losses"]
    results[2]["validation_losses"] = [9.0, math.nan]
    results[3]["validation_losses"] = [9.0, 9.0]
    convergence.add_verdicts(results)
    monkeypatch.setattr(convergence, "train", lambda *args: results)
    path, out = tmp_path / "failed.json", tmp_path / "failed.png"
    assert (
        cli.main(
            ["convergence", "--precision", "split32-bf16", "--plot", str(out), "--json", str(path)]
        )
        == 1
    )
    printed = capsys.readouterr().out
    assert (
        printed.count("FAIL") == 2
        and "not finite" in printed
        and "does not tell good from bad" in printed
    )
    assert json.loads(path.read_text())["results"][2]["validation_losses"] == [9.0, None]
    assert out.stat().st_size > 10_000


def test_all_means_the_recommended_ones(monkeypatch):
    asked = []
    monkeypatch.setattr(convergence, "train", lambda *args: asked.append(args[:3]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["convergence", "--precision", "sr-bf16,all", "--device", "cpu"])
    names, steps, seeds = asked[0]
    assert names[:3] == (convergence.FP32, convergence.BF16, "sr-bf16")
    assert sorted(names[2:]) == sorted(convergence.RECOMMENDED)
    assert (steps, list(seeds)) == (convergence.STEPS, [0, 1, 2]) == (1000, [0, 1, 2])


def test_report_shows_the_table_of_a_record(short_run):
    [table] = convergence.tables(short_run[1])
    assert [row[0] for row in table.rows] == [convergence.FP32, convergence.BF16, *NAMES]
    assert [row[2] for row in table.rows] == ["8.000", "4.000", "6.000", "2.125"]
    losses = short_run[1]["results"][2]["validation_losses"]
    mean, half = sum(losses) / 2, abs(losses[0] - losses[1]) / 2
    assert table.rows[2][5] == f"{mean:.4f} ±{half:.4f}"


def test_without_matplotlib_there_is_no_picture(short_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convergence, "train", lambda *args: short_run[1]["results"])
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(plots, "draw", None)
    cli.main(["convergence", "--precision", "sr-bf16", "--plot", str(tmp_path / "none.png")])
    assert "because matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--precision", "split23"],
            "argument --precision: precision='split23' is no recipe; did you mean",
        ),
        (
            ["--precision", "all", "--seeds", "1"],
            "argument --seeds: '1' is not a whole number from 2 to 100",
        ),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["convergence", *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


# --- Other projects' optimizers


@pytest.fixture
def peer(monkeypatch):
    """A stand-in for what is not installed here: torch's AdamW, under another project's name."""

    def make(groups, options):
        return torch.optim.AdamW(groups, lr=options.lr)

    name = "bitsandbytes-8-bit"
    spec = dataclasses.replace(peers()[name], make=make)
    monkeypatch.setattr(convergence, "peers", lambda: {name: spec})
    return name


def test_a_peer_trains_fp32_weights_beside_ours(peer):
    result = convergence.train_run(peer, 2, 0, torch.device("cpu"))
    expected = convergence.train_run(convergence.FP32, 2, 0, torch.device("cpu"))
    assert result == expected


def test_a_peer_is_compared_but_not_judged(peer):
    run = convergence.train_run(peer, 1, 0, torch.device("cpu"))
    names = (convergence.FP32, convergence.BF16, "native-int8", peer)
    runs = {
        (name, seed): run | {"validation_loss": 2.0 + seed} for name in names for seed in (0, 1)
    }
    results = convergence.summaries(names, runs, (0, 1))
    assert [result["passed"] for result in results] == [None, None, True, None]
    record = {"results": results, "arguments": {"steps": 1, "seeds": 2}}
    [table] = convergence.tables(record)
    assert (table.rows[3][0], table.rows[3][3], table.rows[3][7]) == (peer, "-", "-")
    upper, lower = plots.convergence_figure(record).axes
    assert upper.get_yticklabels()[3].get_text().startswith(peer)
    legend = [text.get_text() for text in lower.get_legend().get_texts()]
    assert legend == [convergence.BF16, "each of the recipes", "8-bit optimizers of other projects"]


def test_a_peer_that_is_not_there_is_refused(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cli.main(["convergence", "--peers", "apex"])
    error = capsys.readouterr().err
    assert "argument --peers: 'apex' is not one of bitsandbytes-8-bit, torchao-8-bit" in error
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SystemExit):
        cli.main(["convergence", "--peers", "bitsandbytes-8-bit"])
    assert "bitsandbytes-8-bit: not installed: pip install bits" in capsys.readouterr().err


def test_state_is_measured_as_it_is_stored():
    """What several parameters share counts once, and wrappers count what they hold."""
    p = torch.nn.Parameter(torch.zeros(64))
    q = torch.nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.SGD([p, q])
    table = torch.zeros(256)
    for param in (p, q):
        codes = TwoTensor(torch.zeros(64), torch.zeros(64))
        optimizer.state[param] = {"step": torch.zeros(()), "codes": codes, "table": table}
    assert convergence.held_bytes(optimizer) == 2 * 2 * 64 * 4 + 256 * 4
