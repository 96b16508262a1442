"""The time of the stand-in: the real time, until a test moves or stops it."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class Clock:
    """A wall clock. It runs with the machine's, ahead of it or behind, or stands still."""

    def __init__(self) -> None:
        self._offset_s = 0.0
        self._stopped_at: float | None = None

    def time(self) -> float:
        """Return the time, Unix seconds."""
        return time.time() + self._offset_s if self._stopped_at is None else self._stopped_at

    def advance(self, seconds: float) -> None:
        """Move the clock forward, or back if *seconds* is negative."""
        if self._stopped_at is None:
            self._offset_s += seconds
        else:
            self._stopped_at += seconds

    def stop(self, at: float | None = None) -> None:
        """Let the clock stand at *at*, Unix seconds, or where it is now."""
        self._stopped_at = self.time() if at is None else at


def rfc3339(at: float) -> str:
    """Return Unix seconds as APIs under /v2 write a time: `2026-11-29T08:30:00.123Z`."""
    written = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return written.replace("+00:00", "Z")
