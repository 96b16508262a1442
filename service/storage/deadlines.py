"""Deadlines of many waiters, kept by one timer: whoever waits too long is told so.

A timer for each would cost more than most of what is waited for. Knows nothing of what that is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

# So much later than its deadline a waiter may be told.
LOOK_EVERY_S = 0.05


class Deadlines:
    """Fails what is not answered in time.

    Args:
        overdue: Makes the error that a waiter is given.
    """

    def __init__(self, overdue: Callable[[], Exception]) -> None:
        self._overdue = overdue
        self._waiting: deque[tuple[float, asyncio.Future[Any]]] = deque()

    def watch(self, deadline: float, reply: asyncio.Future[Any]) -> None:
        """Fail *reply* at *deadline* of the loop's clock, never earlier than the one before."""
        self._waiting.append((deadline, reply))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        """Let go of who has been answered, tell who is overdue, and look again later."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._waiting:
            deadline, reply = self._waiting[0]
            if not reply.done():
                if deadline > now:
                    break
                reply.set_exception(self._overdue())
            self._waiting.popleft()
        if self._waiting:
            loop.call_later(LOOK_EVERY_S, self._look)
