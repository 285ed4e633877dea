"""The run on a GPU, without one: what is packed, that no part stops the next, that all variants
still apply.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile

import pytest
from process import ROOT

from bench.gpu import pack, variants

SCRIPT = ROOT / "bench" / "gpu" / "gpu_run.sh"
PARTS = ["environment", "smoke", "verify", "tests", "variants", "step", "profiler", "checker"]


def gpu_run(packed, out, parts, **environment):
    """Run the packed script as a user does; returns its standard output."""
    words = {"OUT": str(out), "PARTS": parts, "PYTHON": sys.executable, **environment}
    outer = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")
    }
    done = subprocess.run(
        ["bash", str(packed / "gpu_run.sh")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**outer, **words},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def packed(tmp_path):
    assert pack.main(["--out", str(tmp_path / "packed"), "--no-cache"]) == 0
    return tmp_path / "packed"


@pytest.fixture
def python(tmp_path):
    """Makes a stand-in for Python that only says what it is told to, by the first of the words in
    its arguments.
    """

    def make(answers):
        path = tmp_path / "python"
        cases = "".join(f"  *{word}*) {command};;\n" for word, command in answers.items())
        path.write_text(f'#!/bin/bash\ncase "$*" in\n{cases}esac\n')
        path.chmod(0o755)
        return str(path)

    return make


def test_what_is_packed(packed, capsys):
    assert {path.name for path in packed.iterdir()} == set(pack.SCRIPTS)
    assert (packed / "gpu_run.sh").read_text() == SCRIPT.read_text()
    (packed / "results").mkdir()
    assert (
        pack.main(["--out", str(packed), "--no-cache"]) == 0
    )  # again, over what an earlier run left
    assert {path.name for path in packed.iterdir()} == set(pack.SCRIPTS)
    assert f"bash {packed.name}/gpu_run.sh" in capsys.readouterr().out


def test_other_folders_are_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(SystemExit):
        pack.main(["--out", str(tmp_path), "--no-cache"])
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
    assert "holds other files; allowed: a new or empty folder" in capsys.readouterr().err


def test_the_page_names_every_part():
    page = (ROOT / "bench" / "gpu" / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == PARTS
    text = SCRIPT.read_text()
    assert f"PARTS=${{PARTS:-{' '.join(PARTS)}}}" in text
    assert re.findall(r"^if wanted (\w+); then", text, re.M) == PARTS
    assert int(re.search(r"LIMIT:-(\d+)", text)[1]) < 9 * 60


def test_without_a_gpu_the_run_goes_to_its_end(packed, tmp_path):
    out = gpu_run(packed, tmp_path / "out", "smoke verify variants profiler checker")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert out.endswith(f"===== SUMMARY\n{summary}")
    said = dict(re.findall(r"^\[(\w+)\] (.*)$", summary, re.M))
    assert {"smoke", "verify", "variants"} <= set(said)
    assert "there is no GPU here" in said["smoke"] and "there is no GPU here" in said["variants"]
    assert "cuda" in said["verify"]
    for part, tool in (("profiler", "ncu"), ("checker", "compute-sanitizer")):
        if part in said:
            assert said[part] == f"left out: {tool} is not installed"
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_no_part_stops_the_next(packed, tmp_path, python):
    """One fails, one is stopped at its limit, one is well; a run of before leaves nothing in the
    files.
    """
    answers = {
        "smoke.py": "echo FAILED graph: no; echo 3 of 4 promises hold; exit 1",
        "verify": "echo hash: half of it; exit 124",
        "variants.py": "echo fp32 today 1.0 ms 3000 GB/s; exit 0",
    }
    for _ in range(2):
        gpu_run(packed, tmp_path / "out", "smoke verify variants", PYTHON=python(answers))
        summary = re.sub(r"\d+ s\b", "N s", (tmp_path / "out" / "summary.txt").read_text())
        assert summary.splitlines() == [
            "[smoke] exit 1 after N s: 3 of 4 promises hold",
            "    FAILED graph: no",
            "    3 of 4 promises hold",
            "[verify] stopped at its limit of N s",
            "    hash: half of it",
            "[variants] done in N s",
            "    fp32 today 1.0 ms 3000 GB/s",
            f"all: N s; results: {tmp_path / 'out'}",
        ]
        assert (tmp_path / "out" / "log.txt").read_text().count("=====") == 3


def test_what_comes_too_late_is_left_out(packed, tmp_path, python):
    gpu_run(packed, tmp_path / "out", "smoke verify", LIMIT="10", PYTHON=python({}))
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert (
        len(re.findall(r"^\[(?:smoke|verify)\] left out: \d+ s are left of 10$", summary, re.M))
        == 2
    )


def test_the_cache_works_wherever_it_is_unpacked(packed, tmp_path, python):
    group = {"child_paths": {"kernel.cubin": f"{pack.CACHE_MARK}/KEY/kernel.cubin"}}
    with tarfile.open(packed / "cache.tgz", "w:gz") as archive:
        for name, content in (
            ("KEY/kernel.cubin", b"code"),
            ("KEY/__grp__kernel.json", json.dumps(group).encode()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    cache = tmp_path / "some where"
    gpu_run(packed, tmp_path / "out", "", TRITON_CACHE_DIR=str(cache), PYTHON=python({}))
    found = json.loads((cache / "KEY" / "__grp__kernel.json").read_text())
    with open(found["child_paths"]["kernel.cubin"], "rb") as file:
        assert file.read() == b"code"


KEY = """
import json, sys
from bench.gpu import pack
from triton.runtime import cache
own = cache.triton_key()
pack.answer_for("0" * 64)
other = cache.triton_key()
print(json.dumps([own == other, len(own) == len(other), other.count("0" * 64)]))
"""


def test_keys_can_be_those_of_another_pythons_triton():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", KEY], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, True, 1]


def test_every_edit_of_the_kernels_still_applies(tmp_path):
    wrong = []
    assert list(variants.builds_of([], tmp_path, wrong)) == list(variants.variants())
    assert wrong == []


@pytest.mark.parametrize("mix", ["fp32", "split24-int8"])
def test_variants_give_the_same_bits(mix, capsys):
    edited = [name for name, variant in variants.variants().items() if variant.edits]
    assert (
        variants.main(
            ["--check", "--mixes", mix, "--only", "today", "block 2048, 80 registers", *edited]
        )
        == 0
    )
    assert (
        f"{mix}: same bits: today, block 2048, 80 registers, {', '.join(edited)}"
        in capsys.readouterr().out
    )


def test_a_variant_that_is_wrong_or_out_of_date_is_named(monkeypatch, capsys):
    edit = ("adam.py", "tl.store(ptrs.p + offs, new_p, mask=mask)")
    monkeypatch.setattr(
        variants,
        "variants",
        lambda: {
            "today": variants.Variant(),
            "wrong": variants.Variant(
                edits=((*edit, "tl.store(ptrs.p + offs, new_p, mask=mask & (offs > 0))"),)
            ),
            "old": variants.Variant(edits=(("adam.py", "what was here once", "anything"),)),
            "8 warps": variants.Variant({"num_warps": 8}),
        },
    )
    assert variants.main(["--check", "--mixes", "fp32"]) == 1
    said = capsys.readouterr().out
    assert "fp32: same bits: today, 8 warps\n" in said
    assert "WRONG fp32: wrong: other bits" in said
    assert (
        "WRONG all: old: not patched: 'what was here once' is 0 times in adam.py, not once" in said
    )
