"""The budget of requests: its rate, its burst, who comes first, and that all processes share it."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.cancellation import cancel_and_wait
from service.errors import Unavailable, UnavailableReason
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.keys import Keys
from service.stripe_api import rate_limit
from service.stripe_api.client import DEADLINE_S
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
    """A fifth of a second's requests pass at once, the others one by one."""
    assert 0.9 < await take(RateLimiter(connections, keys, 20), 4 + 20) < 5


async def test_processes_share_the_budget_of_a_mode(connections: Connections, keys: Keys) -> None:
    """Two limiters take from one budget; the modes have one each."""
    limiters = [RateLimiter(connections, keys, 20) for _ in range(2)]
    began = time.monotonic()
    await asyncio.gather(*(take(limiter, 10) for limiter in limiters))
    assert time.monotonic() - began > 0.7
    await asyncio.wait_for(limiters[0].wait(is_live=True, priority=Priority.BACKFILL), 0.7)


@pytest.mark.parametrize(
    ("left", "wait_s"),
    [
        # What is in a budget of two, and how long fetches, the reconciler and `backfill` wait.
        (-1000.0, (1.0, 1.5, 2.0)),
        (0.0, (1.0, 1.5, 2.0)),
        (0.8, (0.2, 0.7, 1.2)),
        (1.2, (0.0, 0.3, 0.8)),
        (1.7, (0.0, 0.0, 0.3)),
        (2.0, (0.0, 0.0, 0.0)),
        (1000.0, (0.0, 0.0, 0.0)),
    ],
)
async def test_a_reserve_is_left(
    left: float, wait_s: tuple[float, ...], connections: Connections, keys: Keys
) -> None:
    """The reconciler leaves a quarter of the burst to fetches, and `backfill` a half.

    A clock that stepped back leaves an empty budget, not one that stays empty for long.
    """
    limiter, key = RateLimiter(connections, keys, 1), keys.api_rate(is_live=False)
    found = []
    for priority in Priority:
        seconds, microseconds = await connections.client.time()
        full_at = seconds * 1_000_000 + microseconds + int((2 - left) * 1_000_000)
        await connections.client.set(key, full_at)
        found.append(await limiter._take(key, priority))
        assert (found[-1] > 0) is (int(await connections.client.get(key)) == full_at)
    assert found == pytest.approx(wait_s, abs=0.15)


async def test_a_full_budget_leaves_nothing_behind(connections: Connections, keys: Keys) -> None:
    """The key lives only until the budget is full again."""
    await take(RateLimiter(connections, keys, 20), 3)
    left_ms = await connections.client.pttl(keys.api_rate(is_live=False))
    assert 0 < left_ms <= 150


@pytest.mark.parametrize("priority", [Priority.RECONCILE, Priority.BACKFILL])
async def test_fetches_do_not_come_first_for_ever(
    priority: Priority, connections: Connections, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While fetches take all there is, what has waited long enough passes all the same."""
    assert 2 * rate_limit.PATIENCE_S <= DEADLINE_S
    monkeypatch.setattr(rate_limit, "PATIENCE_S", 0.2)

    async def fetch() -> None:
        limiter = RateLimiter(connections, keys, 5)
        while True:
            await limiter.wait(is_live=True, priority=Priority.FETCH)

    fetching = [asyncio.create_task(fetch()) for _ in range(3)]
    limiter = RateLimiter(connections, keys, 5)
    for _ in range(3):
        await asyncio.wait_for(limiter.wait(is_live=True, priority=priority), 10)
    for task in fetching:
        await cancel_and_wait(task)


async def test_redis_is_needed() -> None:
    """Without Redis nothing passes, and the reason is given."""
    async with connect(Secret("redis://127.0.0.1:1")) as nowhere:
        limiter = RateLimiter(nowhere, Keys("idv", 8), 20)
        with pytest.raises(Unavailable) as caught:
            await limiter.wait(is_live=True, priority=Priority.FETCH)
    assert caught.value.reason is UnavailableReason.REDIS_UNREACHABLE
    assert caught.value.__context__ is None
