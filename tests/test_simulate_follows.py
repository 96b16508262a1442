"""The law between `simulate` and `transitions`: invented lives follow the table of real ones."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from service.events import Event, parse
from service.signatures import VerifiedPayload
from service.simulate import LIFECYCLES, lifecycle_events
from service.transitions import STEP_RANKS, fingerprint, is_expected, position

SEEDS = range(20)


def life(name: str, seed: int) -> list[Event]:
    """Return a simulated life as the service understands it."""
    told = lifecycle_events(name, random=Random(seed), started_at=1_785_931_200)
    events = [parse(VerifiedPayload(each.body, "")) for each in told]
    understood = [event for event in events if isinstance(event, Event)]
    assert len(understood) == len(told)
    return understood


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LIFECYCLES)
def test_every_step_is_expected(name: str, seed: int) -> None:
    """Every step of every lifecycle is one that `FOLLOWS` lists, from first sight on."""
    statuses = [event.change().current for event in life(name, seed)]

    assert is_expected(None, statuses[0])
    assert all(is_expected(previous, current) for previous, current in pairwise(statuses))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LIFECYCLES)
def test_every_step_moves_on(name: str, seed: int) -> None:
    """Every step has a higher position and another fingerprint than the one before."""
    events = life(name, seed)
    positions = [position(event.type, event.created, event.session) for event in events]
    prints = [fingerprint(event.change().current, event.session) for event in events]

    assert positions == sorted(set(positions))
    assert all(before != after for before, after in pairwise(prints))


def test_every_type_is_told() -> None:
    """The lifecycles together tell every event type the service ranks."""
    told = {event.type for name in LIFECYCLES for event in life(name, 0)}

    assert told == set(STEP_RANKS)
