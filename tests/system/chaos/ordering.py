"""The rules of ordering, written a second time from their description, for the checker.

It uses no code of the service, so that a mistake there cannot hide itself.
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
    """The order of an event within its session; the greater is the later."""

    redaction: int
    created: int
    step: int
    event_id: str

    @property
    def order_key(self) -> int:
        """The position as records store it: one number, with eleven digits for the time."""
        return int(f"{self.redaction}{self.created:011}{self.step}")


class State(NamedTuple):
    """The state of a session that decides about the next event.

    Attributes:
        latest: The position of the latest event that was not late.
        result: That of the latest result that was not late.
        is_from_step: Whether the last event that was not late is a step.
        content: The fields of which one must differ in a later event that changes the session.
        status: The status of the session.
    """

    latest: Position
    result: Position | None
    is_from_step: bool
    content: tuple[str | None, ...]
    status: str


def is_ours(event: Event) -> bool:
    """Say whether an event is about a verification session at all."""
    return event.type.startswith(PREFIX)


def is_step(event: Event) -> bool:
    """Say whether an event is a step (something began) and not a result."""
    return event.type == PREFIX + "created" or event.status == "processing"


def position(event: Event) -> Position:
    """Return the position of *event*."""
    redaction = {"redacted": 2, "processing": 1}.get(_redaction(event) or "", 0)
    step = STEP_RANKS.get(event.type.removeprefix(PREFIX), OTHER_STEP_RANK)
    return Position(redaction, event.created, step, event.id)


def current(event: Event) -> str:
    """Return the status of the session after *event*."""
    return "redacted" if _redaction(event) == "redacted" else event.status


def content(event: Event) -> tuple[str | None, ...]:
    """Return the fields of which one must differ in a later event that changes the session."""
    return event.status, _redaction(event), event.error, event.report


def verdict(state: State | None, event: Event) -> str:
    """Return the outcome of an event that is new and not too old."""
    if state is None:
        return "admitted"
    if _is_late(state, event):
        return "late"
    return "unchanged" if content(event) == state.content else "admitted"


def after(state: State | None, event: Event) -> State:
    """Return the state after an event that was not late."""
    place = position(event)
    result = state.result if state and is_step(event) else None
    return State(
        latest=max(place, state.latest) if state else place,
        result=result if is_step(event) else place,
        is_from_step=is_step(event),
        content=content(event),
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
