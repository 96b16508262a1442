"""Calls of one handler, each in its own task and with a time limit. Counts no attempts.

A handler may cancel its task, swallow a cancellation, or leave its task half canceled, as the
standard library's `TaskGroup` does before Python 3.13. In its own task it harms nothing of ours.
"""

from __future__ import annotations

import asyncio

import structlog

from ..handlers import AnyHandler
from ..parsers import FETCH
from ..telemetry import logs, metrics
from ..transitions.transition import StatusTransition
from .sources import Item, log_fields

# Handlers that write a line about each call themselves.
_LOG_THEMSELVES = {"log", FETCH}

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class HandlerCalls:
    """Calls a handler and returns how each call ended.

    Args:
        name: The handler's name.
        handler: Takes an item; returning means that it is done with it for good.
        timeout_s: Seconds one call may take.
    """

    def __init__(self, name: str, handler: AnyHandler, timeout_s: float) -> None:
        self._name = name
        self._handler = handler
        self._timeout_s = timeout_s
        self._calls: set[_Call] = set()
        self._seconds = metrics.DELIVERY_SECONDS.labels(name)

    async def call(self, item: Item) -> BaseException | None:
        """Call the handler once; return what it raised, or `TimeoutError` after the time limit."""
        call = _Call(self._name, self._handler, item, self._timeout_s)
        self._calls.add(call)
        try:
            await call.ended
        finally:
            # Canceled while waiting, the call may run on: `cancel_all` still has to find it.
            if call.task.done():
                self._calls.discard(call)
        seconds = asyncio.get_running_loop().time() - call.started_at
        self._seconds.observe(seconds)
        error = call.outcome()
        if error is None and logs.shows_hand_overs():
            self._log_hand_over(item, seconds)
        return error

    def _log_hand_over(self, item: Item, seconds: float) -> None:
        if self._name not in _LOG_THEMSELVES and isinstance(item, StatusTransition):
            log.info(
                "delivery.delivered",
                **log_fields(item),
                previous=item.previous,
                current=item.current,
                reversal=item.reversal,
                replay=item.replay,
                handler=self._name,
                duration_ms=round(seconds * 1000, 3),
            )

    async def cancel_all(self) -> None:
        """Cancel every call and wait until all have ended."""
        tasks = [call.task for call in self._calls]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._calls.clear()


class _Call:
    """One call: a task, and the timer that cancels it.

    `asyncio.wait` with a timeout does the same at three times the cost.
    """

    __slots__ = (
        "_has_timed_out",
        "_name",
        "_timeout_s",
        "_timer",
        "ended",
        "outcomes",
        "started_at",
        "task",
    )

    def __init__(self, name: str, handler: AnyHandler, item: Item, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.started_at = loop.time()
        self.outcomes: list[BaseException | None] = []
        self.ended: asyncio.Future[None] = loop.create_future()
        self.task = loop.create_task(call_handler(name, handler, item, self.outcomes))
        self.task.add_done_callback(self._end)
        self._name = name
        self._timeout_s = timeout_s
        self._has_timed_out = False
        self._timer = loop.call_later(timeout_s, self._time_out)

    def outcome(self) -> BaseException | None:
        """Return what the handler raised; None if it returned."""
        error = self.outcomes[0] if self.outcomes else asyncio.CancelledError()
        if self._has_timed_out and isinstance(error, asyncio.CancelledError):
            # Where it was canceled is where it waited.
            return TimeoutError().with_traceback(error.__traceback__)
        return error

    def _time_out(self) -> None:
        """Cancel the task, and again after each further time limit.

        The session waits until the task has ended, so that its next call does not overlap it.
        """
        if self._has_timed_out:
            log.error("handler.stuck", handler=self._name)
        self._has_timed_out = True
        self.task.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._time_out)

    def _end(self, _: asyncio.Task[None]) -> None:
        self._timer.cancel()
        if not self.ended.done():
            self.ended.set_result(None)


async def call_handler(
    name: str,
    handler: AnyHandler,
    item: Item,
    outcomes: list[BaseException | None],
) -> None:
    """Call a handler and append to *outcomes* how it ended.

    The task's own result is no outcome: the handler may have canceled its task and returned.
    `blocking` looks for this frame, and for *name* in it, in the stack of a blocked event loop.
    """
    try:
        await handler(item)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - a handler may raise anything; it is counted
        outcomes.append(error)
    else:
        outcomes.append(None)
