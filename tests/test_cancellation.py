"""A task that swallows cancellations is canceled all the same."""

from __future__ import annotations

import asyncio

from service import cancellation


async def test_a_lost_cancellation_is_sent_again() -> None:
    """A task that swallows a cancellation, like redis-py's on Python 3.11, is canceled again."""
    swallowed = 0

    async def swallow() -> None:
        nonlocal swallowed
        while swallowed < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1

    task = asyncio.create_task(swallow())
    await asyncio.sleep(0)

    await cancellation.cancel_and_wait(task)

    assert swallowed == 3
