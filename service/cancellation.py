"""Ending tasks for certain, one or many that belong together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

CANCEL_AGAIN_S = 0.1


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel *task* and wait until it is over; what it raised is left in it.

    Once is not enough: on Python 3.11 a cancellation may get lost in redis-py's `wait_for`.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_S)


class Group:
    """Tasks that end together: when one fails, or when all are done.

    Unlike asyncio's, it says whether it is ending, so that none of its tasks has to ask whether it
    was canceled itself (`Task.cancelling`). Foreign code may leave that in any state.

    Attributes:
        is_ending: Whether its tasks are being canceled.
    """

    def __init__(self) -> None:
        self.is_ending = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._dismissed: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._over = asyncio.Event()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def dismiss(self, task: asyncio.Task[None]) -> None:
        """Cancel a task that the others do not need."""
        self._dismissed.add(task)
        task.cancel()

    async def until_over(self) -> None:
        """Wait until all tasks are done; when one fails, or when canceled, cancel the others.

        Raises:
            BaseExceptionGroup: What the tasks raised.
        """
        try:
            await self._over.wait()
        finally:
            self.is_ending = True
            tasks = [*self._tasks]
            for task in tasks:
                task.cancel()
            for task in tasks:
                await end(task)
        if self._errors:
            raise BaseExceptionGroup("tasks have failed", self._errors)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            if not self.is_ending and task not in self._dismissed:
                # What ends in silence would be waited for for ever.
                self._errors.append(RuntimeError("a task was canceled from outside its group"))
        elif (error := task.exception()) is not None:
            self._errors.append(error)
        if self._errors or not self._tasks:
            self._over.set()
