"""Logs why dispatchers ended: one line for each cause, however many it ended and how often.

When Redis goes away, every dispatcher of the process ends, starts again and ends again.
"""

from __future__ import annotations

import asyncio

import structlog

from .leases import Assignment

# All dispatchers that one cause ends, end within this time.
GATHER_S = 1.0
# After this time without an end, a cause is over: the next end with the same reason is another's.
QUIET_S = 10.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class FailureLog:
    """Gathers the dispatchers that ended by their reason, and logs each cause once."""

    def __init__(self) -> None:
        self._gathered: dict[str, set[Assignment]] = {}
        self._last_at: dict[str, float] = {}

    def record(self, reason: str, assignment: Assignment) -> None:
        """Record that the dispatcher of a handler and a partition has ended."""
        loop = asyncio.get_running_loop()
        is_new = loop.time() - self._last_at.get(reason, float("-inf")) > QUIET_S
        self._last_at[reason] = loop.time()
        if reason in self._gathered:
            self._gathered[reason].add(assignment)
        elif is_new:
            self._gathered[reason] = {assignment}
            loop.call_later(GATHER_S, self._log, reason)

    def flush(self) -> None:
        """Log now what is gathered."""
        for reason in [*self._gathered]:
            self._log(reason)

    def _log(self, reason: str) -> None:
        ended = self._gathered.pop(reason, None)
        if ended:
            handlers = sorted({handler for handler, _ in ended})
            log.warning(
                "dispatcher.ended", reason=reason, dispatchers=len(ended), handlers=handlers
            )
