"""Events of the stand-in as a receiver has them: a snapshot's parsed, a thin one's noted."""

from __future__ import annotations

import time

import orjson

from service.stripe.events import Event, ThinEvent, parse
from service.stripe.signatures import VerifiedPayload
from service.transitions.thin_notification import Notification, make_notification
from tests.support.stripe_api import Event as StandInEvent


def pushed(event: StandInEvent) -> Event:
    """Return the snapshot event that is pushed for an event."""
    found = parse(VerifiedPayload(orjson.dumps(event.as_snapshot()), "fingerprint"))
    assert isinstance(found, Event)
    return found


def notification_of(
    event: StandInEvent, *, names_snapshot: bool = False, endpoint: str | None = None
) -> Notification:
    """Return what is noted of the thin event that is pushed for an event."""
    body = orjson.dumps(event.as_notification(names_snapshot=names_snapshot))
    found = parse(VerifiedPayload(body, "fingerprint"))
    assert isinstance(found, ThinEvent)
    return make_notification(found, received_at=time.time(), endpoint=endpoint, account_name="shop")
