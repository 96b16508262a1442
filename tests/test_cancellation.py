"""A task is ended for certain."""

from __future__ import annotations

import asyncio

from service import cancellation


async def test_a_lost_cancellation_is_sent_again() -> None:
    """A task that never heard of its end, as redis-py's on Python 3.11, is told until it does."""
    heard = 0

    async def deaf() -> None:
        nonlocal heard
        while heard < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard += 1

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)

    await cancellation.cancel_and_wait(task)

    assert heard == 3
