"""What Stripe is set up to send here: webhook endpoints and event destinations.

A webhook endpoint gets snapshot events and is listed by /v1, a destination of thin events by /v2.
Both are a `Destination` here. One whose path is not ours, or that selects no event about
verification sessions, is left out. What is wrong with them is judged in `endpoints`.

https://docs.stripe.com/api/webhook_endpoints, https://docs.stripe.com/api/v2/core/event-destinations
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from ..config import WEBHOOK_PATH
from ..errors import ApiError, ApiErrorReason
from ..stripe.events import EVENT_TYPE_PREFIX, THIN_EVENT_TYPE_PREFIX
from ..transitions.lifecycle import TYPE_RANKS
from .client import ApiEndpoint, Caller, StripeApi, decode_answer
from .rate_limit import Priority

ALL_TYPES: Final = tuple(TYPE_RANKS)
REDACTED: Final = f"{EVENT_TYPE_PREFIX}redacted"

WILDCARD: Final = "*"
# Stripe sends events of this type only where they are selected by name.
WILDCARD_TYPES: Final = frozenset(ALL_TYPES) - {REDACTED}
# A proxy may serve our path below another one.
_OUR_URL: Final = re.compile(
    rf"https?://[^/?#]+(/[^?#]*)?{re.escape(WEBHOOK_PATH)}(?P<endpoint>/[A-Za-z0-9_]{{1,64}})?([?#].*)?",
    re.DOTALL,
)
# Both have had two names.
_SELF: Final = {"@self", "self"}
_ACCOUNTS: Final = {"@accounts", "other_accounts"}

_Id = Annotated[str, msgspec.Meta(pattern=r"\A[a-z]{2}_[A-Za-z0-9_]{1,250}\Z")]


class Destination(NamedTuple):
    """A URL of ours that Stripe sends events about verification sessions to.

    Attributes:
        id: `we_…` or `ed_…`.
        url: The URL.
        is_thin: Whether it gets thin events.
        is_enabled: Whether it gets any at present.
        for_own: Whether it gets the events of the account that owns it.
        for_connected: Whether it gets the events of connected accounts.
        has_wildcard: Whether it selects all types.
        types: The types that it selects, by the names of snapshot events.
    """

    id: str
    url: str
    is_thin: bool
    is_enabled: bool
    for_own: bool
    for_connected: bool
    has_wildcard: bool
    types: frozenset[str]

    @property
    def path(self) -> str:
        """The path of the URL as this service knows it; neither a proxy's part nor a query."""
        found = _OUR_URL.fullmatch(self.url)
        return WEBHOOK_PATH + (found["endpoint"] or "") if found else ""

    def serves(self, *, connected: bool) -> bool:
        """Say whether it gets the events of connected accounts, or else of the own account."""
        return self.for_connected if connected else self.for_own


class Survey(NamedTuple):
    """What the key of one mode sees.

    Attributes:
        is_live: The mode.
        destinations: What Stripe is set up to send here, now or once it is enabled.
        failures: Why some list could not be read; then the destinations are not known.
    """

    is_live: bool
    destinations: Sequence[Destination]
    failures: dict[ApiEndpoint, ApiErrorReason]

    @property
    def mode(self) -> str:
        """The mode as a word."""
        return "live" if self.is_live else "test"

    def selected_types(self, *, connected: bool) -> Sequence[str]:
        """Return the types to read of connected accounts, or else of the own account.

        A disabled destination counts, because what it selects is missed now. Where there is none,
        or none is known, these are all types.
        """
        serving = [one.types for one in self.destinations if one.serves(connected=connected)]
        selected = frozenset().union(*serving)
        return [each for each in ALL_TYPES if each in selected] or ALL_TYPES


class _WebhookEndpoint(msgspec.Struct, frozen=True, gc=False):
    object: Literal["webhook_endpoint"]
    id: _Id
    url: str
    status: str
    enabled_events: list[str]
    application: str | None = None


class _Webhook(msgspec.Struct, frozen=True, gc=False):
    url: str | None = None


class _EventDestination(msgspec.Struct, frozen=True, gc=False):
    object: Literal["v2.core.event_destination"]
    id: _Id
    event_payload: str
    status: str
    enabled_events: list[str]
    events_from: list[str] | None = None
    webhook_endpoint: _Webhook | None = None


class _WebhookEndpoints(msgspec.Struct, frozen=True, gc=False):
    data: list[_WebhookEndpoint]


class _EventDestinations(msgspec.Struct, frozen=True, gc=False):
    data: list[_EventDestination]


_decode_endpoints = msgspec.json.Decoder(_WebhookEndpoints).decode
_decode_destinations = msgspec.json.Decoder(_EventDestinations).decode

# What is read of each mode. An account may have 16 endpoints: one page has all of them. Of the
# events it matters only that they may be read.
_LISTS: Final[dict[ApiEndpoint, tuple[str, Sequence[tuple[str, str]]]]] = {
    ApiEndpoint.EVENTS: ("/v1/events", [("types[]", REDACTED), ("limit", "1")]),
    ApiEndpoint.WEBHOOK_ENDPOINTS: ("/v1/webhook_endpoints", [("limit", "100")]),
    ApiEndpoint.EVENT_DESTINATIONS: (
        "/v2/core/event_destinations",
        [("include[]", "webhook_endpoint.url"), ("limit", "100")],
    ),
}


async def survey_all(api: StripeApi, priority: Priority) -> list[Survey]:
    """Return what each key sees, live mode first; that one may not see something is part of it.

    Raises:
        Unavailable: Redis, where the budget of requests is, did not answer.
    """
    return [
        await _survey(api, is_live=is_live, priority=priority)
        for is_live in (True, False)
        if api.holds(is_live)
    ]


async def _survey(api: StripeApi, *, is_live: bool, priority: Priority) -> Survey:
    caller = Caller(is_live=is_live)
    found: list[Destination] = []
    failures: dict[ApiEndpoint, ApiErrorReason] = {}
    for endpoint, (path, params) in _LISTS.items():
        try:
            body = await api.get(path, params, caller=caller, priority=priority, endpoint=endpoint)
            found += _destinations(endpoint, body)
        except ApiError as error:
            failures[endpoint] = error.reason
            if error.reason is not ApiErrorReason.FORBIDDEN:
                # The other lists could not be read either.
                break
    return Survey(is_live, [] if failures else found, failures)


def _destinations(endpoint: ApiEndpoint, body: bytes) -> Iterator[Destination]:
    """Yield the destinations of a list that are ours."""
    if endpoint is ApiEndpoint.WEBHOOK_ENDPOINTS:
        described = map(_of_webhook_endpoint, decode_answer(_decode_endpoints, body).data)
    elif endpoint is ApiEndpoint.EVENT_DESTINATIONS:
        # Those of snapshots are webhook endpoints, which the other list has.
        thin = [
            each
            for each in decode_answer(_decode_destinations, body).data
            if each.event_payload == "thin"
        ]
        described = map(_of_thin_destination, thin)
    else:
        return
    yield from (each for each in described if each.types and _OUR_URL.fullmatch(each.url))


def _of_webhook_endpoint(found: _WebhookEndpoint) -> Destination:
    is_for_connected = found.application is not None
    return Destination(
        id=found.id,
        url=found.url,
        is_thin=False,
        is_enabled=found.status == "enabled",
        for_own=not is_for_connected,
        for_connected=is_for_connected,
        has_wildcard=WILDCARD in found.enabled_events,
        types=_types(found.enabled_events, EVENT_TYPE_PREFIX),
    )


def _of_thin_destination(found: _EventDestination) -> Destination:
    senders = {*(found.events_from or _SELF)}
    return Destination(
        id=found.id,
        url=(found.webhook_endpoint.url if found.webhook_endpoint else None) or "",
        is_thin=True,
        is_enabled=found.status == "enabled",
        for_own=bool(senders & _SELF),
        for_connected=bool(senders & _ACCOUNTS),
        has_wildcard=WILDCARD in found.enabled_events,
        types=_types(found.enabled_events, THIN_EVENT_TYPE_PREFIX),
    )


def _types(enabled_events: Sequence[str], prefix: str) -> frozenset[str]:
    """Return which of our types are selected, where their names begin with *prefix*."""
    named = {
        EVENT_TYPE_PREFIX + each.removeprefix(prefix)
        for each in enabled_events
        if each.startswith(prefix)
    }
    by_wildcard = WILDCARD_TYPES if WILDCARD in enabled_events else frozenset()
    return by_wildcard | (named & {*ALL_TYPES})
