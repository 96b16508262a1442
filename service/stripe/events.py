"""Stripe's envelope: from proven bytes to an `Event`, or to the reason why it is not for us.

The only module that knows what an event of Stripe's looks like. What a session is lives in
`sessions`; what follows from an event is decided elsewhere. https://docs.stripe.com/api/events
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import msgspec

from ..errors import Rejected, RejectionReason
from .decoding import convert, decode, leave_out
from .signatures import VerifiedPayload
from .verification_report import EpochSeconds, secret_hook
from .verification_session import VerificationSession

EVENT_TYPE_PREFIX = "identity.verification_session."
# The `object` of a notification that leaves its object out, and the types of those about a session.
THIN = "v2.core.event"
THIN_TYPE_PREFIX = f"v1.{EVENT_TYPE_PREFIX}"

_EVENT_ID = r"\Aevt_[A-Za-z0-9_]{1,250}\Z"
EventId = Annotated[str, msgspec.Meta(pattern=_EVENT_ID)]

_SESSION_ID = re.compile(r"vs_[A-Za-z0-9_]{1,250}")
# What is needed, and what must not be taken for its opposite when it cannot be read.
_NEEDED = frozenset(
    {
        *("id", "type", "created", "livemode", "account", "data", "data.object"),
        *("data.object.id", "data.object.status", "data.object.livemode"),
        *("data.object.redaction", "data.object.redaction.status"),
    }
)


class IgnoredReason(StrEnum):
    """Why a genuine event is nothing for us: the closed list that logs share."""

    OTHER_TYPE = "other_type"
    THIN = "thin"
    LIVEMODE = "livemode"


class Ignored(NamedTuple):
    """A genuine notification that nobody here waits for."""

    reason: IgnoredReason
    event_id: str | None
    event_type: str


class Notification(NamedTuple):
    """A thin event about a verification session: what happened to it, but not what it is now.

    Attributes:
        event_id: The notification's own id; its snapshot has another.
        event_type: `v1.identity.verification_session.` and a word.
        is_live: Whether this is of Stripe's live world; one that does not say is.
    """

    event_id: str | None
    event_type: str
    is_live: bool


class EventRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The API request behind an event; both None when Stripe acted by itself."""

    id: str | None = None
    idempotency_key: str | None = None


class _Wrapped(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    object: VerificationSession


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A snapshot event about a verification session.

    Attributes:
        id: `evt_…`, the same in every copy and resend.
        object: `event`, which tells it from a thin notification.
        type: `identity.verification_session.` and a word.
        created: Unix seconds.
        data: The envelope's wrapper; read `session` instead.
        livemode: False in test mode.
        account: The connected account the event is of.
        context: The authentication context to fetch the object with.
        api_version: The version that rendered the session.
        pending_webhooks: Endpoints still undelivered; differs between copies.
        request: The API request behind it; a bare id in very old API versions.
        skipped_fields: Paths of fields that nobody needs, and that are not what they used to be.
    """

    id: EventId
    type: str
    created: EpochSeconds
    data: _Wrapped
    object: str | None = None
    livemode: bool | None = None
    account: str | None = None
    context: str | None = None
    api_version: str | None = None
    pending_webhooks: int | None = None
    request: EventRequest | str | None = None
    skipped_fields: tuple[str, ...] = ()

    @property
    def session(self) -> VerificationSession:
        """The session as it was when the event was created."""
        return self.data.object

    @property
    def is_live(self) -> bool:
        """Whether this is of Stripe's live world, by the envelope's word, else the session's."""
        livemode = self.session.livemode if self.livemode is None else self.livemode
        return livemode is not False


_decode = msgspec.json.Decoder(Event, dec_hook=secret_hook).decode


def parse(payload: VerifiedPayload) -> Event | Notification | Ignored:
    """Return the event in *payload*, a notification of one, or why it is nothing for us.

    Raises:
        Rejected: With `body_not_json`, `body_not_an_event`, `field_missing` or
            `field_mistyped`; the last two name the field's path.
    """
    return _documented(payload.body) or _whatever(payload.body)


def _documented(body: bytes) -> Event | None:
    """Return an event that is as Stripe documents it, without a tree of everything in between.

    What `_whatever` would refuse or mend is left to it, and so is what the decoder does not look
    at where nobody needs it: text that may be no UTF-8, and an `skipped_fields` of the sender's.
    """
    if not body.isascii():
        return None
    try:
        event = _decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    session = event.data.object
    is_ours = (
        event.type.startswith(EVENT_TYPE_PREFIX)
        and event.object != THIN
        and not event.skipped_fields
    )
    return event if is_ours and session.status and _SESSION_ID.fullmatch(session.id) else None


def _whatever(body: bytes) -> Event | Notification | Ignored:
    found = decode(body)
    if found is None:
        raise Rejected(RejectionReason.BODY_NOT_JSON)
    if not isinstance(found.value, dict):
        raise Rejected(RejectionReason.BODY_NOT_AN_EVENT)
    return _without_session(found.value) or _event(found.value, has_half_pairs=found.has_half_pairs)


def _without_session(found: dict[str, Any]) -> Notification | Ignored | None:
    """Return a notification, or why *found* is not for us, judged by its type alone."""
    event_type = found.get("type")
    if not isinstance(event_type, str):
        reason = (
            RejectionReason.FIELD_MISTYPED if "type" in found else RejectionReason.FIELD_MISSING
        )
        raise Rejected(reason, "type")
    is_thin = found.get("object") == THIN
    if not is_thin and event_type.startswith(EVENT_TYPE_PREFIX):
        return None
    sent_id = found.get("id")
    is_id = isinstance(sent_id, str) and re.search(_EVENT_ID, sent_id)
    event_id = sent_id if is_id else None
    if is_thin and event_type.startswith(THIN_TYPE_PREFIX):
        return Notification(event_id, event_type, found.get("livemode") is not False)
    why = IgnoredReason.THIN if is_thin else IgnoredReason.OTHER_TYPE
    return Ignored(why, event_id, event_type)


def _event(found: dict[str, Any], *, has_half_pairs: bool) -> Event:
    """Convert leniently, but for numbers that were no integers when they were sent.

    What nobody needs and cannot be read is left out: were it refused, then so would every event
    be from the day on which Stripe sends it otherwise.
    """
    if isinstance(found.get("created"), float):
        raise Rejected(RejectionReason.FIELD_MISTYPED, "created")
    found["skipped_fields"] = ()
    event = None if has_half_pairs else convert(found, Event)
    if event is None:
        left_out = leave_out(found, Event, _NEEDED, has_half_pairs=has_half_pairs)
        found["skipped_fields"] = tuple(left_out)
        event = convert(found, Event)
    if event is None:
        raise Rejected(RejectionReason.BODY_NOT_AN_EVENT)
    if not _SESSION_ID.fullmatch(event.session.id):
        raise Rejected(RejectionReason.FIELD_MISTYPED, "data.object.id")
    if not event.session.status:
        raise Rejected(RejectionReason.FIELD_MISTYPED, "data.object.status")
    return event
