"""`accuracy`, `env` and `verify` of the benchmark through their real entry point, tiny."""

import torch
from tiny_bench import ONE, TWO, by_name

from bench import accuracy, verify
from bench.harness import shapes as shapes_module


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
