"""The first lines of each kind are written, the rest are counted, and nothing else is limited."""

from __future__ import annotations

from typing import Any

import pytest

from service.telemetry.log_throttle import (
    MAX_KINDS,
    MAX_PER_WINDOW,
    THROTTLED,
    WINDOW_S,
    LogThrottle,
)


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def line(event: str = "event.rejected", **fields: Any) -> dict[str, Any]:
    """Return the fields of a line."""
    return {"event": event, **fields}


def test_the_first_lines_are_written_and_the_rest_counted() -> None:
    """A fixed number of each kind passes per window; the next line says how many did not."""
    clock = Clock()
    throttle = LogThrottle(clock)
    results = [throttle.check_line(line(reason="busy")) for _ in range(MAX_PER_WINDOW + 7)]
    assert results == [0] * MAX_PER_WINDOW + [None] * 7

    clock.now += WINDOW_S - 0.1
    assert throttle.check_line(line(reason="busy")) is None
    clock.now += 0.2
    assert [throttle.check_line(line(reason="busy")) for _ in range(3)] == [8, 0, 0]


def test_kinds_are_limited_separately() -> None:
    """Lines with another reason, error, handler, endpoint or event are of another kind."""
    throttle = LogThrottle(Clock())
    for _ in range(MAX_PER_WINDOW):
        throttle.check_line(line(reason="busy", handler="log"))
    assert throttle.check_line(line(reason="busy", handler="log")) is None
    for other in (
        line(reason="redis_slow", handler="log"),
        line(reason="busy", handler="nats"),
        line(reason="busy", handler="log", error="KeyError"),
        line(reason="busy", handler="log", endpoint="acme"),
        line("event.unavailable", reason="busy", handler="log"),
    ):
        assert throttle.check_line(other) == 0


@pytest.mark.parametrize(
    "event",
    [
        *("event.admitted", "event.duplicate", "event.late", "event.unchanged", "event.expired"),
        *("event.ignored", "transition", "delivery.dead_lettered", "secrets.reloaded"),
        "anything.else",
    ],
)
def test_lines_about_decisions_are_never_suppressed(event: str) -> None:
    """A line about a decided event, a transition or a dead letter is always written."""
    throttle = LogThrottle(Clock())
    assert event not in THROTTLED
    assert {throttle.check_line(line(event, reason="same")) for _ in range(10_000)} == {0}


def test_the_number_of_kinds_is_bounded() -> None:
    """Only the latest kinds are remembered; a kind that keeps coming stays among them."""
    throttle = LogThrottle(Clock())
    for _ in range(MAX_PER_WINDOW):
        throttle.check(("busy",))
    for number in range(50 * MAX_KINDS):
        assert throttle.check(("kind", number)) == 0
        assert throttle.check(("busy",)) is None
    assert len(throttle._windows) <= MAX_KINDS
