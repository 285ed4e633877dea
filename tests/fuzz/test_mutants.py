"""The list of `make mutants` fits the sources: each fault has one place, and its tests exist."""

import pytest
from mutants import ROOT, listed
from named import missing

MUTANTS = listed()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_fault_has_one_place(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1 and mutant.old != mutant.new


def test_the_tests_exist():
    tests = [test for mutant in MUTANTS for test in mutant.tests.split()]
    assert missing(" ".join(tests)) == [] and all(
        (ROOT / "tests" / t.split("::")[0]).exists() for t in tests
    )


def test_there_are_many_and_none_twice():
    assert (
        len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) > 80
    )  # as docs/guarantees.md says
