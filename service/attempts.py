"""Calls of one handler: each in a task of its own, ended when its time is up. Counts nothing.

A handler may cancel itself, swallow a cancellation, or leave its task half canceled, as the
standard library's `TaskGroup` does before Python 3.13. In a task of its own it does that to
nobody else.
"""

from __future__ import annotations

import asyncio

import structlog

from . import metrics
from .handlers import Handler
from .transitions import StatusTransition

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Attempts:
    """Calls a handler, and says how that ended.

    Args:
        name: The handler's name.
        handler: Takes a transition; returning means it is safe.
        timeout_s: Seconds one call may take.
    """

    def __init__(self, name: str, handler: Handler, timeout_s: float) -> None:
        self._name = name
        self._handler = handler
        self._timeout_s = timeout_s
        self._calls: set[asyncio.Task[None]] = set()
        self._seconds = metrics.DELIVERY_SECONDS.labels(name)

    async def call(self, transition: StatusTransition) -> BaseException | None:
        """Call the handler once; return what it raised, `TimeoutError` when its time was up."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        outcome: list[BaseException | None] = []
        call = loop.create_task(call_handler(self._name, self._handler, transition, outcome))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        _, late = await asyncio.wait({call}, timeout=self._timeout_s)
        if late:
            await self._cancel(call)
        self._seconds.observe(loop.time() - begun)
        error = outcome[0] if outcome else asyncio.CancelledError()
        return TimeoutError() if late and isinstance(error, asyncio.CancelledError) else error

    async def end(self) -> None:
        """Cancel every call and wait until all are over."""
        for call in self._calls:
            call.cancel()
        while self._calls:
            await asyncio.wait(self._calls)

    async def _cancel(self, call: asyncio.Task[None]) -> None:
        """Cancel a call and wait until it is over: its session's next must not overlap it."""
        call.cancel()
        while not call.done():
            await asyncio.wait({call}, timeout=self._timeout_s)
            if not call.done():
                log.error("handler.stuck", handler=self._name)
                call.cancel()


async def call_handler(
    name: str,
    handler: Handler,
    transition: StatusTransition,
    outcome: list[BaseException | None],
) -> None:
    """Call a handler, and note how it ended: what it made of its task says less."""
    try:
        await handler(transition)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - a handler may raise anything; it is counted
        outcome.append(error)
    else:
        outcome.append(None)
