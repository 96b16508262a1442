"""The circuit of one handler: while its queue cannot be reached, wait and probe, count nothing.

Knows nothing of deliveries. What counts as unreachable is `ConnectionError`, the word every
built-in handler has for it and every handler of yours may use.
"""

from __future__ import annotations

import asyncio
import random

import structlog

from . import metrics

# While a handler cannot reach its queue, it is asked again at least this often.
PROBE_CEILING_S = 30.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Circuit:
    """Open from a connection error until any call reaches the queue again.

    Args:
        handler: The handler's name.
        first_s: The first probe comes within this many seconds, each later one within twice that.
    """

    def __init__(self, handler: str, *, first_s: float) -> None:
        self.probing = asyncio.Lock()
        self.reached = 0
        self._handler = handler
        self._first_s = first_s
        self._probes = 0
        self._gauge = metrics.CIRCUIT_OPEN.labels(handler)
        self._gauge.set(0)

    @property
    def is_open(self) -> bool:
        """Whether calls have to wait, but for one at a time that holds `probing`."""
        return self._probes > 0

    def answered(self) -> None:
        """Note a call that reached the queue, whatever came of it."""
        self.reached += 1
        if self.is_open:
            log.warning("circuit.closed", handler=self._handler, probes=self._probes)
            self._probes = 0
            self._gauge.set(0)

    def failed(self, *, reached_before: int) -> bool:
        """Note a connection error; say whether it is the queue's, and not that one call's.

        It is when no call has reached the queue since *reached_before* was read from `reached`, and
        when others were told so meanwhile.
        """
        if self.is_open:
            return True
        if self.reached != reached_before:
            return False
        log.error("circuit.opened", handler=self._handler)
        self._probes = 1
        self._gauge.set(1)
        return True

    def pause_s(self) -> float:
        """Return the seconds before the next probe, and count it."""
        longest = min(PROBE_CEILING_S, self._first_s * 2 ** min(self._probes - 1, 32))
        self._probes += 1
        return random.uniform(0, longest)  # noqa: S311 - jitter
