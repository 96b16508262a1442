"""Where events are pushed: webhook endpoints (v1) and event destinations (v2).

A webhook endpoint and a destination for snapshots are one object, shown by both APIs; that both
show it under the same id is an assumption. A destination for thin events is shown by /v2 only.
https://docs.stripe.com/event-destinations
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from .accounts import Scope
from .clock import rfc3339

# `*` does not select these, and they are made only if a destination names them.
SELECTION_REQUIRED: Final = frozenset({"identity.verification_session.redacted"})
SELF, ACCOUNTS = "@self", "@accounts"

Payload = Literal["snapshot", "thin"]


@dataclass(kw_only=True)
class Destination:
    """An endpoint that events are pushed to, or a bus of a cloud, which gets none here.

    Attributes:
        id: `we_…` if it was made as a webhook endpoint, else `ed_…`.
        scope: The account that owns it, and its mode.
        payload: What it gets.
        url: Where; None for the bus of a cloud.
        secret: The secret that pushes are signed with, `whsec_…`.
        enabled_events: Types, or `*`.
        events_from: `@self`, `@accounts` or both.
        is_enabled: Whether it gets events now.
        created: Unix seconds.
    """

    id: str
    scope: Scope
    payload: Payload
    url: str | None
    secret: str = field(repr=False)
    enabled_events: list[str]
    events_from: list[str]
    created: float
    is_enabled: bool

    def names(self, snapshot_type: str) -> bool:
        """Return whether the type of a snapshot event is among `enabled_events` by name."""
        prefix = "v1." if self.payload == "thin" else ""
        return prefix + snapshot_type in self.enabled_events

    def selects(self, snapshot_type: str) -> bool:
        """Return whether it gets events of this type."""
        everything = "*" in self.enabled_events and snapshot_type not in SELECTION_REQUIRED
        return everything or self.names(snapshot_type)


class Destinations:
    """All destinations of all accounts."""

    def __init__(self) -> None:
        self.all: dict[str, Destination] = {}

    def add(self, destination: Destination) -> Destination:
        """Add a destination."""
        self.all[destination.id] = destination
        return destination

    def hearing(self, scope: Scope, platform: str | None) -> Iterator[Destination]:
        """Yield the destinations that get events of an account, whatever their types.

        A live endpoint for connected accounts gets their test events too.
        https://docs.stripe.com/connect/webhooks
        """
        for one in self.all.values():
            is_own = one.scope == scope and SELF in one.events_from
            is_platforms = one.scope.account == platform and ACCOUNTS in one.events_from
            if is_own or (is_platforms and one.scope.livemode in {scope.livemode, True}):
                yield one

    def of(self, scope: Scope) -> list[Destination]:
        """Return the destinations that an account owns, the newest first."""
        return [one for one in reversed(self.all.values()) if one.scope == scope]


def webhook_endpoint_object(destination: Destination) -> dict[str, Any]:
    """Return a destination as https://docs.stripe.com/api/webhook_endpoints/object has it."""
    return {
        "id": destination.id,
        "object": "webhook_endpoint",
        "api_version": None,
        "application": "ca_standin" if ACCOUNTS in destination.events_from else None,
        "created": int(destination.created),
        "description": "stand-in",
        "enabled_events": list(destination.enabled_events),
        "livemode": destination.scope.livemode,
        "metadata": {},
        "status": "enabled" if destination.is_enabled else "disabled",
        "url": destination.url,
    }


def event_destination_object(
    destination: Destination, include: Collection[str] = ()
) -> dict[str, Any]:
    """Return a destination as https://docs.stripe.com/api/v2/core/event_destinations has it.

    Args:
        destination: The destination.
        include: `webhook_endpoint.url` is shown if named.
    """
    url = destination.url if "webhook_endpoint.url" in include else None
    is_webhook = destination.url is not None
    disabled = {"disabled": {"reason": "user"}}
    return {
        "id": destination.id,
        "object": "v2.core.event_destination",
        "created": rfc3339(destination.created),
        "description": "",
        "enabled_events": list(destination.enabled_events),
        "event_payload": destination.payload,
        "events_from": list(destination.events_from),
        "livemode": destination.scope.livemode,
        "metadata": {},
        "name": "stand-in",
        "snapshot_api_version": None,
        "status": "enabled" if destination.is_enabled else "disabled",
        "status_details": None if destination.is_enabled else disabled,
        "type": "webhook_endpoint" if is_webhook else "amazon_eventbridge",
        "updated": rfc3339(destination.created),
        "webhook_endpoint": {"signing_secret": None, "url": url} if is_webhook else None,
    }
