"""The law of planted bugs: each can still be planted; whether each is found, the command says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants import mutated
from tests.planted import MUTANTS, Mutant

TESTS = Path(__file__).parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug.replace(" ", "_"))
def test_every_bug_can_be_planted(mutant: Mutant) -> None:
    """The text a bug replaces stands in its file exactly once, and who should notice exists."""
    assert mutant.new in mutated(mutant)
    for target in mutant.tests.split():
        assert (TESTS / target.partition("::")[0]).is_file()


def test_every_bug_is_another() -> None:
    """No bug is listed twice, by its words or by its text."""
    assert len({one.bug for one in MUTANTS}) == len(MUTANTS)
    assert len({(one.path, one.old, one.new) for one in MUTANTS}) == len(MUTANTS)
