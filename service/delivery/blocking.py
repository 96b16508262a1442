"""Detects a handler that blocks the event loop, and logs its name and where it blocks.

A handler that blocks its thread (`time.sleep`, a synchronous client, a long computation) stops
everything in its process: other handlers, lease renewal, and calls to Redis, whose replies then
seem to be late. A thread of ours looks into the stack of the event loop's thread while the loop
does not run.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import structlog

from ..telemetry.loop_lag import LOOP_LAG, TICK_S
from .calls import call_handler

# Checks without a tick of the loop in between. Counted, not timed: while the whole process is
# suspended, no handler is to blame.
MISSED_TICKS = 3
_PACKAGE = str(Path(__file__).parent)

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class _BlockingCall(NamedTuple):
    handler: str
    place: str


@contextmanager
def detecting() -> Iterator[None]:
    """Log each handler that blocks the running loop, once for each block, within this context."""
    stopping = threading.Event()
    arguments = (asyncio.get_running_loop(), threading.get_ident(), stopping)
    threading.Thread(target=_watch, args=arguments, daemon=True).start()
    try:
        yield
    finally:
        stopping.set()


def _watch(loop: asyncio.AbstractEventLoop, thread_id: int, stopping: threading.Event) -> None:
    """Check regularly whether the loop has ticked; where it has not, look into its stack once."""
    seen, missed = -1, 0
    while not stopping.wait(TICK_S):
        missed = missed + 1 if seen == LOOP_LAG.ticks else 0
        seen = LOOP_LAG.ticks
        if missed == MISSED_TICKS:
            found = _blocking_call(sys._current_frames().get(thread_id))  # noqa: SLF001 - no other way
            if found is not None:
                since = time.monotonic() - MISSED_TICKS * TICK_S
                # Logged by the loop itself once it runs again, when the duration is known.
                loop.call_soon_threadsafe(_log_blocking, found, since)


def _log_blocking(found: _BlockingCall, since: float) -> None:
    blocked_s = round(time.monotonic() - since, 1)
    log.warning("handler.blocking", **found._asdict(), blocked_s=blocked_s)


def _blocking_call(frame: FrameType | None) -> _BlockingCall | None:
    """Return the handler that is running in a stack, and the place in its code; None for none."""
    place = ""
    while frame is not None:
        code = frame.f_code
        if code is call_handler.__code__:
            return _BlockingCall(frame.f_locals["name"], place)
        # The outermost frame of the handler wins: below it are libraries, above it is our code.
        if not code.co_filename.startswith(_PACKAGE):
            place = f"{code.co_filename}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return None
