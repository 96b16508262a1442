"""The rules of ordering, written a second time from their description, for the checker alone.

No code of the service's is used: what both have wrong, only a reader can find.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.system.chaos.evidence import Event

PREFIX = "identity.verification_session."
STEP_RANKS = {"created": 0, "processing": 1, "requires_input": 2, "verified": 3, "canceled": 3}
STEP_RANKS["redacted"] = 4
OTHER_STEP_RANK = 2
FINAL = ("verified", "canceled")
SKEW_S = 5


class Position(NamedTuple):
    """Where an event stands in the life of its session; the greater is the later."""

    redaction: int
    created: int
    step: int
    event_id: str

    @property
    def order_key(self) -> int:
        """The position as the ledger keeps it: one number, eleven digits of it for the time."""
        return int(f"{self.redaction}{self.created:011}{self.step}")


class State(NamedTuple):
    """What must be known of a session to judge the next event.

    Attributes:
        latest: The position of the latest event that was not late.
        result: That of the latest result that was not late.
        is_from_step: Whether the last event that was not late is a step.
        substance: What a later event must differ in to be news.
        status: What the session is.
    """

    latest: Position
    result: Position | None
    is_from_step: bool
    substance: tuple[str | None, ...]
    status: str


def is_ours(event: Event) -> bool:
    """Say whether an event is about a verification session at all."""
    return event.type.startswith(PREFIX)


def is_step(event: Event) -> bool:
    """Say whether an event tells that something began, not how it ended."""
    return event.type == PREFIX + "created" or event.status == "processing"


def position(event: Event) -> Position:
    """Return the place of *event*, by itself."""
    redaction = {"redacted": 2, "processing": 1}.get(_redaction(event) or "", 0)
    step = STEP_RANKS.get(event.type.removeprefix(PREFIX), OTHER_STEP_RANK)
    return Position(redaction, event.created, step, event.id)


def current(event: Event) -> str:
    """Return what the session is by *event*."""
    return "redacted" if _redaction(event) == "redacted" else event.status


def substance(event: Event) -> tuple[str | None, ...]:
    """Return what must differ between two events for the later one to be news."""
    return event.status, _redaction(event), event.error, event.report


def verdict(state: State | None, event: Event) -> str:
    """Return what must be said to an event that is not known yet and not too old."""
    if state is None:
        return "admitted"
    if _is_late(state, event):
        return "late"
    return "unchanged" if substance(event) == state.substance else "admitted"


def after(state: State | None, event: Event) -> State:
    """Return the state after an event that was not late."""
    place = position(event)
    result = state.result if state and is_step(event) else None
    return State(
        latest=max(place, state.latest) if state else place,
        result=result if is_step(event) else place,
        is_from_step=is_step(event),
        substance=substance(event),
        status=current(event),
    )


def _is_late(state: State, event: Event) -> bool:
    place = position(event)
    if is_step(event):
        settled = state.result is not None and place.created <= state.result.created + SKEW_S
        ended = state.status in FINAL or state.latest.redaction > 0
        return place < state.latest or settled or ended
    if state.result is not None and place < state.result:
        return True
    overtaken = place.created < state.latest.created - SKEW_S
    return state.is_from_step and place.redaction == 0 and overtaken


def _redaction(event: Event) -> str | None:
    return "redacted" if event.type == PREFIX + "redacted" else event.redaction
