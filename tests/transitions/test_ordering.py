"""The order of events, and the hash of what matters of a session."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.secret import Secret
from service.stripe.events import EVENT_TYPE_PREFIX, Event, _Wrapper
from service.stripe.verification_session import LastError, Redaction, VerificationSession
from service.transitions.ordering import created_at, is_step, order_key, state_hash
from service.transitions.transition import SessionChange, make_change

CREATED = 1_785_931_200
STATUSES = ("requires_input", "processing", "verified", "canceled", "requires_action")
REDACTIONS = (None, "processing", "validated", "some_new_word", "redacted")
STEPS = ("created", "processing", "requires_input", "verified", "canceled", "redacted", "newer")
MOMENTS = st.integers(0, 10**11 - 1)


def change(
    step: str, status: str = "processing", redaction: str | None = None, **more: Any
) -> SessionChange:
    """Return the change that an event makes."""
    session = VerificationSession(
        id="vs_1", status=status, redaction=Redaction(status=redaction), **more
    )
    event_type = EVENT_TYPE_PREFIX + step
    return make_change(
        Event(id="evt_1", type=event_type, created=CREATED, data=_Wrapper(object=session))
    )


def key(step: str, status: str, *, created: int = CREATED, redaction: str | None = None) -> int:
    """Return the order key of an event."""
    return order_key(change(step, status, redaction), created)


def test_digits_of_an_order_key() -> None:
    """The digits, highest first: redaction rank, eleven digits of seconds, type rank."""
    assert key("created", "requires_input") == 1785931200_0
    assert key("processing", "processing") == 1785931200_1
    assert key("requires_input", "requires_input") == 1785931200_2
    assert key("newer", "newer") == 1785931200_2
    assert key("verified", "verified") == 1785931200_3
    assert key("canceled", "canceled") == 1785931200_3
    assert key("canceled", "canceled", redaction="processing") == 1_01785931200_3
    assert key("verified", "verified", redaction="validated") == 1785931200_3
    assert key("verified", "verified", redaction="new word") == 1785931200_3
    assert key("redacted", "verified", redaction="redacted") == 2_01785931200_4
    assert key("newer", "verified", redaction="redacted") == 2_01785931200_2
    assert key("redacted", "requires_input") == 2_01785931200_4


@given(*[st.sampled_from(each) for each in (STEPS, STATUSES, REDACTIONS)], MOMENTS)
def test_an_order_key_is_exact_in_lua(
    step: str, status: str, redaction: str | None, created: int
) -> None:
    """An order key is below 2**53, and *created* can be computed from it."""
    found = key(step, status, created=created, redaction=redaction)

    assert 0 <= found < 2**53
    assert created_at(found) == created


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("step", STEPS)
def test_steps_and_results(step: str, status: str) -> None:
    """The creation of a session and the start of a check are steps; all others are results."""
    assert is_step(change(step, status)) is (step == "created" or status == "processing")


MATTERS: list[dict[str, Any]] = [
    {"status": "requires_input"},
    {"status": "some_new_word"},
    {"redaction": "processing"},
    {"redaction": "redacted"},
    {"last_error": LastError(code="document_expired")},
    {"last_error": LastError(code="vr_1")},
    {"last_verification_report": "vr_1"},
    {"last_verification_report": "vr_2"},
]
DOES_NOT_MATTER: list[dict[str, Any]] = [
    {"last_error": LastError(reason=Secret("worded anew"))},
    {"metadata": {"a": "b"}},
    {"url": Secret("https://verify.stripe.com/start/x")},
    {"client_secret": Secret("vs_1_secret_x")},
    {"client_reference_id": "user-1"},
    {"created": 1},
    {"type": "id_number"},
]


def hash_of(step: str = "processing", **changes: Any) -> str:
    """Return the state hash of a session, `processing` but for *changes*."""
    return state_hash(change(step, **changes))


def test_a_state_hash_changes_with_what_matters() -> None:
    """Status, redaction, error code and report each change the hash, one word in two fields too."""
    hashes = [hash_of(), *(hash_of(**changes) for changes in MATTERS)]

    assert len(set(hashes)) == len(hashes)


def test_redacted_by_status_or_type_has_one_hash() -> None:
    """The hash of a redacted session is the same whether status, type or both say so."""
    both = hash_of("redacted", redaction="redacted")

    assert hash_of("redacted") == hash_of("redacted", redaction="processing") == both
    assert hash_of("newer", redaction="redacted") == both
    assert hash_of() != both


@pytest.mark.parametrize("changes", DOES_NOT_MATTER, ids=lambda changes: next(iter(changes)))
def test_a_state_hash_holds_nothing_else(changes: dict[str, Any]) -> None:
    """Data that no handler acts upon, including the event type, does not change the hash."""
    assert hash_of(**changes) == hash_of()
    assert hash_of("newer", **changes) == hash_of()


def test_a_state_hash_never_changes() -> None:
    """Hashes are stored for longer than a release lives, so the code must not change them."""
    assert hash_of() == "1aaffa1f8a7f087b"
    assert hash_of("redacted", status="verified", redaction="redacted") == "416fff3db45b1fc8"
