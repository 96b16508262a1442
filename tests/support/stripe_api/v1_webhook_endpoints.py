"""Webhook endpoints under /v1.

https://docs.stripe.com/api/webhook_endpoints
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .calls import Call
from .destinations import Destination, webhook_endpoint_object
from .errors import ApiError, missing
from .pages import page_by_id

URL: Final = "/v1/webhook_endpoints"


def list_endpoints(call: Call) -> dict[str, Any]:
    """Return a page of the endpoints of this account and mode, the newest first."""
    return page_by_id(
        call.parameters,
        [one for one in call.stand_in.destinations.of(call.scope) if _is_endpoint(one)],
        url=URL,
        kind="webhook_endpoint",
        id_of=lambda one: one.id,
        render=webhook_endpoint_object,
    )


def create_endpoint(call: Call) -> dict[str, Any]:
    """Create an endpoint; only this answer holds its secret."""
    parameters = call.parameters
    url, events = parameters.text("url"), parameters.texts("enabled_events")
    is_connect = parameters.boolean("connect") or False
    version = parameters.text("api_version")
    name = parameters.text("description") or ""
    parameters.mapping("metadata")
    parameters.finish()
    for param, value in (("url", url), ("enabled_events", events)):
        if not value:
            raise ApiError(
                400, f"Missing required param: {param}.", code="parameter_missing", param=param
            )
    endpoint = call.stand_in.subscribe(
        url,
        events=events,
        scope=call.scope,
        accounts=is_connect,
        own=not is_connect,
        api_version=version,
        name=name,
    )
    return {**webhook_endpoint_object(endpoint), "secret": endpoint.secret}


def retrieve_endpoint(call: Call) -> Mapping[str, Any]:
    """Return an endpoint."""
    call.parameters.finish()
    return webhook_endpoint_object(_find(call))


def update_endpoint(call: Call) -> Mapping[str, Any]:
    """Disable an endpoint or enable it, or change its URL or its types."""
    endpoint, parameters = _find(call), call.parameters
    disabled, url = parameters.boolean("disabled"), parameters.text("url")
    events = parameters.texts("enabled_events")
    parameters.finish()
    endpoint.is_enabled = endpoint.is_enabled if disabled is None else not disabled
    endpoint.url = url or endpoint.url
    endpoint.enabled_events = events or endpoint.enabled_events
    return webhook_endpoint_object(endpoint)


def delete_endpoint(call: Call) -> Mapping[str, Any]:
    """Delete an endpoint: it gets no more events, and no retries."""
    endpoint = _find(call)
    endpoint.is_enabled = False
    del call.stand_in.destinations.all[endpoint.id]
    return {"id": endpoint.id, "object": "webhook_endpoint", "deleted": True}


def _find(call: Call) -> Destination:
    found = call.stand_in.destinations.all.get(call.id)
    if found is None or found.scope != call.scope or not _is_endpoint(found):
        raise missing("webhook_endpoint", call.id, param="webhook_endpoint")
    return found


def _is_endpoint(destination: Destination) -> bool:
    return destination.payload == "snapshot" and destination.type == "webhook_endpoint"
