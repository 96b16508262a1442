"""Settings that are read again while the process runs, and replaced as a whole.

Which settings these are is decided in `composition`; what values they may have, in `config`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from ..errors import ConfigError
from ..telemetry import metrics

T = TypeVar("T")

READ_EVERY_S = 2.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True)
class _Reading(Generic[T]):
    """What one reading found: a value, or the problems with it."""

    value: T | None
    problems: Sequence[str] = ()


class Reloader(Generic[T]):
    """Reads one setting every two seconds, and applies a new valid value.

    A change counts once two readings in a row agree, or at once after a request: a file that is
    being written may look like a shorter one. An invalid value changes nothing, and is logged once.

    Args:
        setting: Its name in log lines.
        current: Its value when the process started.
        read: Returns its value, or raises ConfigError.
        apply: Puts a new value into use, and returns the fields to log about it.
    """

    def __init__(
        self,
        setting: str,
        current: T,
        *,
        read: Callable[[], T],
        apply: Callable[[T], dict[str, Any]],
    ) -> None:
        self._reloaded, self._failed = f"{setting}.reloaded", f"{setting}.reload_failed"
        self._failed_gauge = metrics.CONFIG_RELOAD_FAILED.labels(setting)
        self._current = current
        self._read = read
        self._apply = apply
        self._requested = asyncio.Event()
        self._previous = _Reading(current)
        self._logged_problems: Sequence[str] = ()

    def request(self) -> None:
        """Read now, and log what is in use even if nothing changed."""
        self._requested.set()

    async def run(self) -> None:
        """Read and apply, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._requested.wait(), READ_EVERY_S)
            is_requested = self._requested.is_set()
            self._requested.clear()
            self._judge(await asyncio.to_thread(self._read_once), is_requested=is_requested)

    def _read_once(self) -> _Reading[T]:
        try:
            return _Reading(self._read())
        except ConfigError as error:
            return _Reading(None, error.problems)

    def _judge(self, reading: _Reading[T], *, is_requested: bool) -> None:
        is_settled, self._previous = is_requested or reading == self._previous, reading
        if not is_settled:
            return
        self._failed_gauge.set(reading.value is None)
        if reading.value is None:
            if is_requested or reading.problems != self._logged_problems:
                log.error(self._failed, problems=reading.problems)
        elif is_requested or reading.value != self._current:
            self._current = reading.value
            log.info(self._reloaded, **self._apply(reading.value))
        self._logged_problems = reading.problems
