"""How tests wait: for a condition, up to a deadline. Long, because a busy machine is slow."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")

PATIENCE_S = 30.0
DEADLINE_S = 2 * PATIENCE_S
FIRST_PAUSE_S, MAX_PAUSE_S = 0.002, 0.05


async def until(condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Return what *condition*, a function or a coroutine function, returns once that is true.

    Raises:
        TimeoutError: It was false until the deadline.
    """
    pause_s = FIRST_PAUSE_S
    async with asyncio.timeout(deadline_s):
        while True:
            found = condition()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def wait_until(
    condition: Callable[[], Found],
    deadline_s: float = DEADLINE_S,
    *,
    ignoring: type[Exception] | tuple[type[Exception], ...] = (),
) -> Found:
    """Do the same without an event loop; the errors *ignoring* names count as false."""
    deadline, pause_s = time.monotonic() + deadline_s, FIRST_PAUSE_S
    while True:
        try:
            if found := condition():
                return found
        except ignoring:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
