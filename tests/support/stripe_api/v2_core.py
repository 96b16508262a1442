"""Events and destinations under /v2/core.

https://docs.stripe.com/api/v2/core/events and https://docs.stripe.com/api/v2/core/event-destinations
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .calls import Call
from .clock import parse_rfc3339
from .destinations import Destination, event_destination_object
from .errors import missing
from .events import Event
from .pages import page_by_token, token_filters
from .parameters import Parameters

EVENTS_URL: Final = "/v2/core/events"
DESTINATIONS_URL: Final = "/v2/core/event_destinations"
MAX_TYPES: Final = 20


def list_events(call: Call) -> dict[str, Any]:
    """Return a page of the thin events that lists show now, the newest first."""
    filters = token_filters(call.parameters) or _sent_filters(call.parameters)
    created = Parameters({"created": filters["created"]}).range("created", parse_rfc3339)
    now = call.stand_in.clock.time()
    retained = call.stand_in.events.retained(call.scope, now, created.start)

    def admits(event: Event) -> bool:
        return (
            event.is_listed(now)
            and (not filters["types"] or event.thin_type in filters["types"])
            and filters["object_id"] in {None, event.related.id}
            and created.admits(event.created)
        )

    return page_by_token(
        call.parameters,
        [event for event in retained if admits(event)],
        url=EVENTS_URL,
        filters=filters,
        id_of=lambda event: event.thin_id,
        render=lambda event: event.as_notification(),
    )


def _sent_filters(parameters: Parameters) -> dict[str, Any]:
    filters = {
        "types": parameters.texts("types", max_length=MAX_TYPES),
        "object_id": parameters.text("object_id"),
        "created": parameters.mapping("created") or {},
    }
    # A wrong time is an error of this request, not of the next page.
    Parameters({"created": filters["created"]}).range("created", parse_rfc3339)
    return filters


def retrieve_event(call: Call) -> Mapping[str, Any]:
    """Return a thin event, with what changed and the id of its snapshot."""
    call.parameters.finish()
    event = call.stand_in.events.find(call.scope, call.id, call.stand_in.clock.time())
    if event.thin_id != call.id:
        raise missing("event", call.id)
    return event.as_thin_event()


def list_destinations(call: Call) -> dict[str, Any]:
    """Return a page of the destinations of this account and mode, the newest first."""
    filters = token_filters(call.parameters) or {"include": call.parameters.texts("include")}
    return page_by_token(
        call.parameters,
        call.stand_in.destinations.of(call.scope),
        url=DESTINATIONS_URL,
        filters=filters,
        id_of=lambda one: one.id,
        render=lambda one: event_destination_object(one, filters["include"]),
    )


def ping_destination(call: Call) -> Mapping[str, Any]:
    """Push a ping to a destination and return its event."""
    call.parameters.finish()
    return call.stand_in.ping(_find(call)).as_thin_event()


def _find(call: Call) -> Destination:
    found = call.stand_in.destinations.all.get(call.id)
    if found is None or found.scope != call.scope:
        raise missing("event_destination", call.id)
    return found
