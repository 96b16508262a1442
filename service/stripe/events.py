"""Parses Stripe events: a payload becomes an `Event`, a `ThinEvent` or is `Ignored`.

The only module that knows the envelope of Stripe's events. The session in it is defined in
`verification_session`; what follows from an event is decided elsewhere.

A payload is authentic: its type says who vouches for it. The signature of a webhook does for a
`VerifiedPayload`, the connection to Stripe's API for an `ApiPayload`.

There are two parsers. The strict one decodes events that are as Stripe documents them, directly
into structs. The lenient one takes everything else: it accepts, repairs, ignores or rejects it. It
would do alone, for 6 % more CPU per event. https://docs.stripe.com/api/events
"""

from __future__ import annotations

import re
from collections.abc import Container
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from ..errors import Rejected, RejectionReason
from .decoding import convert, decode, remove_unreadable, remove_value
from .signatures import VerifiedPayload
from .stripe_object import EpochSeconds, decode_secret
from .verification_session import VerificationSession

T = TypeVar("T", bound=msgspec.Struct)

EVENT_TYPE_PREFIX = "identity.verification_session."
# The `object` of a thin event, which does not contain the session, and its types about sessions.
THIN_EVENT_OBJECT = "v2.core.event"
THIN_EVENT_TYPE_PREFIX = f"v1.{EVENT_TYPE_PREFIX}"

_EVENT_ID = r"\Aevt_[A-Za-z0-9_]{1,250}\Z"
EventId = Annotated[str, msgspec.Meta(pattern=_EVENT_ID)]

SESSION_ID = re.compile(r"vs_[A-Za-z0-9_]{1,250}")
SessionId = Annotated[str, msgspec.Meta(pattern=rf"\A{SESSION_ID.pattern}\Z")]
# A time of RFC 3339: without its fraction, the fraction, the offset from UTC.
_TIME = re.compile(r"([0-9-]{10}T[0-9:]{8})(?:\.[0-9]{1,40})?(Z|[+-][0-9]{2}:[0-9]{2})")
_EPOCH = datetime.fromtimestamp(0, UTC)
_SECOND = timedelta(seconds=1)
# Stripe's API shows it in place of texts that were redacted.
PLACEHOLDER = "[redacted]"
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
    """A verified event that this service has no use for; with its session, if it is about one."""

    reason: IgnoredReason
    event_id: str | None
    event_type: str
    session_id: str | None = None


class ThinEvent(NamedTuple):
    """A thin event about a verification session: what happened to it, without its state.

    Attributes:
        event_id: The id of the thin event; the snapshot event has another one.
        event_type: `v1.identity.verification_session.` and a word.
        created: Unix seconds, rounded down: the snapshot event has the same second.
        is_live: Whether it is of live mode; also true if it does not say.
        context: The authentication context to fetch the event and the session with.
        session_id: The session that it is about.
        snapshot_event_id: The id of the snapshot event, where Stripe has sent it.
    """

    event_id: str
    event_type: str
    created: int
    is_live: bool
    context: str | None
    session_id: str
    snapshot_event_id: str | None


class ApiPayload(msgspec.Struct, frozen=True, gc=False):
    """A body that Stripe's API answered with; only the client of that API creates one.

    Attributes:
        body: The JSON text of one event.
    """

    body: bytes

    def __repr__(self) -> str:
        return f"ApiPayload({len(self.body)} bytes)"


class _RelatedObject(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    id: SessionId
    type: Literal["identity.verification_session"]


class _ThinEnvelope(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A thin event as Stripe lays it out. Its URL is not kept: a path is built from the id."""

    id: EventId
    type: str
    created: str
    related_object: _RelatedObject
    livemode: bool | None = None
    # It is sent back in a header.
    context: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,250}\Z")] | None = None
    snapshot_event: EventId | None = None


# As `_NEEDED`. Without its context a session would be looked for in another account.
_NEEDED_OF_THIN = frozenset(
    {
        *("id", "type", "created", "livemode", "context"),
        *("related_object", "related_object.id", "related_object.type"),
    }
)


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
    def said_livemode(self) -> bool | None:
        """Whether it is of live mode, as the envelope says, else as the session says."""
        return self.session.livemode if self.livemode is None else self.livemode

    @property
    def is_live(self) -> bool:
        """Whether it is of live mode; also true if it does not say."""
        return self.said_livemode is not False


_decode = msgspec.json.Decoder(Event, dec_hook=decode_secret).decode


def parse(payload: VerifiedPayload | ApiPayload) -> Event | ThinEvent | Ignored:
    """Return the event in *payload*. In an answer of Stripe's API placeholders count as absent.

    Raises:
        Rejected: With `body_not_json`, `body_not_an_event`, `field_missing` or
            `field_mistyped`; the last two name the field's path.
    """
    if isinstance(payload, ApiPayload):
        return _parse_leniently(payload.body, without=PLACEHOLDER)
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
    return event if is_ours and session.status and SESSION_ID.fullmatch(session.id) else None


def _parse_leniently(body: bytes, *, without: str | None = None) -> Event | ThinEvent | Ignored:
    """Return an event of any kind, as if it did not hold the text *without* anywhere."""
    found = decode(body)
    if found is None:
        raise Rejected(RejectionReason.BODY_NOT_JSON)
    if not isinstance(found.value, dict):
        raise Rejected(RejectionReason.BODY_NOT_AN_EVENT)
    if without is not None:
        remove_value(found.value, without)
    kind = _find_kind(found.value)
    if isinstance(kind, Ignored):
        return kind
    parse_kind = _parse_thin if kind is ThinEvent else _parse_snapshot
    return parse_kind(found.value, has_lone_surrogates=found.has_lone_surrogates)


def _find_kind(found: dict[str, Any]) -> type[Event | ThinEvent] | Ignored:
    """Return what an event of this type is parsed to, or that it is ignored."""
    event_type = found.get("type")
    if not isinstance(event_type, str):
        reason = (
            RejectionReason.FIELD_MISTYPED if "type" in found else RejectionReason.FIELD_MISSING
        )
        raise Rejected(reason, "type")
    is_thin = found.get("object") == THIN_EVENT_OBJECT
    if event_type.startswith(THIN_EVENT_TYPE_PREFIX if is_thin else EVENT_TYPE_PREFIX):
        return ThinEvent if is_thin else Event
    sent_id = found.get("id")
    is_id = isinstance(sent_id, str) and re.search(_EVENT_ID, sent_id)
    return Ignored(
        IgnoredReason.THIN if is_thin else IgnoredReason.OTHER_TYPE,
        sent_id if is_id else None,
        event_type,
    )


def _parse_thin(found: dict[str, Any], *, has_lone_surrogates: bool) -> ThinEvent:
    event, _ = _convert(
        found, _ThinEnvelope, _NEEDED_OF_THIN, has_lone_surrogates=has_lone_surrogates
    )
    return ThinEvent(
        event_id=event.id,
        event_type=event.type,
        created=_second(event.created),
        is_live=event.livemode is not False,
        context=event.context,
        session_id=event.related_object.id,
        snapshot_event_id=event.snapshot_event,
    )


def _second(created: str) -> int:
    """Return the second of a time of RFC 3339, in Unix seconds."""
    # Without the fraction, which the conversion would round.
    if time := _TIME.fullmatch(created):
        with suppress(msgspec.ValidationError):
            moment = msgspec.convert(time[1] + time[2], datetime)
            return msgspec.convert((moment - _EPOCH) // _SECOND, EpochSeconds)
    raise Rejected(RejectionReason.FIELD_MISTYPED, "created")


def _parse_snapshot(found: dict[str, Any], *, has_lone_surrogates: bool) -> Event:
    # The lenient conversion would turn it into an integer.
    if isinstance(found.get("created"), float):
        raise Rejected(RejectionReason.FIELD_MISTYPED, "created")
    found["skipped_fields"] = ()
    event, skipped = _convert(found, Event, _NEEDED, has_lone_surrogates=has_lone_surrogates)
    if not SESSION_ID.fullmatch(event.session.id):
        raise Rejected(RejectionReason.FIELD_MISTYPED, "data.object.id")
    if not event.session.status:
        raise Rejected(RejectionReason.FIELD_MISTYPED, "data.object.status")
    return msgspec.structs.replace(event, skipped_fields=skipped)


def _convert(
    found: dict[str, Any], kind: type[T], needed: Container[str], *, has_lone_surrogates: bool
) -> tuple[T, tuple[str, ...]]:
    """Return *found* as a *kind*, and the paths of the fields that had to be removed for it."""
    event = None if has_lone_surrogates else convert(found, kind)
    if event is not None:
        return event, ()
    skipped = tuple(remove_unreadable(found, kind, needed, has_lone_surrogates=has_lone_surrogates))
    event = convert(found, kind)
    if event is None:
        raise Rejected(RejectionReason.BODY_NOT_AN_EVENT)
    return event, skipped
