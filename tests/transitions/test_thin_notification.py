"""Packed notifications are unpacked unchanged; other entries are unreadable."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.stripe.events import ThinEvent, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions.thin_notification import Notification, make_notification, pack, unpack
from tests.support.programs import FIXTURES
from tests.support.transitions import MAYBE, TEXT, TRACEPARENT

CANARY = "canary-66600666"
NOTIFICATIONS = st.builds(
    Notification,
    event_id=TEXT,
    event_type=TEXT,
    session_id=TEXT,
    created=st.integers(0, 10**11 - 1),
    livemode=st.booleans(),
    received_at=st.floats(0, 10**11),
    context=MAYBE,
    endpoint=MAYBE,
    account_name=MAYBE,
    snapshot_event_id=MAYBE,
    traceparent=st.just(msgspec.UNSET) | st.just(TRACEPARENT),
)
NOTIFICATION = Notification(
    event_id="evt_thin",
    event_type="identity.verification_session.verified",
    session_id="vs_1",
    created=1_791_201_600,
    livemode=False,
    received_at=1_791_201_601.5,
)


@given(NOTIFICATIONS)
def test_round_trip(notification: Notification) -> None:
    """A packed notification is unpacked field by field; other fields of its entry are skipped."""
    assert unpack({b"notification": pack(notification), b"replay": b"x"}) == notification


def test_what_is_kept_of_a_thin_event() -> None:
    """The type is that of the snapshot event; neither URL nor the request is kept."""
    event = parse(VerifiedPayload((FIXTURES / "thin_event.json").read_bytes(), ""))
    assert isinstance(event, ThinEvent)

    kept = make_notification(
        event,
        received_at=1_791_201_601.5,
        endpoint="acme",
        account_name="shop",
        traceparent=TRACEPARENT,
    )

    assert json.loads(pack(kept)) == {
        "event_id": "evt_test_65TKLoMhb9nQ1iKhBtb16TKLmlF2SQDM6hSX4tYASOWO4e",
        "event_type": "identity.verification_session.verified",
        "session_id": "vs_1PgafTB7WZ01zgkWKhTeq3Xy",
        "created": 1_791_201_600,
        "livemode": False,
        "received_at": 1_791_201_601.5,
        "endpoint": "acme",
        "account_name": "shop",
        "traceparent": TRACEPARENT,
    }


def test_repr_shows_ids_only() -> None:
    """What may be private, such as the names of accounts, is not shown."""
    shown = repr(msgspec.structs.replace(NOTIFICATION, context=CANARY, account_name=CANARY))
    assert CANARY not in shown
    assert "vs_1" in shown


UNREADABLE: dict[str, Any] = {
    "nothing": {},
    "a transition": {b"change": b"{}"},
    "not JSON": {b"notification": CANARY.encode()},
    "no object": {b"notification": b"[]"},
    "incomplete": {b"notification": b'{"event_id": "canary-66600666"}'},
    "mistyped": {b"notification": pack(NOTIFICATION).replace(b"1791201600", b'"canary"')},
    "not UTF-8": {b"notification": b'{"event_id": "canary-66600666\xff"}'},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_entries(name: str) -> None:
    """An entry that is not ours raises an error that holds nothing of it."""
    with pytest.raises(ValueError, match=r"^unreadable$") as refused:
        unpack(UNREADABLE[name])

    assert (refused.value.__context__, refused.value.__cause__) == (None, None)
