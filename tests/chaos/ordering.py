"""The rules of ordering, written a second time from their description, for the checker alone.

No code of the service's is used: what both have wrong, only a reader can find.
"""

from __future__ import annotations

from typing import NamedTuple

from evidence import Event

PREFIX = "identity.verification_session."
STEPS = {"created": 0, "processing": 1, "requires_input": 2, "verified": 3, "canceled": 3}
STEPS["redacted"] = 4
OTHER_STEP = 2


class Position(NamedTuple):
    """Where an event stands in the life of its session; the greater is the newer."""

    redaction: int
    final: int
    created: int
    step: int


def is_ours(event: Event) -> bool:
    """Say whether an event is about a verification session at all."""
    return event.type.startswith(PREFIX)


def position(event: Event) -> Position:
    """Return the place of *event*, by itself."""
    step = STEPS.get(event.type.removeprefix(PREFIX), OTHER_STEP)
    final = int(event.status in {"verified", "canceled"})
    return Position(_redaction(event), final, event.created, step)


def stored_position(number: int) -> Position:
    """Read a position as the ledger keeps it: one number, a digit each but eleven for the time."""
    rest, step = divmod(number, 10)
    rest, created = divmod(rest, 10**11)
    redaction, final = divmod(rest, 10)
    return Position(redaction, final, created, step)


def current(event: Event) -> str:
    """Return what the session is by *event*."""
    return "redacted" if _redaction(event) == 2 else event.status


def substance(event: Event) -> tuple[str | None, ...]:
    """Return what must differ between two events for the later one to be news."""
    return current(event), event.status, event.redaction, event.error, event.report


def _redaction(event: Event) -> int:
    if event.redaction == "redacted" or event.type == PREFIX + "redacted":
        return 2
    return 0 if event.redaction is None else 1
