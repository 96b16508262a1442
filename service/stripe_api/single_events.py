"""Reads the event of one notification: the snapshot event that Stripe made with the thin one.

    1  the thin event names the snapshot event, unless the             GET /v2/core/events/…
       notification has named it
    2  the snapshot event holds the session as it was                  GET /v1/events/…
    3  where Stripe has none: the session as it is now                 GET /v1/identity/…

The third way makes an event that Stripe never made. Its id is `read:` and that of the notification;
it has the type and the time of the notification. With the time of the reading it would count as
later than events that are still on their way.

An answer that is not what was asked for is `api_unexpected`, whatever is wrong with it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

import msgspec

from ..errors import ApiError, ApiErrorReason, Rejected
from ..stripe.events import ApiPayload, Event, EventId, parse
from ..transitions.thin_notification import Notification
from .client import ApiEndpoint, Caller, StripeApi, decode_answer
from .rate_limit import Priority

READ_PREFIX = "read:"


class _RelatedObject(msgspec.Struct, frozen=True, gc=False):
    id: str


class _ThinEvent(msgspec.Struct, frozen=True, gc=False):
    """What is needed of a thin event; the notification has the rest."""

    object: Literal["v2.core.event"]
    id: str
    related_object: _RelatedObject
    snapshot_event: EventId | None = None


class _Session(msgspec.Struct, frozen=True, gc=False):
    """What shows that a session is the right one; the rest is parsed as that of an event."""

    object: Literal["identity.verification_session"]
    id: str
    livemode: bool


_decode_thin_event = msgspec.json.Decoder(_ThinEvent).decode
_decode_session = msgspec.json.Decoder(_Session).decode
_encode = msgspec.json.Encoder().encode


def caller_of(notification: Notification) -> Caller:
    """Return whose event it is."""
    return Caller(notification.livemode, context=notification.context)


async def read_event(api: StripeApi, notification: Notification) -> Event:
    """Return a notification's snapshot event, else an event made of its session's present state.

    Raises:
        ApiError: The session is gone as well, or Stripe's API did not answer as it should.
        Unavailable: Redis, where the budget of requests is, did not answer.
    """
    try:
        event_id = notification.snapshot_event_id or await _read_snapshot_id(api, notification)
        if event_id is not None:
            return await _read_snapshot(api, notification, event_id)
    except ApiError as error:
        if error.reason is not ApiErrorReason.NOT_FOUND:
            raise
    return await _read_session(api, notification)


def parse_snapshot(body: bytes, notification: Notification, event_id: str) -> Event:
    """Return the event in an answer of Stripe's API, with the account that it was read from.

    Stripe names the account in the webhooks of connected accounts, but need not in what is read in
    the name of that account.

    Raises:
        ApiError: It is not the event with this id, or not about what the notification is about.
    """
    event, account = _parse(body), _account_of(notification)
    is_announced = (
        (event.object, event.id) == ("event", event_id)
        and event.type == notification.event_type
        and event.session.id == notification.session_id
        and event.is_live == notification.livemode
        and (account is None or event.account in {None, account})
    )
    if not is_announced:
        raise ApiError(ApiErrorReason.UNEXPECTED)
    return msgspec.structs.replace(event, account=account or event.account)


async def _read_snapshot_id(api: StripeApi, notification: Notification) -> str | None:
    path = f"/v2/core/events/{notification.event_id}"
    body = await _get(api, notification, path, ApiEndpoint.THIN_EVENT)
    found = decode_answer(_decode_thin_event, body)
    if (found.id, found.related_object.id) != (notification.event_id, notification.session_id):
        raise ApiError(ApiErrorReason.UNEXPECTED)
    return found.snapshot_event


async def _read_snapshot(api: StripeApi, notification: Notification, event_id: str) -> Event:
    body = await _get(api, notification, f"/v1/events/{event_id}", ApiEndpoint.EVENT)
    return parse_snapshot(body, notification, event_id)


async def _read_session(api: StripeApi, notification: Notification) -> Event:
    """Return the event that Stripe would have made, if the session had been then as it is now."""
    path = f"/v1/identity/verification_sessions/{notification.session_id}"
    body = await _get(api, notification, path, ApiEndpoint.SESSION)
    found = decode_answer(_decode_session, body)
    if (found.id, found.livemode) != (notification.session_id, notification.livemode):
        raise ApiError(ApiErrorReason.UNEXPECTED)
    envelope = {
        "object": "event",
        "id": notification.event_id,
        "type": notification.event_type,
        "created": notification.created,
        "livemode": notification.livemode,
        "account": _account_of(notification),
        "context": notification.context,
        "data": {"object": msgspec.Raw(body)},
    }
    event = _parse(_encode(envelope))
    return msgspec.structs.replace(event, id=f"{READ_PREFIX}{notification.event_id}")


def _account_of(notification: Notification) -> str | None:
    """Return the connected account that a notification's context names."""
    # A context is a path of accounts; the event belongs to the last one.
    account = (notification.context or "").rpartition("/")[2]
    return account if account.startswith("acct_") else None


async def _get(
    api: StripeApi, notification: Notification, path: str, endpoint: ApiEndpoint
) -> bytes:
    return await api.get(
        path, caller=caller_of(notification), priority=Priority.FETCH, endpoint=endpoint
    )


def _parse(body: bytes) -> Event:
    with suppress(Rejected):
        event = parse(ApiPayload(body))
        if isinstance(event, Event):
            return event
    raise ApiError(ApiErrorReason.UNEXPECTED)
