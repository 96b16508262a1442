"""The budget of requests: its rate, its burst, who comes first, and that all processes share it."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.errors import Unavailable, UnavailableReason
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.layout import Keys
from service.stripe_api.rate_limit import Priority, RateLimiter


async def take(limiter: RateLimiter, times: int, priority: Priority = Priority.FETCH) -> float:
    """Take some requests of test mode; return the seconds that it took."""
    began = time.monotonic()
    for _ in range(times):
        await limiter.wait(is_live=False, priority=priority)
    return time.monotonic() - began


async def test_a_burst_passes_at_once_and_the_rest_at_the_rate(
    connections: Connections, keys: Keys
) -> None:
    """A quarter of a second's requests pass at once, the others one by one."""
    assert 0.9 < await take(RateLimiter(connections, keys, 20), 5 + 20) < 5


async def test_processes_share_the_budget_of_a_mode(connections: Connections, keys: Keys) -> None:
    """Two limiters take from one budget; the modes have one each."""
    limiters = [RateLimiter(connections, keys, 20) for _ in range(2)]
    began = time.monotonic()
    await asyncio.gather(*(take(limiter, 10) for limiter in limiters))
    assert time.monotonic() - began > 0.7
    await asyncio.wait_for(limiters[0].wait(is_live=True, priority=Priority.BACKFILL), 0.7)


@pytest.mark.parametrize(
    ("priority", "at_once"),
    [(Priority.FETCH, 100), (Priority.RECONCILE, 75), (Priority.BACKFILL, 50)],
)
async def test_a_reserve_is_left(
    priority: Priority, at_once: int, connections: Connections, keys: Keys
) -> None:
    """The reconciler leaves a quarter of the burst to fetches, and `backfill` a half of it."""
    limiter = RateLimiter(connections, keys, 400)
    assert await take(limiter, at_once, priority) < await take(limiter, at_once + 100, priority)


async def test_redis_is_needed() -> None:
    """Without Redis nothing passes, and the reason is given."""
    async with connect(Secret("redis://127.0.0.1:1")) as nowhere:
        limiter = RateLimiter(nowhere, Keys("idv", 8), 20)
        with pytest.raises(Unavailable) as caught:
            await limiter.wait(is_live=True, priority=Priority.FETCH)
    assert caught.value.reason is UnavailableReason.REDIS_UNREACHABLE
    assert caught.value.__context__ is None
