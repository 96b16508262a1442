"""Measures whether the event loop keeps up. Which handler blocks it is found in `blocking`."""

from __future__ import annotations

import asyncio
import time

from . import metrics

TICK_S = 0.2
# Half the time limit of a Redis call.
BLOCKED_S = 0.5
# A Redis call that times out now may have begun this long ago.
REMEMBERED_S = 2.0


class LoopLag:
    """Measures the delay of the event loop of this process.

    Attributes:
        ticks: How many times the timer has fired.
    """

    def __init__(self) -> None:
        self.ticks = 0
        self._ticked_at = float("inf")
        self._blocked_at = float("-inf")

    def was_blocked(self) -> bool:
        """Say whether the loop is blocked now or was in the last `REMEMBERED_S` seconds."""
        now = time.monotonic()
        return now - self._ticked_at > TICK_S + BLOCKED_S or now - self._blocked_at < REMEMBERED_S

    async def watch(self) -> None:
        """Measure until canceled."""
        try:
            while True:
                self._ticked_at = time.monotonic()
                await asyncio.sleep(TICK_S)
                self.ticks += 1
                lag_s = time.monotonic() - self._ticked_at - TICK_S
                metrics.LOOP_LAG_SECONDS.observe(max(0.0, lag_s))
                if lag_s > BLOCKED_S:
                    self._blocked_at = time.monotonic()
        finally:
            self._ticked_at = float("inf")


# A process has one event loop.
LOOP_LAG = LoopLag()
