"""What the benchmark measures with: shapes, the float64 formula, the parity gate, statistics,
tables, the hash.
"""

import io
import json
import math
import pathlib
import re

import pytest
import torch

from bench import cli, step, suite, verify
from bench.harness import (
    console,
    launches,
    machine,
    optimizers,
    oracle,
    results,
    rotation,
    timing,
    workload,
)
from bench.harness.optimizers import Case
from bench.harness.oracle import AdamWOptions as Options
from bench.harness.shapes import numel, read_hf_config, shapes_of

ROOT = pathlib.Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, parameters, tensors",
    [
        ("gpt2", 124_439_808, 148),
        ("gpt2-xl", 1_557_611_200, 580),
        ("llama-3-8b", 8_030_261_248, 291),
        ("resnet50", 25_557_032, 161),
        ("vit-b16", 86_567_656, 152),
        ("one-big", 1_000_000_000, 1),
    ],
)
def test_models_have_their_published_sizes(name, parameters, tensors):
    shapes = shapes_of(name)
    assert (numel(shapes), len(shapes)) == (parameters, tensors)


def test_many_small_is_what_it_says_and_the_same_everywhere():
    sizes = [math.prod(shape) for shape in shapes_of("many-small")]
    assert len(sizes) == 2000 and 1 <= min(sizes) < 10 and 4000 < max(sizes) <= 4096
    assert sum(sizes) == 4_083_135


def test_a_shard_is_the_first_of_equal_parts():
    whole, eighth = shapes_of("llama-3-8b"), shapes_of("llama-3-8b/8")
    for shape, part in zip(whole, eighth, strict=True):
        assert part == tuple(torch.empty(shape, device="meta").chunk(8)[0].shape)
    assert numel(eighth) == numel(whole) // 8
    assert shapes_of("gpt2/1") == shapes_of("gpt2")


def transformer(width, blocks, inner):
    return {"hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": inner}


CONFIGS = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
    },
    "llama-3-8b": {
        **transformer(4096, 32, 14336),
        "model_type": "llama",
        "vocab_size": 128256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "vit-b16": {
        **transformer(768, 12, 3072),
        "model_type": "vit",
        "patch_size": 16,
        "image_size": 224,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_gives_the_shapes_of_the_model_it_describes(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    assert read_hf_config(tmp_path) == read_hf_config(tmp_path / "config.json") == shapes_of(name)


def test_a_qwen_config_counts_biases_and_ties(tmp_path):
    """Qwen2-0.5B: 494,032,768 parameters."""
    config = {
        **transformer(896, 24, 4864),
        "model_type": "qwen2",
        "vocab_size": 151936,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert numel(read_hf_config(tmp_path)) == 494_032_768


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_oracle_is_torchs_formula(amsgrad):
    """In float64, with coupled and decoupled decay, forwards and backwards."""
    start = torch.randn(50, dtype=torch.float64)
    grads = [torch.randn(50, dtype=torch.float64) * 0.1**t for t in range(6)]
    for decoupled, maximize in ((False, True), (True, False)):
        options = oracle.Options(0.1, (0.8, 0.99), 1e-8, 0.1, decoupled, amsgrad, maximize)
        param = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([param], foreach=False, **options.arguments())
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        truth = oracle.adam(start, grads, options)
        torch.testing.assert_close(param.detach(), truth["param"], rtol=1e-12, atol=1e-14)
        for name, value in optimizer.state[param].items():
            if name != "step":
                torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-30)


def test_the_formula_clips_as_torch_does():
    params = [torch.nn.Parameter(torch.randn(20, dtype=torch.float64)) for _ in range(2)]
    grads = [torch.randn(20, dtype=torch.float64) for _ in params]
    truth = oracle.adam_model(params, [grads], Options(lr=0.1, clip=0.5, eps=1.0))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    torch.optim.AdamW(params, lr=0.1, eps=1.0).step()
    for param, expected in zip(params, truth, strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=0)


def wrong(**changes):
    """torch's AdamW with arguments that nobody asked for."""

    def make(params, options):
        arguments = {**optimizers.torch_arguments(options), "fused": True}
        for name, change in changes.items():
            arguments[name] = change(arguments[name])
        return torch.optim.AdamW(params, **arguments)

    return optimizers.OptimizerSpec("wrong", optimizers.OTHER, make)


class Lazy(torch.optim.AdamW):
    def step(self, closure=None):
        """Changes nothing."""


WRONG = {
    "lr": wrong(lr=lambda lr: 1.5 * lr),
    "no decay": wrong(weight_decay=lambda wd: 0.0),
    "beta1": wrong(betas=lambda betas: (0.5, betas[1])),
    "beta2": wrong(betas=lambda betas: (betas[0], 0.5)),
    "does nothing": optimizers.OptimizerSpec(
        "wrong", optimizers.OTHER, lambda params, options: Lazy(params, lr=options.lr)
    ),
}
RIGHT = ["torch-fused", "torch-foreach", "torch-single"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fault", WRONG)
def test_the_gate_stops_a_wrong_optimizer(fault, dtype):
    verdict = workload.check_parity(WRONG[fault], Case(CPU, dtype, dtype))
    assert not verdict.passed and "wrong: after 5 steps" in verdict.text


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gate_lets_right_ones_pass(dtype, amsgrad):
    case = Case(CPU, dtype, dtype, Options(amsgrad=amsgrad))
    for spec in (
        optimizers.ours("reference", flatten=True),
        *(optimizers.peers()[name] for name in RIGHT),
    ):
        assert workload.check_parity(spec, case).passed, spec.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gate_sees_a_missing_maximum_and_a_missing_clip(dtype):
    assert not workload.check_parity(
        wrong(amsgrad=lambda _: False), Case(CPU, dtype, dtype, Options(amsgrad=True))
    ).passed
    unclipped = optimizers.OptimizerSpec(
        "wrong", optimizers.OTHER, optimizers.peers()["torch-fused"].make, clips=True
    )
    case = Case(CPU, dtype, dtype, Options(clip=0.01))
    assert not workload.check_parity(unclipped, case).passed
    assert workload.check_parity(optimizers.ours("reference", False), case).passed
    assert workload.check_parity(optimizers.peers()["torch-fused"], case).passed


def test_statistics_and_ratios():
    assert timing.statistic([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "low": 1.5,
        "high": 2.5,
        "rounds": 3,
    }
    assert timing.statistic([5.0]) == {"median": 5.0, "low": 5.0, "high": 5.0, "rounds": 1}
    # Round by round: a slow second round hits both, and leaves the ratio alone.
    assert timing.ratio([2.0, 20.0], [1.0, 10.0]) == {
        "median": 2.0,
        "low": 2.0,
        "high": 2.0,
        "rounds": 2,
    }


def test_rounds_are_interleaved_and_bounded():
    calls = []
    measures = {name: lambda name=name: calls.append(name) or 0.0 for name in "ab"}
    samples = timing.interleaved(measures, seconds=1e-9, min_rounds=3)
    assert calls == ["a", "b"] * 3 and {name: len(values) for name, values in samples.items()} == {
        "a": 3,
        "b": 3,
    }
    assert len(timing.interleaved(measures, seconds=1e9, max_rounds=4)["a"]) == 4


def test_stubbed_steps_launch_nothing_and_others_do():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    made = workload.instantiate(optimizers.ours("triton", flatten=False), [param], Case(CPU))
    with launches.stubbed_launches():
        made.step()
    assert (param == 1).all() and float(made.optimizer.state[param]["step"]) == 0
    other = torch.nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    workload.instantiate(optimizers.ours("triton", flatten=False), [other], Case(CPU)).step()
    assert (other < 1).all()


def test_flat_buffers_have_the_gradients_they_were_given():
    """As in a training loop, where backward writes into the buffers: nothing is copied there."""
    params = workload.make_params([(5,), (3, 2)], Case(CPU))
    before = [param.grad.clone() for param in params]
    made = workload.instantiate(optimizers.ours("reference", flatten=True), params, Case(CPU))
    assert all(
        torch.equal(p.grad, g) and g.abs().sum() > 0
        for p, g in zip(made.params, before, strict=True)
    )
    grads = [param.grad for param in made.params]
    assert made.optimizer._engine.flat.in_buffers(made.params, grads) == (0, 1)


def test_graphs_are_for_those_whose_steps_count_on_in_them():
    recorder = results.Recorder("step", {}, CPU)
    job = rotation.Job("small", [(5,)], Case(CPU), "graph")
    specs = [optimizers.ours("reference", False), optimizers.peers()["torch-fused"], WRONG["lr"]]
    assert step.passing(specs, job, recorder) == specs[:2]
    assert recorder.left_out[0]["reason"] == "its step cannot be captured in a CUDA graph"
    job.mode = "eager"
    assert step.passing(specs, job, recorder) == specs[:2]
    assert recorder.left_out[1]["reason"].startswith("wrong: ")


def test_bytes_of_mixed_dtypes():
    """bf16 parameters and state, fp32 gradients: 2 * 2 + 2 * 4 + 4 moved, once more the gradients
    to clip.
    """
    case = Case(CPU, torch.bfloat16, torch.float32)
    made = workload.instantiate(
        optimizers.ours("reference", False), workload.make_params([(100,)], case), case
    )
    made.step()
    assert made.state_bytes() == 400
    assert (made.moved_bytes(clip=False), made.moved_bytes(clip=True)) == (1600, 2000)


def test_the_access_pattern_kernel_moves_every_element():
    from bench.harness.stream import BLOCK, move

    p, g, m, v = (torch.full((2 * BLOCK,), value) for value in (1.0, 2.0, 3.0, 4.0))
    assert move(p, g, m, v) == 7 * 4 * 2 * BLOCK
    assert (p == 2).all() and (g == 2).all() and (m == 4).all() and (v == 4).all()
    with pytest.raises(ValueError, match="multiple of"):
        move(*(x[:-1] for x in (p, g, m, v)))


def test_the_sweep_changes_launch_sizes_and_the_ceiling_is_measured():
    configs = [(2048, 4), (8192, 8)]
    found = suite.measure_sweep(CPU, "small", [(5000,)], configs, seconds=0.01, repeats=1)
    assert [(row["block"], row["num_warps"]) for row in found] == configs
    assert all(row["step_ms"]["median"] > 0 and row["gb_per_s"]["median"] > 0 for row in found)
    # Three blocks against one: the interpreter pays per program.
    assert suite.measure_ceiling(CPU, 16384, seconds=0.01)["gb_per_s"]["median"] > 0


def test_the_hash_is_of_every_step():
    few = verify.SHORT_STEPS
    assert verify.trained_digest(few, CPU, "reference", True) == verify.SHORT_HASH
    assert verify.trained_digest(few - 1, CPU, "reference", True) != verify.SHORT_HASH


def test_the_hash_stands_in_one_file_of_the_code():
    files = [
        path for part in ("bench", "fused_adam", "tests") for path in (ROOT / part).rglob("*.py")
    ]
    for hashed in verify.HASHES.values():
        assert [path.name for path in files if hashed in path.read_text()] == ["verify.py"]


def test_the_command_line_names_every_optimizer():
    """It lists them without importing torch."""
    assert tuple(optimizers.peers()) == cli.PEERS


def test_the_extra_installs_what_the_registry_says():
    [line] = re.findall(r"^bench-peers = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    extra = re.findall(r'"([^"]+)"', line)
    reasons = []
    for spec in optimizers.peers().values():
        try:
            spec.make([torch.nn.Parameter(torch.zeros(1))], Options())
        except ImportError as error:
            reasons.append(str(error))
        except Exception:
            reasons.append("")
    wanted = {reason.split()[-1] for reason in reasons if "pip install" in reason}
    need_a_compiler = {"transformer-engine[pytorch]", "deepspeed"}
    assert wanted - need_a_compiler <= set(extra) and len(extra) == 4


def test_ours_are_named_by_what_they_do():
    names = [spec.name for spec in optimizers.variants(CPU, None, None)]
    assert names == [
        "FusedAdamW",
        "FusedAdamW flatten",
        "FusedAdamW compiled",
        "FusedAdamW compiled flatten",
    ]
    assert [spec.name for spec in optimizers.variants(CPU, "triton", True)] == [
        "FusedAdamW triton flatten"
    ]


def test_the_machine_is_described():
    found = machine.describe(CPU)
    assert found["cores"] >= 1 and found["memory_bytes"] > 1e8 and found["cache_bytes"] >= 1 << 15
    assert set(found["versions"]) >= {"fused_adam", "torch", "python"}
    assert found["versions"]["torch"] in machine.line(found)
    json.dumps(found)


class Terminal(io.StringIO):
    def isatty(self):
        return True


TABLE = console.Table(
    "title",
    ["optimizer", "ms per step", "state B/param."],
    [["ours", "1.00 ±2%", "3.125"], ["theirs", "12.0", "8.000"]],
    ["a note"],
)


def printed(table, file):
    console.Screen(file).table(table)
    return file.getvalue().splitlines()


def test_a_table_is_plain_text_in_aligned_columns():
    lines = [
        "title",
        "optimizer  ms per step  state B/param.",
        "ours          1.00 ±2%           3.125",
        "theirs            12.0           8.000",
        "a note",
    ]
    assert printed(TABLE, io.StringIO()) == printed(TABLE, Terminal()) == lines


@pytest.mark.parametrize("width", [10, 19, 26, 29, 30, 37, 38, 60])
def test_no_terminal_is_too_narrow_for_a_number(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = printed(TABLE, Terminal())
    for row in TABLE.rows:
        assert all(any(cell in line for line in lines) for cell in row)
    assert width < 19 or max(map(len, lines)) <= width  # the longest row name and one number


def test_column_names_break_into_words_and_then_columns_into_blocks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    words = ["             ms per     state", "optimizer      step  B/param."]
    assert printed(TABLE, Terminal())[1:] == [
        *words,
        "ours       1.00 ±2%     3.125",
        "theirs         12.0     8.000",
        "a note",
    ]
    monkeypatch.setenv("COLUMNS", "20")
    assert [line[:9].strip() for line in printed(TABLE, Terminal())[1:-1]] == [
        "",
        "optimizer",
        "ours",
        "theirs",
        "",
        "optimizer",
        "ours",
        "theirs",
    ]


def test_titles_and_notes_are_wrapped_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    words = "one two three four five six seven eight"
    lines = printed(console.Table(words, ["optimizer"], [["ours"]], [words]), Terminal())
    assert lines == ["one two three four five", "six seven eight", "optimizer", "ours", *lines[:2]]


def test_progress_on_a_terminal_and_in_a_log():
    terminal, pipe = Terminal(), io.StringIO()
    for file in (terminal, pipe):
        with console.Screen(file).progress("step") as tell:
            tell("gpt2", 0.0)
            tell("gpt2", 0.5)
            tell("vit", 1.0)
    assert pipe.getvalue() == "step: gpt2\nstep: vit\n" and "vit" in terminal.getvalue()


@pytest.mark.parametrize(
    "number, text",
    [(0, "0"), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")],
)
def test_three_digits(number, text):
    assert console.three_digits(number) == text


@pytest.mark.parametrize(
    "content",
    ["nonsense", "[]", '{"schema": "fused-adam-bench/0"}', '{"schema": "fused-adam-bench/1"}'],
)
def test_other_files_are_no_records(content, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"record\.json"):
        results.read(path)
