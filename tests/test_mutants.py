"""The law of planted bugs: each can still be planted; whether each is found, the command says."""

from __future__ import annotations

from pathlib import Path

from tests.mutants import mutated
from tests.planted import MUTANTS

TESTS = Path(__file__).parent


def test_every_bug_can_be_planted() -> None:
    """The text a bug replaces stands in its file exactly once, and who should notice exists."""
    for mutant in MUTANTS:
        assert mutant.new in mutated(mutant), mutant.bug
        for target in mutant.targets:
            assert (TESTS / target.partition("::")[0]).is_file(), mutant.bug


def test_every_bug_is_another() -> None:
    """No bug is listed twice, by its words or by its text."""
    assert len({one.bug for one in MUTANTS}) == len(MUTANTS)
    assert len({(one.path, one.old, one.new) for one in MUTANTS}) == len(MUTANTS)
