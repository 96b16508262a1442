"""Laws of what is said when dispatchers end: one line for each cause, with how many it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog.testing

from service.delivery.failure_log import GATHER_S, QUIET_S, FailureLog
from tests.support import virtual_time

PLACES = [(handler, partition) for handler in ("log", "other") for partition in range(8)]


def told(
    scene: Callable[[FailureLog], Coroutine[Any, Any, None]],
) -> list[tuple[str, int, list[str]]]:
    """Return reason, number and handlers of each line that a scene makes."""

    async def play() -> None:
        failure_log = FailureLog()
        await scene(failure_log)
        failure_log.flush()

    with structlog.testing.capture_logs() as lines:
        virtual_time.run(play())
    assert {line["event"] for line in lines} <= {"dispatcher.ended"}
    return [(line["reason"], line["dispatchers"], line["handlers"]) for line in lines]


def test_a_cause_is_told_once_with_all_that_it_ended() -> None:
    """However often dispatchers end and begin again, an outage is one line."""

    async def outage(failure_log: FailureLog) -> None:
        for _ in range(120):
            for place in PLACES:
                failure_log.record("redis_unreachable", place)
            await asyncio.sleep(0.5)

    assert told(outage) == [("redis_unreachable", 16, ["log", "other"])]


def test_each_reason_and_each_outage_is_told() -> None:
    """Another reason is another line, and so is the same one after it has been quiet."""

    async def two_outages(failure_log: FailureLog) -> None:
        failure_log.record("redis_unreachable", PLACES[0])
        failure_log.record("redis_refused", PLACES[0])
        failure_log.record("redis_refused", PLACES[8])
        await asyncio.sleep(QUIET_S + GATHER_S)
        failure_log.record("redis_unreachable", PLACES[1])
        await asyncio.sleep(QUIET_S - GATHER_S)
        failure_log.record("redis_unreachable", PLACES[2])

    assert told(two_outages) == [
        ("redis_unreachable", 1, ["log"]),
        ("redis_refused", 2, ["log", "other"]),
        ("redis_unreachable", 1, ["log"]),
    ]


def test_what_ends_late_in_its_cause_is_counted_and_a_stop_loses_nothing() -> None:
    """All that end within the gathering time are counted; what is gathered is told at the end."""

    async def ends(failure_log: FailureLog) -> None:
        failure_log.record("lease_lost", PLACES[0])
        await asyncio.sleep(GATHER_S * 0.9)
        failure_log.record("lease_lost", PLACES[1])
        failure_log.record("unforeseen", PLACES[2])

    assert told(ends) == [("lease_lost", 2, ["log"]), ("unforeseen", 1, ["log"])]
