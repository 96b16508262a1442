"""Laws of the synthetic lifecycles: what they tell, and that they look like Stripe's own."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from service.operations.synthetic_events import LIFECYCLES, SyntheticEvent, lifecycle_events
from tests.support.programs import FIXTURES

STARTED_AT = 1_785_931_200
PREFIX = "identity.verification_session."

EXPECTED = {
    "verified": [
        ("created", "requires_input"),
        ("processing", "processing"),
        ("verified", "verified"),
    ],
    "retry-then-verified": [
        ("created", "requires_input"),
        ("processing", "processing"),
        ("requires_input", "requires_input"),
        ("processing", "processing"),
        ("verified", "verified"),
    ],
    "canceled": [
        ("created", "requires_input"),
        ("canceled", "canceled"),
    ],
    "consent-declined": [
        ("created", "requires_input"),
        ("requires_input", "requires_input"),
    ],
    "redacted-after-verified": [
        ("created", "requires_input"),
        ("processing", "processing"),
        ("verified", "verified"),
        ("redacted", "verified"),
    ],
    "redacted-while-open": [
        ("created", "requires_input"),
        ("canceled", "canceled"),
        ("redacted", "canceled"),
    ],
    "rejected-on-review": [
        ("created", "requires_input"),
        ("processing", "processing"),
        ("verified", "verified"),
        ("requires_input", "requires_input"),
    ],
    "approved-on-review": [
        ("created", "requires_input"),
        ("processing", "processing"),
        ("requires_input", "requires_input"),
        ("verified", "verified"),
    ],
}


def told(name: str, seed: int = 7) -> list[SyntheticEvent]:
    """Return the events of a lifecycle."""
    return lifecycle_events(name, random=Random(seed), started_at=STARTED_AT)


def sessions(name: str) -> list[dict[str, Any]]:
    """Return the session as each event of a lifecycle shows it."""
    return [json.loads(event.body)["data"]["object"] for event in told(name)]


every_lifecycle = pytest.mark.parametrize("name", EXPECTED)


def test_names() -> None:
    """There are exactly the lifecycles that the commands document."""
    assert list(LIFECYCLES) == list(EXPECTED)


@every_lifecycle
def test_steps(name: str) -> None:
    """A lifecycle tells the types and statuses of its table, in that order."""
    steps = [
        (event.type.removeprefix(PREFIX), session["status"])
        for event, session in zip(told(name), sessions(name), strict=True)
    ]
    assert steps == EXPECTED[name]


@every_lifecycle
def test_body_agrees_with_event(name: str) -> None:
    """What is said about an event beside its body is what its body says."""
    for event in told(name):
        body = json.loads(event.body)
        said = (body["id"], body["type"], body["created"], body["data"]["object"]["id"])
        assert said == (event.id, event.type, event.created, event.session_id)


@every_lifecycle
def test_ids(name: str) -> None:
    """Ids are well-formed, unique among events, and one for the whole session."""
    events = told(name)
    assert all(re.fullmatch(r"evt_[A-Za-z0-9_]{1,250}", event.id) for event in events)
    assert all(re.fullmatch(r"vs_[A-Za-z0-9_]{1,250}", event.session_id) for event in events)
    assert len({event.id for event in events}) == len(events)
    assert len({event.session_id for event in events}) == 1


def test_ids_across_sessions() -> None:
    """Sessions told from one source of chance share no id."""
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
    created = [event.created for event in told(name)]
    assert created[0] == STARTED_AT
    assert all(before < after for before, after in pairwise(created))
    assert {session["created"] for session in sessions(name)} == {STARTED_AT}


@every_lifecycle
def test_deterministic(name: str) -> None:
    """The same state of chance tells the same story, another one another."""
    assert told(name, seed=3) == told(name, seed=3)
    assert told(name, seed=3) != told(name, seed=4)


@every_lifecycle
def test_shape(name: str) -> None:
    """A body has every key of the real event of its type, in that order and of that kind."""
    for event in told(name):
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
def test_layout(name: str) -> None:
    """A body is laid out as Stripe lays it out: indented by two, nothing behind the brace."""
    for event in told(name):
        assert event.body.decode() == json.dumps(json.loads(event.body), indent=2)


@every_lifecycle
def test_bearer_secrets(name: str) -> None:
    """`client_secret` and `url` are live while input is awaited and null otherwise."""
    for session in sessions(name):
        live = session["status"] == "requires_input"
        assert (session["client_secret"] is not None) is live
        assert (session["url"] is not None) is live
        assert not live or session["client_secret"].startswith(f"{session['id']}_secret_")


def test_bearer_secrets_are_fresh() -> None:
    """A second chance comes with a new secret and a new link."""
    first, _, second, *_ = sessions("retry-then-verified")
    assert first["client_secret"] != second["client_secret"]
    assert first["url"] != second["url"]


@every_lifecycle
def test_repr(name: str) -> None:
    """An event's repr shows nothing of its body."""
    assert all("client_secret" not in repr(event) for event in told(name))


def test_reports() -> None:
    """An attempt's report stays until the next attempt brings its own."""
    reports = [session["last_verification_report"] for session in sessions("retry-then-verified")]
    assert reports[:2] == [None, None]
    assert reports[2] == reports[3]
    assert reports[4] not in {None, reports[2]}


@pytest.mark.parametrize("name", ["rejected-on-review", "approved-on-review"])
def test_a_review_changes_no_report(name: str) -> None:
    """Staff override the result of a check, and no new one is made."""
    *_, checked, reviewed = sessions(name)
    assert checked["status"] != reviewed["status"]
    assert checked["last_verification_report"] == reviewed["last_verification_report"] is not None


@pytest.mark.parametrize("name", ["canceled", "consent-declined", "redacted-while-open"])
def test_no_report(name: str) -> None:
    """Where nothing was checked there is no report."""
    assert {session["last_verification_report"] for session in sessions(name)} == {None}


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
    """`last_error` is there when input is required again, with a code and a reason."""
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
    """Redaction erases metadata and the client's reference from the moment it is asked for."""
    for session, word in zip(sessions(name), words, strict=True):
        assert session["redaction"] == (word and {"status": word})
        assert (session["metadata"] == {}) is (word is not None)
        assert (session["client_reference_id"] is None) is (word is not None)


@every_lifecycle
def test_requests(name: str) -> None:
    """Only what a call of the API causes names the request that caused it."""
    for event in told(name):
        request = json.loads(event.body)["request"]
        asked = event.type.removeprefix(PREFIX) in {"created", "canceled"}
        assert (request["id"] is not None) is asked
        assert (request["idempotency_key"] is not None) is asked
