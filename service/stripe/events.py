"""Parses Stripe events: a verified payload becomes an `Event`, a `ThinEvent` or is `Ignored`.

The only module that knows the envelope of Stripe's events. The session in it is defined in
`verification_session`; what follows from an event is decided elsewhere.

There are two parsers. The strict one decodes events that are as Stripe documents them, directly
into structs. The lenient one takes everything else: it accepts, repairs, ignores or rejects it. It
would do alone, for 6 % more CPU per event. https://docs.stripe.com/api/events
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import msgspec

from ..errors import Rejected, RejectionReason
from .decoding import convert, decode, remove_unreadable
from .signatures import VerifiedPayload
from .verification_report import EpochSeconds, decode_secret
from .verification_session import VerificationSession

EVENT_TYPE_PREFIX = "identity.verification_session."
# The `object` of a thin event, which does not contain the session, and its types about sessions.
THIN_EVENT_OBJECT = "v2.core.event"
THIN_EVENT_TYPE_PREFIX = f"v1.{EVENT_TYPE_PREFIX}"

_EVENT_ID = r"\Aevt_[A-Za-z0-9_]{1,250}\Z"
EventId = Annotated[str, msgspec.Meta(pattern=_EVENT_ID)]

_SESSION_ID = re.compile(r"vs_[A-Za-z0-9_]{1,250}")
# Fields that must be readable if they are present. Stripe does not always send all of them, but an
# unreadable one must not be mistaken for a missing one: `livemode` would become true, for example.
_NEEDED = frozenset(
    {
        *("id", "type", "created", "livemode", "account", "data", "data.object"),
        *("data.object.id", "data.object.status", "data.object.livemode"),
        *("data.object.redaction", "data.object.redaction.status"),
    }
)


class IgnoredReason(StrEnum):
    """Why a verified event is ignored: a closed list."""

    OTHER_TYPE = "other_type"
    THIN = "thin"
    LIVEMODE = "livemode"


class Ignored(NamedTuple):
    """A verified event that this service has no use for."""

    reason: IgnoredReason
    event_id: str | None
    event_type: str


class ThinEvent(NamedTuple):
    """A thin event about a verification session: what happened to it, without its state.

    Attributes:
        event_id: The id of the thin event; the snapshot event has another one.
        event_type: `v1.identity.verification_session.` and a word.
        is_live: Whether it is of live mode; also true if it does not say.
    """

    event_id: str | None
    event_type: str
    is_live: bool


class EventRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The API request that caused an event; both fields are None if Stripe acted by itself."""

    id: str | None = None
    idempotency_key: str | None = None


class _Wrapper(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    object: VerificationSession


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A snapshot event about a verification session.

    Attributes:
        id: `evt_…`, the same in every copy and resend.
        object: `event`; a thin event has `v2.core.event`.
        type: `identity.verification_session.` and a word.
        created: Unix seconds.
        data: The envelope's wrapper; read `session` instead.
        livemode: False in test mode.
        account: The connected account that the event belongs to.
        context: The authentication context to fetch the object with.
        api_version: The version that rendered the session.
        pending_webhooks: Endpoints still undelivered; differs between copies.
        request: The API request that caused it; a bare id in very old API versions.
        skipped_fields: Paths of unneeded fields that were removed because they were unreadable.
    """

    id: EventId
    type: str
    created: EpochSeconds
    data: _Wrapper
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
        """Whether it is of live mode: as the envelope says, else as the session says, else yes."""
        livemode = self.session.livemode if self.livemode is None else self.livemode
        return livemode is not False


_decode = msgspec.json.Decoder(Event, dec_hook=decode_secret).decode


def parse(payload: VerifiedPayload) -> Event | ThinEvent | Ignored:
    """Return the event in *payload*.

    Raises:
        Rejected: With `body_not_json`, `body_not_an_event`, `field_missing` or
            `field_mistyped`; the last two name the field's path.
    """
    return _parse_strictly(payload.body) or _parse_leniently(payload.body)


def _parse_strictly(body: bytes) -> Event | None:
    """Return an event that is as Stripe documents it; None for everything else.

    The decoder does not check fields that it skips, so two things are left to the lenient parser:
    text that is not ASCII, which may be invalid UTF-8, and a `skipped_fields` sent by the sender.
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
        and event.object != THIN_EVENT_OBJECT
        and not event.skipped_fields
    )
    return event if is_ours and session.status and _SESSION_ID.fullmatch(session.id) else None


def _parse_leniently(body: bytes) -> Event | ThinEvent | Ignored:
    found = decode(body)
    if found is None:
        raise Rejected(RejectionReason.BODY_NOT_JSON)
    if not isinstance(found.value, dict):
        raise Rejected(RejectionReason.BODY_NOT_AN_EVENT)
    return _parse_by_type(found.value) or _parse_snapshot(
        found.value, has_lone_surrogates=found.has_lone_surrogates
    )


def _parse_by_type(found: dict[str, Any]) -> ThinEvent | Ignored | None:
    """Return a thin or ignored event, recognized by its type; None for an event of ours."""
    event_type = found.get("type")
    if not isinstance(event_type, str):
        reason = (
            RejectionReason.FIELD_MISTYPED if "type" in found else RejectionReason.FIELD_MISSING
        )
        raise Rejected(reason, "type")
    is_thin = found.get("object") == THIN_EVENT_OBJECT
    if not is_thin and event_type.startswith(EVENT_TYPE_PREFIX):
        return None
    sent_id = found.get("id")
    is_id = isinstance(sent_id, str) and re.search(_EVENT_ID, sent_id)
    event_id = sent_id if is_id else None
    if is_thin and event_type.startswith(THIN_EVENT_TYPE_PREFIX):
        return ThinEvent(event_id, event_type, found.get("livemode") is not False)
    return Ignored(
        IgnoredReason.THIN if is_thin else IgnoredReason.OTHER_TYPE, event_id, event_type
    )


def _parse_snapshot(found: dict[str, Any], *, has_lone_surrogates: bool) -> Event:
    """Convert an event, without the fields that are unreadable and not needed."""
    # The lenient conversion would turn it into an integer.
    if isinstance(found.get("created"), float):
        raise Rejected(RejectionReason.FIELD_MISTYPED, "created")
    found["skipped_fields"] = ()
    event = None if has_lone_surrogates else convert(found, Event)
    if event is None:
        skipped = remove_unreadable(found, Event, _NEEDED, has_lone_surrogates=has_lone_surrogates)
        found["skipped_fields"] = tuple(skipped)
        event = convert(found, Event)
    if event is None:
        raise Rejected(RejectionReason.BODY_NOT_AN_EVENT)
    if not _SESSION_ID.fullmatch(event.session.id):
        raise Rejected(RejectionReason.FIELD_MISTYPED, "data.object.id")
    if not event.session.status:
        raise Rejected(RejectionReason.FIELD_MISTYPED, "data.object.status")
    return event
