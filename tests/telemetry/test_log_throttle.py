"""The laws of `floods`: the first of each kind are written, the rest counted, nothing else held."""

from __future__ import annotations

from typing import Any

import pytest

from service.telemetry.log_throttle import (
    MAX_KINDS,
    MAX_PER_WINDOW,
    REPEATED,
    WINDOW_S,
    LogThrottle,
)


class Clock:
    """A clock that stands until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def line(event: str = "event.rejected", **fields: Any) -> dict[str, Any]:
    """Return the fields of a line."""
    return {"event": event, **fields}


def test_the_first_lines_are_written_and_the_rest_counted() -> None:
    """Of one kind a fixed number passes per window; the next that passes says how many did not."""
    clock = Clock()
    floods = LogThrottle(clock)
    said = [floods.held_back_before(line(reason="busy")) for _ in range(MAX_PER_WINDOW + 7)]
    assert said == [0] * MAX_PER_WINDOW + [None] * 7

    clock.now += WINDOW_S - 0.1
    assert floods.held_back_before(line(reason="busy")) is None
    clock.now += 0.2
    assert [floods.held_back_before(line(reason="busy")) for _ in range(3)] == [8, 0, 0]


def test_kinds_do_not_hold_each_other_back() -> None:
    """Another reason, error, handler or event is another kind, with lines of its own."""
    floods = LogThrottle(Clock())
    for _ in range(MAX_PER_WINDOW):
        floods.held_back_before(line(reason="busy", handler="log"))
    assert floods.held_back_before(line(reason="busy", handler="log")) is None
    for other in (
        line(reason="redis_slow", handler="log"),
        line(reason="busy", handler="nats"),
        line(reason="busy", handler="log", error="KeyError"),
        line("event.unavailable", reason="busy", handler="log"),
    ):
        assert floods.held_back_before(other) == 0


@pytest.mark.parametrize(
    "event",
    [
        *("event.admitted", "event.duplicate", "event.late", "event.unchanged", "event.expired"),
        *(
            "event.ignored",
            "transition",
            "delivery.dead_lettered",
            "secrets.reloaded",
            "anything.else",
        ),
    ],
)
def test_what_was_decided_is_never_held_back(event: str) -> None:
    """A line about a decided event, a transition or a dead letter is written however many come."""
    floods = LogThrottle(Clock())
    assert event not in REPEATED
    assert {floods.held_back_before(line(event, reason="same")) for _ in range(10_000)} == {0}


def test_the_kinds_remembered_are_bounded() -> None:
    """However many kinds there are, only the latest are remembered; a busy one stays among them."""
    floods = LogThrottle(Clock())
    for _ in range(MAX_PER_WINDOW):
        floods.held_back(("busy",))
    for number in range(50 * MAX_KINDS):
        assert floods.held_back(("kind", number)) == 0
        assert floods.held_back(("busy",)) is None
    assert len(floods._windows) <= MAX_KINDS
