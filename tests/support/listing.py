"""Events of the stand-in for Stripe as its list has them, without asking for the list."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from service.stripe_api.event_pages import ListedEvent
from tests.support.stripe_api import Event


def listed(events: Iterable[Event]) -> list[ListedEvent]:
    """Return what a page holds of *events*."""
    return [
        ListedEvent(
            event_id=event.id,
            event_type=event.type,
            created=int(event.created),
            session_id=event.related.id,
            body=orjson.dumps(event.as_snapshot()),
        )
        for event in events
        if event.id is not None
    ]
