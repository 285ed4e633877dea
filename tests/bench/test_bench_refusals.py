"""Arguments and files that the benchmark refuses, named in one line."""

import json

import pytest
import torch
from tiny_bench import FEW

from bench import cli

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
