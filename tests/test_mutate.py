"""The mutants of mutate.py fit the project as it is; `python -m tests.mutate` tries them."""

import pytest

from tests.mutate import MUTANTS, TABLE, table
from tests.tiny import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_replaces_stands_once_in_its_file(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.before) == 1
    assert mutant.before != mutant.after
    assert (ROOT / "tests" / mutant.tests.split()[0]).exists()


def test_the_committed_table_names_every_mutant_once():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert TABLE.read_text() == table(), "python -m tests.mutate writes it, once none survives"
