"""Events under /v1.

https://docs.stripe.com/api/events
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from .calls import Call
from .errors import ApiError, missing
from .events import Event
from .pages import page_by_id
from .parameters import Parameters

MAX_TYPES: Final = 20


def list_events(call: Call) -> dict[str, Any]:
    """Return a page of the snapshot events that lists show now, the newest first."""
    call.parameters.texts("expand")
    created, now = call.parameters.range("created"), call.stand_in.clock.time()
    admits = _filter(call.parameters)
    retained = call.stand_in.events.retained(call.scope, now, created.start)
    return page_by_id(
        call.parameters,
        [event for event in retained if event.id is not None],
        url="/v1/events",
        kind="event",
        id_of=lambda event: event.id,
        admits=lambda event: (
            created.admits(int(event.created)) and event.is_listed(now) and admits(event)
        ),
        render=lambda event: event.as_snapshot(),
    )


def retrieve_event(call: Call) -> Mapping[str, Any]:
    """Return a snapshot event, which can be read before lists show it."""
    call.parameters.texts("expand")
    call.parameters.finish()
    return _find(call).as_snapshot()


def retry_event(call: Call) -> Mapping[str, Any]:
    """Push an event once more: to `webhook_endpoint`, or to none, as for the CLI."""
    event = _find(call)
    named = call.parameters.text("webhook_endpoint")
    call.parameters.text("account")
    call.parameters.finish()
    if named is not None:
        destination = call.stand_in.destinations.all.get(named)
        if destination is None:
            raise missing("webhook_endpoint", named, param="webhook_endpoint")
        call.stand_in.pushes.resend(event, destination)
    return event.as_snapshot()


def _find(call: Call) -> Event:
    event = call.stand_in.events.find(call.scope, call.id, call.stand_in.clock.time())
    if event.id != call.id:
        raise missing("event", call.id)
    return event


def _filter(parameters: Parameters) -> Callable[[Event], bool]:
    """Return the filter by type and delivery that the parameters ask for.

    Raises:
        ApiError: 400, for both `type` and `types`, or for too many types.
    """
    pattern, types = parameters.text("type"), parameters.texts("types", max_length=MAX_TYPES)
    delivered = parameters.boolean("delivery_success")
    if pattern and types:
        raise ApiError(400, "You may pass only one of type and types.", param="type")

    def admits(event: Event) -> bool:
        return (
            (pattern is None or fnmatchcase(event.type, pattern))
            and (not types or event.type in types)
            and delivered in {None, event.is_delivered}
        )

    return admits
