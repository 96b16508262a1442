"""The lifecycle of a session, and the order of its events. The single source for both.

The rule for order: Stripe delivers events in any order, and several times. Each event gets an
*order key* that depends on the event alone, so that every process orders the events of a session
in the same way. It compares redaction first, then the time Stripe created the event, then the
rank of the event type, because several events can have the same second.

Nothing here knows Redis, HTTP or the envelope of an event.
Stripe's lifecycle: https://docs.stripe.com/identity/how-sessions-work
"""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b

import msgspec

from ..stripe.events import EVENT_TYPE_PREFIX
from ..stripe.verification_session import VerificationSession


class Status(StrEnum):
    """The statuses of a session: Stripe's four, and our own REDACTED, which ends every session."""

    REQUIRES_INPUT = "requires_input"
    PROCESSING = "processing"
    VERIFIED = "verified"
    CANCELED = "canceled"
    REDACTED = "redacted"


# The statuses that may follow each status. None stands for a session that is not known yet, whose
# first event should be its creation. `requires_input` follows itself if a user declines before any
# check runs, and it follows `verified` if staff override the result. Final statuses follow
# themselves when redaction begins.
NEXT_STATUSES: dict[str | None, frozenset[str]] = {
    None: frozenset({Status.REQUIRES_INPUT}),
    Status.REQUIRES_INPUT: frozenset({Status.REQUIRES_INPUT, Status.PROCESSING, Status.CANCELED}),
    Status.PROCESSING: frozenset({Status.VERIFIED, Status.REQUIRES_INPUT}),
    Status.VERIFIED: frozenset({Status.VERIFIED, Status.REQUIRES_INPUT, Status.REDACTED}),
    Status.CANCELED: frozenset({Status.CANCELED, Status.REDACTED}),
    Status.REDACTED: frozenset(),
}

FINAL = frozenset({Status.VERIFIED, Status.CANCELED})

# The order of event types within one second. A check may start and fail within a second, but no
# user resubmits that fast: so requires_input ranks above processing.
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

# The clocks of Stripe's own machines may differ by this much. If a step and a result are no further
# apart, the result counts as the later one.
SKEW_S = 5

# An order key in decimal digits: redaction rank (1), seconds (11), step rank (1).
_SECOND_UNIT = 10
_REDACTION_UNIT = _SECOND_UNIT * 10**11


def is_expected(previous: str | None, current: str) -> bool:
    """Say whether `NEXT_STATUSES` allows the step; it does if either status is unknown."""
    if current not in NEXT_STATUSES:
        return True
    followers = NEXT_STATUSES.get(previous)
    return followers is None or current in followers


def is_reversal(previous: str | None, current: str) -> bool:
    """Say whether a final status changed into another one that is not `redacted`."""
    return previous in FINAL and current not in (previous, Status.REDACTED)


def is_step(event_type: str, status: str) -> bool:
    """Say whether an event is a step (something has begun) and not a result.

    A session always ends with a result. So a step that arrives late changes nothing after a
    result, whenever it was created.

    Args:
        event_type: Stripe's event type.
        status: Stripe's status of the session.
    """
    return event_type == _CREATED or status == Status.PROCESSING


def current_status(event_type: str, session: VerificationSession) -> str:
    """Return the status of the session: Stripe's, or `redacted` once redaction has finished."""
    return Status.REDACTED if _is_redacted(event_type, session) else session.status


def order_key(event_type: str, created: int, session: VerificationSession) -> int:
    """Return the number that orders an event among those of its session.

    Its digits, highest first: redaction rank, *created* in eleven digits (Unix seconds), step
    rank. Equal keys are ordered by event id. The result is below 2**53, so Lua represents it
    exactly.
    """
    return (
        _redaction_rank(event_type, session) * _REDACTION_UNIT
        + created * _SECOND_UNIT
        + STEP_RANKS.get(event_type, OTHER_STEP_RANK)
    )


def created_at(order_key: int) -> int:
    """Return the *created* of an order key, in Unix seconds."""
    return order_key % _REDACTION_UNIT // _SECOND_UNIT


def state_hash(event_type: str, session: VerificationSession) -> str:
    """Return 16 hex digits that change whenever something relevant to handlers changes."""
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
    """Return 2 if redacted, 1 if the redaction is in progress, else 0."""
    if _is_redacted(event_type, session):
        return 2
    return int(session.redaction_status == "processing")
