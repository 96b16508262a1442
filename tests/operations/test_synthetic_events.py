"""The synthetic lifecycles: their steps, and that their events look like Stripe's."""

from __future__ import annotations

import json
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from service.operations.synthetic_events import (
    LIFECYCLES,
    SyntheticEvent,
    lifecycle_events,
    thin_event,
)
from service.stripe.events import Event, ThinEvent, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions.lifecycle import TYPE_RANKS, is_expected, is_reversal
from service.transitions.ordering import order_key, state_hash
from service.transitions.transition import make_change
from tests.support.programs import FIXTURES

STARTED_AT = 1_785_931_200
PREFIX = "identity.verification_session."


def events_of(name: str, seed: int = 7) -> list[SyntheticEvent]:
    """Return the events of a lifecycle."""
    return lifecycle_events(name, random=Random(seed), started_at=STARTED_AT)


def sessions(name: str) -> list[dict[str, Any]]:
    """Return the session as each event of a lifecycle shows it."""
    return [json.loads(event.body)["data"]["object"] for event in events_of(name)]


every_lifecycle = pytest.mark.parametrize("name", LIFECYCLES)


def test_ids_across_sessions() -> None:
    """Sessions made with one source of randomness share no id."""
    random = Random(1)
    events = [
        event
        for _ in range(50)
        for event in lifecycle_events("verified", random=random, started_at=STARTED_AT)
    ]
    assert len({event.id for event in events}) == 150
    assert len({event.session_id for event in events}) == 50


@every_lifecycle
def test_time(name: str) -> None:
    """The first event is at the start, and every step comes later than the one before."""
    created = [event.created for event in events_of(name)]
    assert created[0] == STARTED_AT
    assert all(before < after for before, after in pairwise(created))
    assert {session["created"] for session in sessions(name)} == {STARTED_AT}


@every_lifecycle
def test_deterministic(name: str) -> None:
    """The same seed gives the same events, another seed others."""
    assert events_of(name, seed=3) == events_of(name, seed=3)
    assert events_of(name, seed=3) != events_of(name, seed=4)


@every_lifecycle
def test_shape(name: str) -> None:
    """A body has every key of a real event of its type, in the same order and of the same type."""
    for event in events_of(name):
        real = json.loads((FIXTURES / f"{event.type}.json").read_text())
        ours = json.loads(event.body)
        if ours["data"]["object"]["redaction"]:
            real["data"]["object"]["metadata"] = {}
        _compare(real, ours, "")


def _compare(real: Any, ours: Any, path: str) -> None:
    if isinstance(real, dict) and isinstance(ours, dict):
        assert set(real) <= set(ours), path
        assert [key for key in ours if key in real] == list(real), path
        for key, value in real.items():
            _compare(value, ours[key], f"{path}.{key}")
    elif real is not None and ours is not None:
        assert type(real) is type(ours), path


@every_lifecycle
def test_bearer_secrets(name: str) -> None:
    """`client_secret` and `url` are set while input is required, and null otherwise."""
    for session in sessions(name):
        live = session["status"] == "requires_input"
        assert (session["client_secret"] is not None) is live
        assert (session["url"] is not None) is live
        assert not live or session["client_secret"].startswith(f"{session['id']}_secret_")


@every_lifecycle
def test_repr(name: str) -> None:
    """An event's repr shows nothing of its body."""
    assert all("client_secret" not in repr(event) for event in events_of(name))


def test_reports() -> None:
    """An attempt's report stays until the next attempt brings its own."""
    reports = [session["last_verification_report"] for session in sessions("retry-then-verified")]
    assert reports[:2] == [None, None]
    assert reports[2] == reports[3]
    assert reports[4] not in {None, reports[2]}


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("verified", [None, None, None]),
        ("retry-then-verified", [None, None, "document_expired", None, None]),
        ("consent-declined", [None, "consent_declined"]),
        ("rejected-on-review", [None, None, None, None]),
        ("approved-on-review", [None, None, "document_expired", None]),
    ],
)
def test_errors(name: str, codes: list[str | None]) -> None:
    """`last_error` is set when input is required again, with a code and a reason."""
    errors = [session["last_error"] for session in sessions(name)]
    assert [error and error["code"] for error in errors] == codes
    assert all(error is None or error["reason"] for error in errors)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("verified", [None, None, None]),
        ("redacted-after-verified", [None, None, None, "redacted"]),
        ("redacted-while-open", [None, "processing", "redacted"]),
    ],
)
def test_redaction(name: str, words: list[str | None]) -> None:
    """From its request on, redaction erases metadata and the client's reference."""
    for session, word in zip(sessions(name), words, strict=True):
        assert session["redaction"] == (word and {"status": word})
        assert (session["metadata"] == {}) is (word is not None)
        assert (session["client_reference_id"] is None) is (word is not None)


@every_lifecycle
def test_requests(name: str) -> None:
    """Only events that an API call causes name the request."""
    for event in events_of(name):
        request = json.loads(event.body)["request"]
        asked = event.type.removeprefix(PREFIX) in {"created", "canceled"}
        assert (request["id"] is not None) is asked
        assert (request["idempotency_key"] is not None) is asked


@every_lifecycle
def test_thin_events(name: str) -> None:
    """A thin event has the keys of a real one, another id, and the second of the snapshot event."""
    real = json.loads((FIXTURES / "thin_event.json").read_text())
    for event in events_of(name):
        thin = thin_event(event, random=Random(5))
        ours = json.loads(thin.body)
        assert set(ours) == set(real)
        assert set(ours["related_object"]) == set(real["related_object"])
        assert (thin.session_id, thin.created) == (event.session_id, event.created)
        understood = parse(VerifiedPayload(thin.body, ""))
        assert understood == ThinEvent(
            event_id=thin.id,
            event_type=f"v1.{event.type}",
            created=event.created,
            is_live=False,
            context=None,
            session_id=event.session_id,
            snapshot_event_id=None,
        )
        assert (ours["reason"] is None) is (json.loads(event.body)["request"]["id"] is None)
        assert thin.id != event.id
        assert "client_secret" not in thin.body.decode()


# What the service makes of them


def parsed(name: str, seed: int) -> list[Event]:
    """Return the events of a lifecycle as the service parses them."""
    made = events_of(name, seed)
    events = [parse(VerifiedPayload(each.body, "")) for each in made]
    understood = [event for event in events if isinstance(event, Event)]
    assert len(understood) == len(made)
    return understood


@every_lifecycle
def test_every_step_is_expected(name: str) -> None:
    """Every step of every lifecycle is one that `NEXT_STATUSES` lists.

    Except an approval on review, which looks like a check whose `processing` was missed.
    """
    statuses = [make_change(event).current for event in parsed(name, 0)]
    first: list[str | None] = [None]
    steps = list(zip([*first, *statuses], statuses, strict=False))
    if name == "approved-on-review":
        assert steps.pop() == ("requires_input", "verified")

    assert all(is_expected(previous, current) for previous, current in steps)


@every_lifecycle
def test_every_step_moves_on(name: str) -> None:
    """Every step has a higher order key and another state hash than the one before."""
    for seed in range(20):
        events = parsed(name, seed)
        keys = [order_key(make_change(event), event.created) for event in events]
        hashes = [state_hash(make_change(event)) for event in events]
        assert keys == sorted(set(keys))
        assert all(before != after for before, after in pairwise(hashes))


@every_lifecycle
def test_only_a_rejection_on_review_is_a_reversal(name: str) -> None:
    """The only reversal is the step by which staff reject a verified session."""
    statuses = [make_change(event).current for event in parsed(name, 0)]
    reversals = [is_reversal(*step) for step in pairwise(statuses)]

    assert reversals == [False] * (len(reversals) - 1) + [name == "rejected-on-review"]


def test_every_type_occurs() -> None:
    """The lifecycles together have every event type that the service knows."""
    types = {event.type for name in LIFECYCLES for event in parsed(name, 0)}

    assert types == set(TYPE_RANKS)
