"""`bench train`, on a model that takes no package."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import cli, train

TINY = ("train", "--device", "cpu", "--model", "tiny", "--steps", "3")


class Bigrams(nn.Module):
    """The next token from the one before; called as transformers' models are."""

    def __init__(self, dtype):
        super().__init__()
        self.embedding = nn.Embedding(50257, 8, dtype=dtype)
        self.head = nn.Linear(8, 50257, dtype=dtype)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids))[:, :-1].float()
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


@pytest.fixture
def bigrams(monkeypatch):
    def make_model(model, dtype, seed, device):
        torch.manual_seed(seed)
        return Bigrams(dtype)

    monkeypatch.setattr(train, "make_model", make_model)
    monkeypatch.setattr(train, "CHARACTERS", 20_000)
    quick = dataclasses.replace(train.MODELS["tiny"], lr=0.05)  # learns within a few steps
    monkeypatch.setitem(train.MODELS, "tiny", quick)


def test_every_optimizer_trains_the_same_model(bigrams, run):
    precision = ("--precision", "none,split24-int8")
    code, record, said = run(*TINY[:-1], "40", "--peers", "torch-fused", *precision)
    assert code == 0
    torchs, ours, recipe = record["results"]
    assert [row["optimizer"] for row in record["results"]] == [
        "torch fused",
        "FusedAdamW",
        "FusedAdamW split24-int8",
    ]
    assert [row["weights"] for row in record["results"]] == ["float32", "float32", "bfloat16"]
    assert torchs["state_bytes"] == ours["state_bytes"] == 8
    assert recipe["state_bytes"] == pytest.approx(3.125, abs=0.001)
    assert ours["loss"] == pytest.approx(torchs["loss"], rel=1e-4)
    learned = torchs["first_loss"] - torchs["loss"]
    assert learned > 1 and ours["tokens_per_s"]["median"] > 0
    # Its model computes in bfloat16 throughout, and not only inside autocast.
    assert recipe["loss"] == pytest.approx(torchs["loss"], abs=learned / 10)
    assert "tiny: 854,369 parameters, 40 steps of 128 tokens" in said


def test_steps_in_backward_change_no_loss(bigrams, run):
    usual = run(*TINY)[1]["results"][0]
    code, record, said = run(*TINY, "--in-backward")
    assert code == 0 and "FusedAdamW, in backward" in said
    assert record["results"][0]["loss"] == usual["loss"]


def test_what_memory_does_not_hold_is_left_out(bigrams, run, monkeypatch):
    make = train.make_optimizer

    def fails(name, *arguments):
        if name == "torch fused":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(name, *arguments)

    monkeypatch.setattr(train, "make_optimizer", fails)
    code, record, said = run(*TINY, "--peers", "torch-fused")
    assert code == 0 and [row["optimizer"] for row in record["results"]] == ["FusedAdamW"]
    assert "not measured: torch fused, tiny: OutOfMemoryError: CUDA out of memory" in said


def test_what_is_missing_or_not_known_is_named(capsys, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "CHARACTERS", 20_000)
    assert cli.main([*TINY]) == 2
    assert "train needs transformers: pip install transformers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--model", "gpt5"])
    assert "'gpt5' is not known; allowed: gpt2, llama-3-8b, tiny" in capsys.readouterr().err
    assert list(train.MODELS) == list(cli.TRAINED)
