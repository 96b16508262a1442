"""A thin notification: Stripe says that a session has changed, and the event has to be fetched.

What it is fetched from is known to `stripe_api`, how it waits in Redis to `inbox`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import ClassVar

import msgspec
import orjson

from ..stripe.events import ThinEvent
from ..stripe.stripe_object import HiddenRepr

_encode = msgspec.json.Encoder().encode


class Notification(HiddenRepr, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What has to be remembered of a thin event until its session's event is fetched.

    Attributes:
        event_id: The id of the thin event, which the snapshot event does not have.
        event_type: The type of the snapshot event: without `v1.`.
        session_id: The `vs_…` id.
        created: When Stripe created both events, in whole Unix seconds.
        livemode: Whether it is of live mode, and so which API key reads it.
        received_at: When it was received, in Unix seconds.
        context: Stripe's authentication context to read it in; None for your own account.
        endpoint: The endpoint name in the URL that received it; None for the default one.
        account_name: The name that ACCOUNT_NAME gives your own account; None without one.
        snapshot_event_id: The id of the snapshot event, where Stripe has sent it.
        traceparent: The W3C Trace Context in which it was received; absent without tracing.
    """

    shown: ClassVar[tuple[str, ...]] = ("event_id", "event_type", "session_id", "created")

    event_id: str
    event_type: str
    session_id: str
    created: int
    livemode: bool
    received_at: float
    context: str | None = None
    endpoint: str | None = None
    account_name: str | None = None
    snapshot_event_id: str | None = None
    traceparent: str | msgspec.UnsetType = msgspec.UNSET


def make_notification(
    event: ThinEvent,
    *,
    received_at: float,
    endpoint: str | None = None,
    account_name: str | None = None,
    traceparent: str | msgspec.UnsetType = msgspec.UNSET,
) -> Notification:
    """Return what is remembered of *event*."""
    return Notification(
        event_id=event.event_id,
        event_type=event.event_type.removeprefix("v1."),
        session_id=event.session_id,
        created=event.created,
        livemode=event.is_live,
        received_at=received_at,
        context=event.context,
        endpoint=endpoint,
        account_name=account_name,
        snapshot_event_id=event.snapshot_event_id,
        traceparent=traceparent,
    )


def pack(notification: Notification) -> bytes:
    """Encode *notification* as the JSON in the field `notification` of a stream entry."""
    return _encode(notification)


def unpack(entry: Mapping[bytes, bytes]) -> Notification:
    """Decode the notification in a stream entry that the admission script wrote.

    Raises:
        ValueError: The entry is not one of ours.
    """
    with suppress(KeyError, ValueError):
        return msgspec.convert(orjson.loads(entry[b"notification"]), Notification)
    # Not raised inside `except`: the decoder's exception holds its whole input.
    raise ValueError("unreadable")
