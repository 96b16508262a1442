"""Which handler holds the event loop, and where.

A handler that blocks its thread (`time.sleep`, a synchronous client, a long computation) stops
everything in its process: other handlers, leases, and calls to Redis, whose replies then seem to
come late. A thread of our own looks where the loop's thread is while the loop does not come round.
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

# So many looks without a tick of the loop in between. Counted, not timed: while the whole process
# is suspended nobody blocks it.
MISSED_TICKS = 3
_PACKAGE = str(Path(__file__).parent)

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class _Blocking(NamedTuple):
    handler: str
    place: str


@contextmanager
def watched() -> Iterator[None]:
    """Name each handler that blocks the running loop, for as long as the block lasts."""
    over = threading.Event()
    arguments = (asyncio.get_running_loop(), threading.get_ident(), over)
    threading.Thread(target=_look_on, args=arguments, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _look_on(loop: asyncio.AbstractEventLoop, thread_id: int, over: threading.Event) -> None:
    """Look regularly whether the loop has ticked; where it has not, once into its stack."""
    seen, missed = -1, 0
    while not over.wait(TICK_S):
        missed = missed + 1 if seen == LOOP_LAG.ticks else 0
        seen = LOOP_LAG.ticks
        if missed == MISSED_TICKS:
            found = _blocking(sys._current_frames().get(thread_id))  # noqa: SLF001 - no other way
            if found is not None:
                since = time.monotonic() - MISSED_TICKS * TICK_S
                # Said by the loop itself, once it can.
                loop.call_soon_threadsafe(_say, found, since)


def _say(found: _Blocking, since: float) -> None:
    blocked_s = round(time.monotonic() - since, 1)
    log.warning("handler.blocking", **found._asdict(), blocked_s=blocked_s)


def _blocking(frame: FrameType | None) -> _Blocking | None:
    """Return the handler that is being called in a stack, and where in its code that stands."""
    place = ""
    while frame is not None:
        code = frame.f_code
        if code is call_handler.__code__:
            return _Blocking(frame.f_locals["name"], place)
        # The outermost frame of the handler's own: below it are libraries, above it is ours.
        if not code.co_filename.startswith(_PACKAGE):
            place = f"{code.co_filename}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return None
