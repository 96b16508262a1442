"""Limits repeated log lines: the first of each kind in a window are written, the rest counted.

Only the events in `THROTTLED` and the messages of libraries are limited. Lines about an event that
was decided, a transition or a dead letter are always written, and metrics count everything.
Nothing here writes a line.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

WINDOW_S = 10.0
MAX_PER_WINDOW = 20
# Libraries may log any number of different messages, so the memory for kinds needs a bound.
MAX_KINDS = 256

THROTTLED = frozenset(
    {
        "admin.login_failed",
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
        "reconcile.failed",
        "redis.recovered",
        "redis.lost",
    }
)
# Lines of one event that differ in these fields are of different kinds. Their values are words
# from closed lists, class names and configured names: nothing that a sender can choose.
_KIND_FIELDS = ("reason", "error", "handler", "endpoint")


class _Window(NamedTuple):
    ends: float
    written: int
    suppressed: int


class LogThrottle:
    """Decides for each line whether it is written. One instance for everything that logs.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: OrderedDict[tuple[Any, ...], _Window] = OrderedDict()

    def check_line(self, fields: Mapping[str, Any]) -> int | None:
        """Return what `check` says of a line of ours; 0 if its event is never throttled."""
        if fields["event"] not in THROTTLED:
            return 0
        return self.check((fields["event"], *(fields.get(name) for name in _KIND_FIELDS)))

    def check(self, kind: tuple[Any, ...]) -> int | None:
        """Decide on a line of this *kind*: None to suppress it, else write it.

        The number returned is how many lines of this kind were suppressed since the last one.
        """
        now = self._clock()
        window = self._windows.pop(kind, _Window(0.0, 0, 0))
        suppressed = window.suppressed
        if now >= window.ends:
            window = _Window(now + WINDOW_S, 0, suppressed)
        if window.written < MAX_PER_WINDOW:
            self._remember(kind, window._replace(written=window.written + 1, suppressed=0))
            return suppressed
        self._remember(kind, window._replace(suppressed=suppressed + 1))
        return None

    def _remember(self, kind: tuple[Any, ...], window: _Window) -> None:
        """Store the kind as the latest seen; forget the one not seen for the longest time."""
        self._windows[kind] = window
        if len(self._windows) > MAX_KINDS:
            self._windows.popitem(last=False)
