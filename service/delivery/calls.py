"""Calls of one handler: each in a task of its own, ended when its time is up. Counts nothing.

A handler may cancel itself, swallow a cancellation, or leave its task half canceled, as the
standard library's `TaskGroup` does before Python 3.13. In a task of its own it does that to
nobody else.
"""

from __future__ import annotations

import asyncio

import structlog

from ..handlers import Handler
from ..telemetry import metrics
from ..transitions.transition import StatusTransition

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class HandlerCalls:
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
        self._calls: set[_Call] = set()
        self._seconds = metrics.DELIVERY_SECONDS.labels(name)

    async def call(self, transition: StatusTransition) -> BaseException | None:
        """Call the handler once; return what it raised, `TimeoutError` when its time was up."""
        call = _Call(self._name, self._handler, transition, self._timeout_s)
        self._calls.add(call)
        try:
            await call.over
        finally:
            if call.task.done():
                self._calls.discard(call)
        self._seconds.observe(asyncio.get_running_loop().time() - call.begun)
        return call.outcome()

    async def end(self) -> None:
        """Cancel every call and wait until all are over."""
        tasks = [call.task for call in self._calls]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._calls.clear()


class _Call:
    """One call: a task, and the timer that ends it.

    `asyncio.wait` does the same, at a third of what a call costs us.
    """

    __slots__ = ("_is_late", "_limit", "_name", "_timeout_s", "begun", "outcomes", "over", "task")

    def __init__(
        self, name: str, handler: Handler, transition: StatusTransition, timeout_s: float
    ) -> None:
        loop = asyncio.get_running_loop()
        self.begun = loop.time()
        self.outcomes: list[BaseException | None] = []
        self.over: asyncio.Future[None] = loop.create_future()
        self.task = loop.create_task(call_handler(name, handler, transition, self.outcomes))
        self.task.add_done_callback(self._end)
        self._name = name
        self._timeout_s = timeout_s
        self._is_late = False
        self._limit = loop.call_later(timeout_s, self._expire)

    def outcome(self) -> BaseException | None:
        """Return what the handler raised."""
        error = self.outcomes[0] if self.outcomes else asyncio.CancelledError()
        is_ours = self._is_late and isinstance(error, asyncio.CancelledError)
        return TimeoutError() if is_ours else error

    def _expire(self) -> None:
        """Cancel the call. Its session waits until it is over: the next must not overlap it."""
        if self._is_late:
            log.error("handler.stuck", handler=self._name)
        self._is_late = True
        self.task.cancel()
        self._limit = asyncio.get_running_loop().call_later(self._timeout_s, self._expire)

    def _end(self, _: asyncio.Task[None]) -> None:
        self._limit.cancel()
        if not self.over.done():
            self.over.set_result(None)


async def call_handler(
    name: str,
    handler: Handler,
    transition: StatusTransition,
    outcomes: list[BaseException | None],
) -> None:
    """Call a handler, and note how it ended: what it made of its task says less.

    `blocking` finds this frame, and *name* in it, in the stack of a loop that stands still.
    """
    try:
        await handler(transition)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - a handler may raise anything; it is counted
        outcomes.append(error)
    else:
        outcomes.append(None)
