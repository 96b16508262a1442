"""Webhook endpoints under /v1.

https://docs.stripe.com/api/webhook_endpoints
"""

from __future__ import annotations

from typing import Any, Final

from .calls import Call
from .destinations import Destination, webhook_endpoint_object
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


def _is_endpoint(destination: Destination) -> bool:
    return destination.payload == "snapshot" and destination.type == "webhook_endpoint"
