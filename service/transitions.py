"""The life of a session as a table, and what makes one event newer than another.

This is the one source for what may follow what; `simulate`, the README and the worker's
`expected` flag derive from it. Nothing here knows Redis, HTTP or Stripe's envelope.
Stripe's lifecycle: https://docs.stripe.com/identity/how-sessions-work
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from hashlib import blake2b
from typing import ClassVar, NoReturn

import msgspec

from .reports import Discreet
from .sessions import RelatedPerson, VerificationSession

EVENT_TYPE_PREFIX = "identity.verification_session."


class Status(StrEnum):
    """The statuses of a session: Stripe's four, and REDACTED, ours, which absorbs them all."""

    REQUIRES_INPUT = "requires_input"
    PROCESSING = "processing"
    VERIFIED = "verified"
    CANCELED = "canceled"
    REDACTED = "redacted"


# A first sight of a session (None) is expected to be its creation. `requires_input` follows
# itself when a user declines before any check runs, and `verified` when staff override the result;
# the final statuses follow themselves when redaction begins.
FOLLOWS: dict[str | None, frozenset[str]] = {
    None: frozenset({Status.REQUIRES_INPUT}),
    Status.REQUIRES_INPUT: frozenset({Status.REQUIRES_INPUT, Status.PROCESSING, Status.CANCELED}),
    Status.PROCESSING: frozenset({Status.VERIFIED, Status.REQUIRES_INPUT}),
    Status.VERIFIED: frozenset({Status.VERIFIED, Status.REQUIRES_INPUT, Status.REDACTED}),
    Status.CANCELED: frozenset({Status.CANCELED, Status.REDACTED}),
    Status.REDACTED: frozenset(),
}

FINAL = frozenset({Status.VERIFIED, Status.CANCELED})

# Within one second a check may start and fail, while a user cannot resubmit that fast: so
# requires_input ranks above processing.
STEP_RANKS = {
    EVENT_TYPE_PREFIX + "created": 0,
    EVENT_TYPE_PREFIX + "processing": 1,
    EVENT_TYPE_PREFIX + "requires_input": 2,
    EVENT_TYPE_PREFIX + "verified": 3,
    EVENT_TYPE_PREFIX + "canceled": 3,
    EVENT_TYPE_PREFIX + "redacted": 4,
}
OTHER_STEP_RANK = 2
_CREATED = EVENT_TYPE_PREFIX + "created"
_REDACTED = EVENT_TYPE_PREFIX + "redacted"

# By so many seconds the clocks of Stripe's own machines may differ: of a step and a result that
# are no further apart, the result counts as the later one.
SKEW_S = 5

# Stripe's ids are letters and digits behind `vs_`, so no session of Stripe's begins so; and since
# events are signed, nobody but a holder of the signing secret can send one that does.
SELFTEST_PREFIX = "vs_selftest_"

# One digit for the step below eleven for the seconds; the redaction rank above.
_SECOND_UNIT = 10
_REDACTION_UNIT = _SECOND_UNIT * 10**11


class Origin(StrEnum):
    """How an event came to us first."""

    WEBHOOK = "webhook"
    THIN = "thin"
    EVENTS_API = "events_api"


class ReadOnlyDict(dict[str, str]):
    """A dict that cannot be changed, so that no attempt of a handler changes what the next sees.

    A copy of it is an ordinary dict.
    """

    def __reduce__(self) -> tuple[type[dict[str, str]], tuple[dict[str, str]]]:
        return dict, (dict(self),)

    def _refuse(self, *arguments: object, **keywords: object) -> NoReturn:
        raise TypeError("a transition cannot be changed: change a copy, dict(…)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


class SessionChange(Discreet, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What one event says of its session: the allow list of all that may leave the process.

    `metadata` and `client_reference_id` are yours: handlers receive them, `repr` does not tell.

    Attributes:
        event_id: Stripe's event id; the id of the message on every queue.
        event_type: Stripe's event type.
        occurred_at: When Stripe created the event (whole seconds, UTC).
        livemode: False for test mode; None when the event does not say.
        account: The connected account the event is of; None for one's own.
        account_name: The name that ACCOUNT_NAME gave to one's own account; None without one.
        context: The authentication context of Stripe's that the event is of.
        origin: How the event came first: `webhook`, `thin` or `events_api`.
        endpoint: The name of the endpoint in the URL it came by; None for the default one.
        session_id: The `vs_…` id.
        session_type: `document`, `id_number`, `verification_flow` or a newer word.
        current: The status now; `redacted` once redaction has finished.
        stripe_status: Stripe's own word for the status, which redaction does not hide.
        last_error_code: Why the latest attempt failed, as Stripe's word.
        redaction_status: `processing`, `redacted`, `validated` or a newer word.
        report_id: The latest verification report's `vr_…` id.
        client_reference_id: Your own reference, as you gave it to Stripe.
        related_customer: A `cus_…` id.
        related_customer_account: The id of an account acting as customer.
        related_person: The person and the account it belongs to.
        metadata: Your own keys and values, as you gave them to Stripe.
        traceparent: Where in a trace it was received (W3C Trace Context); absent without one.
    """

    shown: ClassVar[tuple[str, ...]] = ("event_id", "event_type", "session_id", "current")

    event_id: str
    event_type: str
    occurred_at: datetime
    livemode: bool | None = None
    account: str | None = None
    account_name: str | None = None
    context: str | None = None
    origin: str = Origin.WEBHOOK
    endpoint: str | None = None
    session_id: str
    session_type: str | None = None
    current: str
    stripe_status: str | None = None
    last_error_code: str | None = None
    redaction_status: str | None = None
    report_id: str | None = None
    client_reference_id: str | None = None
    related_customer: str | None = None
    related_customer_account: str | None = None
    related_person: RelatedPerson | None = None
    metadata: dict[str, str] | None = None
    traceparent: str | msgspec.UnsetType = msgspec.UNSET


class StatusTransition(SessionChange, frozen=True, kw_only=True, gc=False, omit_defaults=False):
    """One real change of one session, as every handler receives it. Holds no secret.

    Attributes:
        previous: The status before; None when the ledger had no memory of the session.
        sequence: 1, 2, 3 … without a gap within *epoch*.
        epoch: When the numbering began, in Unix milliseconds: with the ledger's record of this
            session, or anew where Redis may have lost transitions. A later one is greater.
        expected: False when no such step is known (see `FOLLOWS`): an earlier event was missed, or
            staff approved the session on review.
        reversal: Whether a final status was changed into another one that is not `redacted`:
            staff have overridden the result.
        replay: Which replay this is part of, when an operator asked for it to come again.
    """

    shown = (*SessionChange.shown, "previous", "sequence", "epoch", "replay")

    previous: str | None = None
    sequence: int
    epoch: int
    expected: bool
    reversal: bool = False
    replay: str | None = None

    def __post_init__(self) -> None:
        if self.metadata is not None:
            msgspec.structs.force_setattr(self, "metadata", ReadOnlyDict(self.metadata))


def is_selftest(session_id: str) -> bool:
    """Say whether a session is one of `selftest`'s own: settled by every handler, shown to none."""
    return session_id.startswith(SELFTEST_PREFIX)


def is_expected(previous: str | None, current: str) -> bool:
    """Say whether `FOLLOWS` lists the step; words it does not know are never held against it."""
    if current not in FOLLOWS:
        return True
    followers = FOLLOWS.get(previous)
    return followers is None or current in followers


def is_reversal(previous: str | None, current: str) -> bool:
    """Say whether a final status was changed into another one that is not `redacted`."""
    return previous in FINAL and current not in (previous, Status.REDACTED)


def is_step(event_type: str, status: str) -> bool:
    """Say whether an event is a step, not a result.

    A step says that something began, so the end of a session is always a result: a step that
    comes late, whatever its time, changes nothing that a result has settled.

    Args:
        event_type: Stripe's event type.
        status: Stripe's word for the session's status.
    """
    return event_type == _CREATED or status == Status.PROCESSING


def current_status(event_type: str, session: VerificationSession) -> str:
    """Return what the session now is: Stripe's word, or `redacted` once that has finished."""
    return Status.REDACTED if _is_redacted(event_type, session) else session.status


def order_key(event_type: str, created: int, session: VerificationSession) -> int:
    """Return what orders an event among those of its session, computed from it alone.

    The digits, highest first: redaction rank, *created* in eleven digits (Unix seconds), step
    rank. So redaction absorbs, and the rest goes by time. Equal keys are ordered by event id. The
    result stays below 2**53, exact in Lua's numbers.
    """
    return (
        _redaction_rank(event_type, session) * _REDACTION_UNIT
        + created * _SECOND_UNIT
        + STEP_RANKS.get(event_type, OTHER_STEP_RANK)
    )


def created_at(order_key: int) -> int:
    """Return the *created* that went into an order key, in Unix seconds."""
    return order_key % _REDACTION_UNIT // _SECOND_UNIT


def state_hash(event_type: str, session: VerificationSession) -> str:
    """Return 16 hex digits that differ when something changed that a handler would care about."""
    is_redacted = _is_redacted(event_type, session)
    parts = (
        session.status,
        Status.REDACTED if is_redacted else session.redaction_status,
        session.last_error_code,
        session.report_id,
    )
    return blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _is_redacted(event_type: str, session: VerificationSession) -> bool:
    return session.redaction_status == Status.REDACTED or event_type == _REDACTED


def _redaction_rank(event_type: str, session: VerificationSession) -> int:
    """Return 2 for redacted, by word or type, 1 for under way, else 0."""
    if _is_redacted(event_type, session):
        return 2
    return int(session.redaction_status == "processing")
