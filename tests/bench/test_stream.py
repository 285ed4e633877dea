"""`bench stream`: what it records and shows. No time is asserted."""

import json

import pytest
import torch
from streams import simulate

from bench import cli, report, stream
from bench.harness.optimizers import Case
from bench.harness.results import Recorder


def test_without_a_gpu_it_says_why_nothing_is_measured(tmp_path, capsys):
    file = tmp_path / "record.json"
    command = ["stream", "--device", "cpu", "--model", "gpt2/64", "--json", str(file)]
    assert cli.main(command) == 0
    record = json.loads(file.read_text())
    assert not record["results"]
    assert [entry["name"] for entry in record["left_out"]] == [
        "FusedAdamW",
        "FusedAdamW split24-int8",
    ]
    assert "host memory anyway: it needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("fits", [True, False])
def test_what_is_recorded_of_a_device(monkeypatch, fits, capsys):
    """A CPU stands in for the device, and the reference for kernels on state that is there."""
    simulate(monkeypatch)
    monkeypatch.setattr(stream, "COPY_BYTES", 1000)

    def stepper(params, recipe, **options):
        if not options and not fits:
            raise torch.OutOfMemoryError("no more")
        backend = "triton" if options else "reference"
        return make(params, recipe, backend=backend, **options)

    make = stream.stepper
    monkeypatch.setattr(stream, "stepper", stepper)
    recorder = Recorder("stream", {}, torch.device("cpu"))
    case = Case(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    stream.measure(
        recorder, "tiny", [(40, 10), (3,)], "split24-int8", case, 0.01, lambda *args: None
    )
    (result,) = recorder.results
    # Scales are of whole groups, and so is memory.
    assert result["state_bytes"] == 403 * 3 + 4 * (13 + 1) and result["parameters"] == 403
    assert result["gb_per_s"]["median"] > 0 and result["copy_gb_per_s"]["median"] > 0
    assert (result["resident_ms"] is None) == (not fits)
    record = recorder.record()
    text = report.markdown(report.TABLES["stream"](record))
    assert "FusedAdamW split24-int8, bfloat16" in text
    assert ("does not fit" in text) == (not fits)


@pytest.mark.gpu
def test_a_gpu_is_measured(tmp_path):
    file, shapes = tmp_path / "record.json", tmp_path / "shapes.json"
    shapes.write_text("[[64, 32], [5]]")
    command = ["stream", "--device", "cuda", "--shapes", str(shapes), "--seconds", "1"]
    assert cli.main([*command, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert [result["share_of_copy"]["median"] > 0 for result in record["results"]] == [True, True]
