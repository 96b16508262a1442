"""The law between `simulate` and `transitions`: invented lives follow the table of real ones."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from service.operations.synthetic_events import LIFECYCLES, lifecycle_events
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions.lifecycle import (
    STEP_RANKS,
    is_expected,
    is_reversal,
    order_key,
    state_hash,
)
from service.transitions.transition import make_change

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
    """Every step of every lifecycle is one that `NEXT_STATUSES` lists, from first sight on.

    But for an approval on review: it looks like a check whose `processing` was missed.
    """
    statuses = [make_change(event).current for event in life(name, seed)]
    first: list[str | None] = [None]
    steps = list(zip([*first, *statuses], statuses, strict=False))
    if name == "approved-on-review":
        assert steps.pop() == ("requires_input", "verified")

    assert all(is_expected(previous, current) for previous, current in steps)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LIFECYCLES)
def test_every_step_moves_on(name: str, seed: int) -> None:
    """Every step has a higher order key and another state hash than the one before."""
    events = life(name, seed)
    keys = [order_key(event.type, event.created, event.session) for event in events]
    hashes = [state_hash(event.type, event.session) for event in events]

    assert keys == sorted(set(keys))
    assert all(before != after for before, after in pairwise(hashes))


@pytest.mark.parametrize("name", LIFECYCLES)
def test_only_a_rejection_on_review_is_a_reversal(name: str) -> None:
    """Of all steps the one by which staff take a verification back is a reversal."""
    statuses = [make_change(event).current for event in life(name, 0)]
    reversals = [is_reversal(*step) for step in pairwise(statuses)]

    assert reversals == [False] * (len(reversals) - 1) + [name == "rejected-on-review"]


def test_every_type_is_told() -> None:
    """The lifecycles together tell every event type the service ranks."""
    told = {event.type for name in LIFECYCLES for event in life(name, 0)}

    assert told == set(STEP_RANKS)
