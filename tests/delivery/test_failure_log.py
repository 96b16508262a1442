"""Tests of the lines about dispatchers that ended: one for each cause, with their number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog.testing

from service.delivery.failure_log import GATHER_S, QUIET_S, FailureLog
from tests.support import virtual_time

ASSIGNMENTS = [(handler, partition) for handler in ("log", "other") for partition in range(8)]


def logged(
    record: Callable[[FailureLog], Coroutine[Any, Any, None]],
) -> list[tuple[str, int, list[str]]]:
    """Return reason, number and handlers of each line that *record* causes."""

    async def record_and_flush() -> None:
        failure_log = FailureLog()
        await record(failure_log)
        failure_log.flush()
        # What was flushed is not logged again.
        await asyncio.sleep(GATHER_S)

    with structlog.testing.capture_logs() as lines:
        virtual_time.run(record_and_flush())
    assert {line["event"] for line in lines} <= {"dispatcher.ended"}
    return [(line["reason"], line["dispatchers"], line["handlers"]) for line in lines]


def test_a_cause_is_logged_once_with_all_that_it_ended() -> None:
    """However often dispatchers end and start again, an outage is one line."""

    async def outage(failure_log: FailureLog) -> None:
        for _ in range(120):
            for assignment in ASSIGNMENTS:
                failure_log.record("redis_unreachable", assignment)
            await asyncio.sleep(0.5)

    assert logged(outage) == [("redis_unreachable", 16, ["log", "other"])]


def test_each_reason_and_each_outage_is_logged() -> None:
    """Another reason is another line, and so is the same one after a quiet time."""

    async def two_outages(failure_log: FailureLog) -> None:
        failure_log.record("redis_unreachable", ASSIGNMENTS[0])
        failure_log.record("redis_refused", ASSIGNMENTS[0])
        failure_log.record("redis_refused", ASSIGNMENTS[8])
        await asyncio.sleep(QUIET_S + GATHER_S)
        failure_log.record("redis_unreachable", ASSIGNMENTS[1])
        await asyncio.sleep(QUIET_S - GATHER_S)
        failure_log.record("redis_unreachable", ASSIGNMENTS[2])

    assert logged(two_outages) == [
        ("redis_unreachable", 1, ["log"]),
        ("redis_refused", 2, ["log", "other"]),
        ("redis_unreachable", 1, ["log"]),
    ]


def test_gathered_ends_are_counted_and_flushed() -> None:
    """All ends within the gathering time are counted, and logged by `flush`."""

    async def ends(failure_log: FailureLog) -> None:
        failure_log.record("lease_lost", ASSIGNMENTS[0])
        await asyncio.sleep(GATHER_S * 0.9)
        failure_log.record("lease_lost", ASSIGNMENTS[1])
        failure_log.record("unforeseen", ASSIGNMENTS[2])

    assert logged(ends) == [("lease_lost", 2, ["log"]), ("unforeseen", 1, ["log"])]
