"""Repeated faults: of each kind the first lines are written, of the rest their number is told.

Only the lines named here are ever held back: what became of a genuine event that was decided, a
transition and a dead letter are always written, and the metrics count everything. Nothing here
writes a line.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

WINDOW_S = 10.0
MAX_PER_WINDOW = 20
# Of libraries' messages there are more than anybody can list; the kinds remembered are bounded.
MAX_KINDS = 256

REPEATED = frozenset(
    {
        "backlog.filled",
        "circuit.still_open",
        "delivery.broken",
        "delivery.retried",
        "delivery.dead_letters_full",
        "dispatcher.ended",
        "dispatcher.failed",
        "event.unavailable",
        "event.rejected",
        "handler.blocking",
        "handler.stuck",
        "reading.paused",
        "redis.recovered",
        "redis.lost",
        "worker.rebalance_failed",
    }
)
# What makes two lines of one name two kinds: words from closed lists, classes and names of ours.
_TOLD_APART_BY = ("reason", "error", "handler")


class _Window(NamedTuple):
    ends: float
    written: int
    held_back: int


class LogThrottle:
    """Decides line by line; one for everything that writes to one place.

    Args:
        clock: Seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: OrderedDict[tuple[Any, ...], _Window] = OrderedDict()

    def held_back_before(self, fields: Mapping[str, Any]) -> int | None:
        """Return how many lines like this one were held back since the last; None: hold it back."""
        if fields["event"] not in REPEATED:
            return 0
        return self.held_back((fields["event"], *(fields.get(name) for name in _TOLD_APART_BY)))

    def held_back(self, kind: tuple[Any, ...]) -> int | None:
        """Return the same for a kind of line that may always repeat."""
        now = self._clock()
        window = self._windows.pop(kind, _Window(0.0, 0, 0))
        held_back = window.held_back
        if now >= window.ends:
            window = _Window(now + WINDOW_S, 0, held_back)
        if window.written < MAX_PER_WINDOW:
            self._keep(kind, window._replace(written=window.written + 1, held_back=0))
            return held_back
        self._keep(kind, window._replace(held_back=held_back + 1))
        return None

    def _keep(self, kind: tuple[Any, ...], window: _Window) -> None:
        """Remember the kind as the latest seen; forget the one not seen for longest."""
        self._windows[kind] = window
        if len(self._windows) > MAX_KINDS:
            self._windows.popitem(last=False)
