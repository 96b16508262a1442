"""Settings that follow their files while the process runs: read again, exchanged whole.

Which settings do is decided in `processes`; where they stand and what they may be, in `config`.
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

LOOK_EVERY_S = 2.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True)
class _Look(Generic[T]):
    """What was found: a value, or what is wrong with it."""

    found: T | None
    problems: Sequence[str] = ()


class Reloader(Generic[T]):
    """Looks at one setting again and again, and hands over what is new and valid.

    What differs is believed when two looks in a row find the same, or when it was asked for: a
    file that is just being written may look like a shorter one. What is not valid changes
    nothing, and is said once.

    Args:
        setting: What log lines call it.
        current: Its value as the process started.
        read: Returns its value, or raises ConfigError.
        use: Takes a new value into use, and returns what of it may be logged.
    """

    def __init__(
        self,
        setting: str,
        current: T,
        *,
        read: Callable[[], T],
        use: Callable[[T], dict[str, Any]],
    ) -> None:
        self._reloaded, self._kept = f"{setting}.reloaded", f"{setting}.reload_failed"
        self._refused = metrics.CONFIG_RELOAD_FAILED.labels(setting)
        self._current = current
        self._read = read
        self._use = use
        self._asked = asyncio.Event()
        self._last = _Look(current)
        self._said: Sequence[str] = ()

    def ask(self) -> None:
        """Look now, and say what is in use even if it is what was."""
        self._asked.set()

    async def follow(self) -> None:
        """Look for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), LOOK_EVERY_S)
            asked = self._asked.is_set()
            self._asked.clear()
            self._judge(await asyncio.to_thread(self._look), asked=asked)

    def _look(self) -> _Look[T]:
        try:
            return _Look(self._read())
        except ConfigError as error:
            return _Look(None, error.problems)

    def _judge(self, look: _Look[T], *, asked: bool) -> None:
        sure, self._last = asked or look == self._last, look
        if not sure:
            return
        self._refused.set(look.found is None)
        if look.found is None:
            if asked or look.problems != self._said:
                log.error(self._kept, problems=look.problems)
        elif asked or look.found != self._current:
            self._current = look.found
            log.info(self._reloaded, **self._use(look.found))
        self._said = look.problems
