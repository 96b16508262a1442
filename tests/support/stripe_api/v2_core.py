"""Events and destinations under /v2/core.

https://docs.stripe.com/api/v2/core/events and https://docs.stripe.com/api/v2/core/event-destinations
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .calls import Call
from .clock import parse_rfc3339
from .destinations import ACCOUNTS, SELF, Destination, event_destination_object
from .errors import ApiError, invalid, missing
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
    retained = call.stand_in.events.retained(call.scope, now)
    names_twin = call.stand_in.list_names_twin

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
        render=lambda event: event.as_notification(names_twin=names_twin),
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
        render=lambda one: event_destination_object(one, _shown(filters["include"])),
    )


def create_destination(call: Call) -> Mapping[str, Any]:
    """Create a destination; only this answer can hold its secret."""
    parameters = call.parameters
    include = parameters.texts("include")
    payload, kind = parameters.text("event_payload"), parameters.text("type")
    endpoint = parameters.mapping("webhook_endpoint") or {}
    events, events_from = parameters.texts("enabled_events"), parameters.texts("events_from")
    name, version = parameters.text("name"), parameters.text("snapshot_api_version")
    parameters.text("description")
    parameters.mapping("metadata")
    parameters.finish()
    if payload not in {"snapshot", "thin"}:
        raise invalid("event_payload", "Must be one of snapshot or thin.")
    if kind != "webhook_endpoint" or "url" not in endpoint or not events:
        raise ApiError(400, "Only webhook endpoints can be created here.", param="type")
    destination = call.stand_in.subscribe(
        endpoint["url"],
        payload="thin" if payload == "thin" else "snapshot",
        events=events,
        scope=call.scope,
        accounts=ACCOUNTS in events_from,
        own=not events_from or SELF in events_from,
        api_version=version,
        name=name or "",
    )
    return event_destination_object(destination, include)


def retrieve_destination(call: Call) -> Mapping[str, Any]:
    """Return a destination."""
    include = call.parameters.texts("include")
    call.parameters.finish()
    return event_destination_object(_find(call), _shown(include))


def enable_destination(call: Call) -> Mapping[str, Any]:
    """Let a destination get events again."""
    return _enable(call, is_enabled=True)


def disable_destination(call: Call) -> Mapping[str, Any]:
    """Let a destination get no events."""
    return _enable(call, is_enabled=False)


def ping_destination(call: Call) -> Mapping[str, Any]:
    """Push a ping to a destination and return its event."""
    call.parameters.finish()
    return call.stand_in.ping(_find(call)).as_thin_event()


def _enable(call: Call, *, is_enabled: bool) -> Mapping[str, Any]:
    call.parameters.finish()
    destination = _find(call)
    destination.is_enabled = is_enabled
    return event_destination_object(destination)


def _find(call: Call) -> Destination:
    found = call.stand_in.destinations.all.get(call.id)
    if found is None or found.scope != call.scope:
        raise missing("event_destination", call.id)
    return found


def _shown(include: list[str]) -> list[str]:
    """Return what may be included in an answer that creates nothing: not the secret."""
    return [name for name in include if name != "webhook_endpoint.signing_secret"]
