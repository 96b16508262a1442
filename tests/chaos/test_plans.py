"""Laws of what chaos runs are made of: each fault comes, seeds repeat, every life has secrets."""

from __future__ import annotations

from itertools import islice
from random import Random

import orjson
import pytest
from faults import FAULTS
from lives import CANARY, PUBLISHED, Letter, lives
from mixes import LONG, SHORT

NOW = 1_790_000_000


def lived(seed: int, count: int = 300) -> list[Letter]:
    """Return the events of some lives."""
    return [letter for life in islice(lives(Random(seed), NOW), count) for letter in life]


def test_every_fault_is_in_a_long_mix() -> None:
    """There is no fault that only an option brings about."""
    assert {name for mix in LONG.values() for name in mix} == set(FAULTS)


@pytest.mark.parametrize("mix", [*SHORT.values(), *LONG.values()])
def test_a_mix_asks_for_one_durability(mix: tuple[str, ...]) -> None:
    """Faults that need different deployments never meet in one run."""
    needs = {FAULTS[name].needs.durability for name in mix}
    assert len(needs - {""}) <= 1


def test_a_seed_repeats_its_lives() -> None:
    """The same seed gives the same events to the byte, another one others."""
    assert lived(1) == lived(1)
    assert lived(1) != lived(2)


def test_every_secret_field_holds_a_canary() -> None:
    """Whatever may not leave the process is recognisable in every event, and ids are unique."""
    letters = lived(3)
    assert len({letter.event.id for letter in letters}) == len(letters)
    for letter in letters:
        session = orjson.loads(letter.body)["data"]["object"]
        secret = [session[name] for name in ("client_secret", "url", "provided_details")]
        secret += [session["verified_outputs"], (session["last_error"] or secret[0])]
        secret.append(session["last_verification_report"] or secret[0])
        assert all(CANARY in orjson.dumps(one).decode() for one in secret)
        assert session["metadata"] == {"user": PUBLISHED}
