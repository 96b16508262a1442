"""Transitions for tests: a known one, arbitrary ones from Hypothesis, and stored ones."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from hypothesis import strategies as st

from service.stripe.verification_session import RelatedPerson
from service.transitions.lifecycle import Status
from service.transitions.thin_notification import Notification, pack
from service.transitions.transition import Origin, StatusTransition

TEXT = st.text(max_size=20)
WORD = st.text(min_size=1, max_size=20)
MAYBE = st.none() | TEXT
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def change_fields(required: st.SearchStrategy[str]) -> dict[str, st.SearchStrategy[Any]]:
    """Return arbitrary fields of a session's change, *required* where a text has to stand."""
    return {
        "event_id": required,
        "event_type": required,
        "occurred_at": st.integers(0, 10**11 - 1).map(lambda at: datetime.fromtimestamp(at, UTC)),
        "livemode": st.none() | st.booleans(),
        "account": st.none() | required,
        "account_name": st.none() | required,
        "context": MAYBE,
        "origin": st.sampled_from(Origin) | required,
        "endpoint": MAYBE,
        "session_id": required,
        "session_type": MAYBE,
        "current": st.sampled_from(Status) | required,
        "stripe_status": MAYBE,
        "last_error_code": MAYBE,
        "redaction_status": MAYBE,
        "report_id": MAYBE,
        "client_reference_id": MAYBE,
        "related_customer": MAYBE,
        "related_customer_account": MAYBE,
        "related_person": st.none() | st.builds(RelatedPerson, account=MAYBE, person=MAYBE),
        "metadata": st.none() | st.dictionaries(TEXT, TEXT, max_size=4),
    }


TRANSITIONS = st.builds(
    StatusTransition,
    **change_fields(WORD),
    traceparent=st.just(msgspec.UNSET) | st.just(TRACEPARENT),
    previous=st.none() | WORD,
    sequence=st.integers(1, 2**53),
    epoch=st.integers(1, 2**53),
    expected=st.booleans(),
    reversal=st.booleans(),
)
TRANSITION = StatusTransition(
    event_id="evt_1",
    event_type="identity.verification_session.verified",
    occurred_at=datetime(2026, 8, 5, 12, tzinfo=UTC),
    livemode=True,
    account="acct_1",
    session_id="vs_1",
    session_type="document",
    current="verified",
    stripe_status="verified",
    endpoint="acme",
    metadata={"order": "6735"},
    previous="processing",
    sequence=3,
    epoch=1_790_000_000_000,
    expected=True,
)


def stored_entry(session_id: str, sequence: int, *, kind: str = "processing") -> dict[str, Any]:
    """Return the fields of a stream entry as admission writes it."""
    change = (
        f'{{"event_id":"evt_{session_id}_{sequence}",'
        f'"event_type":"identity.verification_session.{kind}",'
        f'"occurred_at":"2026-01-01T00:00:00Z","session_id":"{session_id}",'
        '"current":"processing","metadata":{"k":"canary4711"}}'
    )
    return {"change": change, "previous": "", "sequence": sequence, "epoch": 1}


def stored_notification(session_id: str, number: int, **changes: Any) -> dict[str, Any]:
    """Return the fields of a stream entry as a thin notification is noted."""
    known = {
        "event_id": f"evt_{session_id}_{number}",
        "event_type": "identity.verification_session.processing",
        "session_id": session_id,
        "created": 1_790_000_000 + number,
        "livemode": True,
        "received_at": 1_790_000_001.5,
    }
    return {"notification": pack(Notification(**{**known, **changes}))}
