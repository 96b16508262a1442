"""What the API answers to each request that was let in.

https://docs.stripe.com/api/events, https://docs.stripe.com/api/identity/verification_sessions,
https://docs.stripe.com/api/webhook_endpoints, https://docs.stripe.com/api/v2/core/events and
https://docs.stripe.com/api/v2/core/event-destinations
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

from .calls import Call
from .destinations import event_destination_object, webhook_endpoint_object
from .errors import ApiError, missing
from .events import Event

MAX_LIMIT: Final = 100
DEFAULT_LIMIT: Final = 10
MAX_TYPES: Final = 20


def list_events(call: Call) -> dict[str, Any]:
    """Return a page of the snapshot events that lists show now, the newest first."""
    created, limit = call.parameters.range("created"), _limit(call)
    types = call.parameters.texts("types", max_length=MAX_TYPES)
    after = call.parameters.text("starting_after")
    call.parameters.finish()
    now = call.stand_in.clock.time()
    retained = call.stand_in.events.retained(call.scope, now, created.gte)
    shown = (
        event
        for event in retained[_position(retained, after) :]
        if event.id is not None
        and event.is_listed(now)
        and created.gte <= int(event.created) <= created.lte
        and (not types or event.type in types)
    )
    found = list(islice(shown, limit + 1))
    return _list("/v1/events", [one.as_snapshot() for one in found[:limit]], len(found) > limit)


def _position(events: Sequence[Event], after: str | None) -> int:
    """Return where a page begins: behind the event that the page before it ended with."""
    if after is None:
        return 0
    for number, event in enumerate(events, 1):
        if event.id == after:
            return number
    raise ApiError(
        400, f"No such event: '{after}'", code="resource_missing", param="starting_after"
    )


def retrieve_event(call: Call) -> Mapping[str, Any]:
    """Return a snapshot event, which can be read before lists show it."""
    event = _find_event(call)
    if event.id != call.id:
        raise missing("event", call.id)
    return event.as_snapshot()


def retrieve_thin_event(call: Call) -> Mapping[str, Any]:
    """Return a thin event, with what changed and the id of its snapshot."""
    event = _find_event(call)
    if event.thin_id != call.id:
        raise missing("event", call.id)
    return event.as_thin_event()


def retrieve_session(call: Call) -> Mapping[str, Any]:
    """Return a session as it is now; an open one with a new `client_secret` and `url`."""
    call.parameters.finish()
    return call.stand_in.show(call.stand_in.sessions.find(call.id, call.scope))


def list_endpoints(call: Call) -> dict[str, Any]:
    """Return the webhook endpoints of this account and mode, the newest first."""
    limit = _limit(call)
    call.parameters.finish()
    found = [
        webhook_endpoint_object(one)
        for one in call.stand_in.destinations.of(call.scope)
        if one.payload == "snapshot" and one.url is not None
    ]
    return _list("/v1/webhook_endpoints", found[:limit], len(found) > limit)


def list_destinations(call: Call) -> dict[str, Any]:
    """Return the destinations of this account and mode, the newest first.

    Further pages are not served: an account has few, and the service asks for all at once.
    """
    limit, include = _limit(call), call.parameters.texts("include")
    call.parameters.finish()
    found = call.stand_in.destinations.of(call.scope)
    assert len(found) <= limit
    return {
        "data": [event_destination_object(one, include) for one in found],
        "next_page_url": None,
        "previous_page_url": None,
    }


def _find_event(call: Call) -> Event:
    """Return the event of which either form has the id in the path."""
    call.parameters.finish()
    return call.stand_in.events.find(call.scope, call.id, call.stand_in.clock.time())


def _limit(call: Call) -> int:
    return call.parameters.integer("limit", minimum=1, maximum=MAX_LIMIT, default=DEFAULT_LIMIT)


def _list(url: str, data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {"object": "list", "data": data, "has_more": has_more, "url": url}
