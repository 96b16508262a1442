"""The life of a session as a table, and what makes one event newer than another.

This is the one source for what may follow what; `simulate`, the README and the worker's
`expected` flag derive from it. Nothing here knows Redis, HTTP or Stripe's envelope.
Stripe's lifecycle: https://docs.stripe.com/identity/how-sessions-work
"""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b

import msgspec

from ..stripe.events import EVENT_TYPE_PREFIX
from ..stripe.verification_session import VerificationSession


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

# One digit for the step below eleven for the seconds; the redaction rank above.
_SECOND_UNIT = 10
_REDACTION_UNIT = _SECOND_UNIT * 10**11


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
