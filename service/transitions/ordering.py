"""The order of a session's events, and what counts as a change of the session.

The rule: Stripe delivers events in any order, and several times. Each event gets an *order key*
that depends on the event alone, so that every process orders the events of a session in the same
way. It compares redaction first, then the time Stripe created the event, then the rank of the
event type, because several events can have the same second.

Keys and hashes are stored: they must stay as they are for longer than a release is in use.
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from ..stripe.events import EVENT_TYPE_PREFIX
from .lifecycle import TYPE_RANKS, Status
from .transition import SessionChange

_OTHER_TYPE_RANK = 2
_CREATED = EVENT_TYPE_PREFIX + "created"

# The clocks of Stripe's own machines may differ by this much. If a step and a result are no further
# apart, the result counts as the later one.
SKEW_S = 5

# An order key in decimal digits: redaction rank (1), seconds (11), type rank (1).
_SECOND_UNIT = 10
_REDACTION_UNIT = _SECOND_UNIT * 10**11


def is_step(change: SessionChange) -> bool:
    """Say whether an event is a step (something has begun) and not a result.

    A session always ends with a result. So a step that arrives late changes nothing after a
    result, whenever it was created.
    """
    return change.event_type == _CREATED or change.stripe_status == Status.PROCESSING


def order_key(change: SessionChange, created: int) -> int:
    """Return the number that orders an event among those of its session.

    Its digits, highest first: redaction rank, *created* in eleven digits (Unix seconds), type
    rank. Equal keys are ordered by event id. The result is below 2**53, so Lua represents it
    exactly.
    """
    type_rank = TYPE_RANKS.get(change.event_type, _OTHER_TYPE_RANK)
    return _redaction_rank(change) * _REDACTION_UNIT + created * _SECOND_UNIT + type_rank


def created_at(order_key: int) -> int:
    """Return the *created* of an order key, in Unix seconds."""
    return order_key % _REDACTION_UNIT // _SECOND_UNIT


def state_hash(change: SessionChange) -> str:
    """Return 16 hex digits that change whenever something relevant to handlers changes."""
    is_redacted = change.current == Status.REDACTED
    parts = (
        change.stripe_status,
        Status.REDACTED if is_redacted else change.redaction_status,
        change.last_error_code,
        change.report_id,
    )
    return blake2b(msgspec.json.encode(parts), digest_size=8).hexdigest()


def _redaction_rank(change: SessionChange) -> int:
    """Return 2 if redacted, 1 if the redaction is in progress, else 0."""
    if change.current == Status.REDACTED:
        return 2
    return int(change.redaction_status == "processing")
