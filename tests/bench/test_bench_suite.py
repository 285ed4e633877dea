"""`suite` and `report` of the benchmark through their real entry point, tiny."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from tiny_bench import FEW, TWO, by_name

from bench import cli
from bench.harness import plots

ROOT = pathlib.Path(__file__).parents[2]


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
