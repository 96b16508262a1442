"""Reliable cancellation of asyncio tasks: of one task, and of a group that ends together.

Rule: canceling a task once is not enough. On Python 3.11 redis-py's `wait_for` can swallow a
cancellation, and handlers are foreign code that may catch it. So we cancel repeatedly until the
task is done, and never rely on `Task.cancelling()`, which foreign code may leave in any state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

CANCEL_INTERVAL_S = 0.1


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancel *task* until it is done. Its result or exception stays in the task."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_INTERVAL_S)


class TaskGroup:
    """Tasks that end together: when one of them fails, or when all are done.

    `asyncio.TaskGroup` uses `Task.cancelling()` to find out who canceled it; this one keeps its
    own flag instead.

    Attributes:
        is_ending: Whether the group is canceling its tasks.
    """

    def __init__(self) -> None:
        self.is_ending = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._canceled: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._finished = asyncio.Event()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task in the group."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel one task without ending the group."""
        self._canceled.add(task)
        task.cancel()

    async def wait(self) -> None:
        """Wait until all tasks are done. If one fails, or on cancellation, cancel the rest.

        Raises:
            BaseExceptionGroup: The exceptions of the tasks that failed.
        """
        try:
            await self._finished.wait()
        finally:
            self.is_ending = True
            tasks = [*self._tasks]
            for task in tasks:
                task.cancel()
            for task in tasks:
                await cancel_and_wait(task)
        if self._errors:
            raise BaseExceptionGroup("tasks have failed", self._errors)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            if not self.is_ending and task not in self._canceled:
                # Without an error the group would go on waiting although a task is missing.
                self._errors.append(RuntimeError("a task was canceled from outside its group"))
        elif (error := task.exception()) is not None:
            self._errors.append(error)
        if self._errors or not self._tasks:
            self._finished.set()
