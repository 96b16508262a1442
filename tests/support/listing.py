"""Events as the list of the stand-in for Stripe has them, and the transitions that they made."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe_api.event_pages import ListedEvent
from service.transitions import stream_entry
from service.transitions.transition import StatusTransition
from tests.support.stripe_api import Event


def listed(events: Iterable[Event]) -> list[ListedEvent]:
    """Return what a page holds of *events*."""
    return [
        ListedEvent(
            event_id=event.id,
            event_type=event.type,
            created=int(event.created),
            session_id=event.session_id,
            body=orjson.dumps(event.as_snapshot()),
        )
        for event in events
        if event.id is not None
    ]


async def transitions(connections: Connections, keys: Keys) -> list[StatusTransition]:
    """Return everything that handlers get, those of each session in order."""
    return [
        stream_entry.unpack(fields)
        for partition in range(keys.partitions)
        for _, fields in await connections.client.xrange(keys.transitions(partition))
    ]
