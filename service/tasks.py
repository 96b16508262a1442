"""Ending a task for certain. Nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

CANCEL_AGAIN_S = 0.1


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel *task* and wait until it is over; what it raised is left in it.

    Once is not enough: on Python 3.11 a cancellation may get lost in redis-py's `wait_for`.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_S)
