"""One log line for each cause that ended dispatchers, however many it ended, however often.

When Redis goes away, every dispatcher of the process ends, begins again and ends again.
"""

from __future__ import annotations

import asyncio

import structlog

# What one cause ends, it ends within this time.
GATHER_S = 1.0
# A cause that has ended nothing for so long is over; the next end is another one's.
QUIET_S = 10.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class FailureLog:
    """Gathers the ends of dispatchers by their reason, and logs each cause once."""

    def __init__(self) -> None:
        self._gathered: dict[str, set[tuple[str, int]]] = {}
        self._last_at: dict[str, float] = {}

    def note(self, reason: str, place: tuple[str, int]) -> None:
        """Note that the dispatcher of a handler and a partition has ended."""
        loop = asyncio.get_running_loop()
        is_over = loop.time() - self._last_at.get(reason, float("-inf")) > QUIET_S
        self._last_at[reason] = loop.time()
        if reason in self._gathered:
            self._gathered[reason].add(place)
        elif is_over:
            self._gathered[reason] = {place}
            loop.call_later(GATHER_S, self._log, reason)

    def close(self) -> None:
        """Log what is gathered now."""
        for reason in [*self._gathered]:
            self._log(reason)

    def _log(self, reason: str) -> None:
        ended = self._gathered.pop(reason, None)
        if ended:
            handlers = sorted({handler for handler, _ in ended})
            log.warning(
                "dispatcher.ended", reason=reason, dispatchers=len(ended), handlers=handlers
            )
