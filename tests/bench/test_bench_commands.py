"""The benchmark's measuring commands through their real entry point, tiny. No time is asserted."""

import pytest
import torch
from tiny_bench import FEW, ONE, TWO, by_name

from bench import cli
from bench.harness import optimizers, rotation


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


@pytest.mark.parametrize("command", ["step", "memory"])
def test_averages_beside_torchs(command, run, shapes):
    """Ours keeps them in the step; after torch's step AveragedModel reads the parameters again."""
    few = FEW if command == "step" else ONE
    code, record, out = run(command, *shapes, *few, *TWO, "--ema", "0.99")
    assert code == 0 and "float32, weights averaged" in out
    results = by_name(record)
    assert {"FusedAdamW reference", "torch fused"} <= set(results)
    for name, result in results.items():
        assert result["ema"] == 0.99
        ours = name.startswith("FusedAdamW")
        if command == "step":
            moved = 36 if ours else 40
            assert (result["held_bytes"], result["moved_bytes"]) == (12, moved)
        else:
            assert result["state_bytes"] == 12


def test_a_decay_of_averages_is_at_least_0_and_below_1(run, capsys):
    with pytest.raises(SystemExit):
        run("step", "--ema", "1")
    assert "'1' is not a number of at least 0 and below 1" in capsys.readouterr().err


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
