"""Tests of a blocked event loop: the handler is named, and Redis is not blamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import structlog.testing
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.delivery import blocking
from service.delivery.calls import HandlerCalls
from service.errors import UnavailableReason
from service.storage.redis_errors import unavailable_reason
from service.telemetry import loop_lag, metrics
from service.telemetry.loop_lag import LOOP_LAG
from service.transitions.transition import StatusTransition
from tests.support.transitions import TRANSITION
from tests.support.waiting import until

TICK_S = 0.05
BLOCK_S = 20 * TICK_S


@pytest.fixture(autouse=True)
async def _measured(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Measure the loop more often than in service, without what earlier tests have left."""
    for module in (blocking, loop_lag):
        monkeypatch.setattr(module, "TICK_S", TICK_S)
    monkeypatch.setattr(loop_lag, "BLOCKED_S", BLOCK_S / 2)
    monkeypatch.setattr(LOOP_LAG, "_blocked_at", float("-inf"))
    measuring = asyncio.create_task(LOOP_LAG.watch())
    with blocking.detecting():
        await asyncio.sleep(0)
        yield
    measuring.cancel()


async def compute() -> None:
    """Do what a handler must not do."""
    time.sleep(BLOCK_S)  # noqa: ASYNC251 - the point of the test


async def handler(_: StatusTransition) -> None:
    """Wait a little, as a good handler would, and then block."""
    await asyncio.sleep(0)
    await compute()


async def test_a_blocking_handler_is_named_with_its_place() -> None:
    """The line names the handler, and the place in its own code that blocked."""
    with structlog.testing.capture_logs() as lines:
        assert await HandlerCalls("own:open", handler, 10).call(TRANSITION) is None
        await until(lambda: bool(lines))

    [line] = lines
    assert (line["event"], line["handler"]) == ("handler.blocking", "own:open")
    assert line["place"].startswith(f"{__file__}:")
    assert line["place"].endswith(" handler")


async def test_other_code_that_blocks_is_not_a_handler() -> None:
    """Code outside of handlers causes no such line, also while a handler is waiting."""
    call = asyncio.create_task(
        HandlerCalls("own:open", lambda _: asyncio.sleep(1.2 * BLOCK_S), 10).call(TRANSITION)
    )
    await asyncio.sleep(0)
    with structlog.testing.capture_logs() as lines:
        await compute()
        await call
    assert not lines


async def test_a_timeout_of_a_blocked_loop_is_not_blamed_on_redis() -> None:
    """A timeout during a block, or just after one, says nothing about Redis."""
    assert unavailable_reason(RedisTimeoutError()) is UnavailableReason.REDIS_SLOW
    before = metrics.LOOP_LAG_SECONDS._sum.get()
    await compute()
    assert unavailable_reason(RedisTimeoutError()) is UnavailableReason.EVENT_LOOP_BLOCKED
    await until(lambda: metrics.LOOP_LAG_SECONDS._sum.get() > before + BLOCK_S / 2)
    assert unavailable_reason(TimeoutError()) is UnavailableReason.EVENT_LOOP_BLOCKED
    assert unavailable_reason(ConnectionError()) is UnavailableReason.REDIS_UNREACHABLE
