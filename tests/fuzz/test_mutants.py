"""The list of `make mutants` fits the sources: each fault has one place, and its tests exist."""

import pytest
from mutants import ROOT, Mutant, is_option, listed, runs
from named import missing

MUTANTS = listed()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_fault_has_one_place(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1 and mutant.old != mutant.new


def test_the_tests_exist():
    words = [word for mutant in MUTANTS for word in mutant.tests.split()]
    tests = [word for word in words if not is_option(word)]
    assert missing(" ".join(tests)) == [] and all(
        (ROOT / "tests" / t.split("::")[0]).exists() for t in tests
    )


def test_there_are_many_and_none_twice():
    assert (
        len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) > 80
    )  # as docs/guarantees.md says


def test_tests_with_other_options_run_apart():
    mutants = [Mutant("", "", "", tests) for tests in ("b a", "--ptx=sm_90 a", "c")]
    assert [run.split() for run in runs(mutants)] == [["a", "c"], ["b"], ["--ptx=sm_90", "a"]]
