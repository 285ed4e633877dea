"""The comparison of ways to store Adam's moments: other projects' mathematics, and the record."""

import pytest
import torch

from bench import cli, report, schemes
from bench.harness import results

NO_BITS = torch.zeros(256, dtype=torch.int32)


def test_dynamic_values_are_256_over_seven_decades():
    for signed in (False, True):
        values = schemes.dynamic_values(signed)
        assert len(values) == 256 and values[-1] == 1 and (values.diff() > 0).all()
        positive = values[values > 0]
        assert 1e-7 < positive[0] < 1e-6
    signed = schemes.DYNAMIC_SIGNED
    assert signed[127] == 0 and torch.equal(-signed[:127].flip(0), signed[128:255])


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_every_scheme_keeps_what_it_can(name):
    """Equal moments in a group come back to within 5 %; zeros stay zeros."""
    m, v = torch.full((256,), -0.5), torch.full((256,), 0.25)
    store = schemes.SCHEMES[name].store
    for value, back in zip((m, v), store(m, v, NO_BITS), strict=True):
        assert ((back / value - 1).abs() < 0.05).all()
    zeros = torch.zeros(256)
    assert all((back == 0).all() for back in store(zeros, zeros, NO_BITS))


@pytest.mark.parametrize(
    ("store", "m", "v"),
    [  # next to 1: the nearest code of 0.5 and 0.04, worked out by hand
        (schemes.softsign_and_root, 85 / 127 / (2 - 85 / 127), (51 / 255) ** 2),
        (schemes.float8, 224 / 448, 18 / 448),
    ],
)
def test_other_projects_codes(store, m, v):
    ones = torch.ones(256)
    ones_m, ones_v = ones.clone(), ones.clone()
    ones_m[1], ones_v[1] = 0.5, 0.04
    back_m, back_v = store(ones_m, ones_v, NO_BITS)
    assert back_m[1] == pytest.approx(m, rel=1e-6) and back_v[1] == pytest.approx(v, rel=1e-3)


def test_the_record_and_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schemes.measure, "__defaults__", (512,))
    file = tmp_path / "schemes.json"
    assert cli.main(["schemes", "--device", "cpu", "--steps", "12", "--json", str(file)]) == 0
    record = results.read(file)
    assert len(record["results"]) == len(schemes.GRADIENTS) * len(schemes.SCHEMES)
    out = capsys.readouterr().out
    assert all(name in out for name in (*schemes.GRADIENTS, *schemes.SCHEMES, "RMSE"))
    markdown = report.markdown(report.tables_of(record, file))
    assert markdown.count("| spread 0.5 |") == len(schemes.MEASURES)
    ours = [result for result in record["results"] if result["scheme"] == "int8 (ours)"]
    assert all(0 < result["rmse"] < 0.2 and 0.9 < result["mean_v"] < 1.1 for result in ours)


def test_what_is_not_finite_is_written_as_such():
    assert schemes.cell_text(None) == "inf" and schemes.cell_text(0.0517) == "0.052"
