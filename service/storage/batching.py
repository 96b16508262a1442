"""Group commit: what waits travels together; while one flight is under way, the next gathers.

Knows nothing of what it carries: `inbox` sends events this way, `mailbox` sends settlements.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from .. import cancellation

Item = TypeVar("Item")
Reply = TypeVar("Reply")


class Batcher(Generic[Item, Reply]):
    """Coalesce the items of one loop turn into one flight; one flight at a time, no timer.

    Args:
        fly: Carries a list of items and returns one reply, or one exception, for each, in order.
        most: The most items of one flight.
        patient: Whether each flight waits for as long as every turn of the loop brings more. It
            makes fewer flights where items come from work that takes turns.
    """

    def __init__(
        self,
        fly: Callable[[list[Item]], Awaitable[Sequence[Reply | Exception]]],
        *,
        most: int,
        patient: bool = False,
    ) -> None:
        self._fly = fly
        self._most = most
        self._patient = patient
        self._waiting: deque[tuple[Item, asyncio.Future[Reply]]] = deque()
        self._flights: asyncio.Task[None] | None = None
        self._is_closed = False

    def submit(self, item: Item) -> asyncio.Future[Reply]:
        """Put *item* on the next flight; the future brings its reply or raises.

        After `close` it is canceled at once.
        """
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Reply] = loop.create_future()
        if self._is_closed:
            reply.cancel()
            return reply
        self._waiting.append((item, reply))
        if self._flights is None:
            self._flights = loop.create_task(self._fly_until_empty())
        return reply

    async def close(self) -> None:
        """Fly no more, and wait until nothing is in the air; whoever waits is canceled.

        Whatever carries the flights must be there until then.
        """
        self._is_closed = True
        if self._flights is not None:
            await cancellation.cancel_and_wait(self._flights)
        for _, reply in self._waiting:
            reply.cancel()
        self._waiting.clear()

    async def _fly_until_empty(self) -> None:
        try:
            while self._waiting:
                if self._patient:
                    await self._gather()
                size = min(len(self._waiting), self._most)
                await self._one_flight([self._waiting.popleft() for _ in range(size)])
        finally:
            self._flights = None

    async def _gather(self) -> None:
        """Wait for as long as each turn of the loop brings more."""
        before = 0
        while before < len(self._waiting) < self._most:
            before = len(self._waiting)
            await asyncio.sleep(0)

    async def _one_flight(self, aboard: list[tuple[Item, asyncio.Future[Reply]]]) -> None:
        waiting = [future for _, future in aboard]
        try:
            replies = await self._fly([item for item, _ in aboard])
            for future, reply in zip(waiting, replies, strict=True):
                _answer(future, reply)
        except Exception as error:  # noqa: BLE001 - whoever waits for the reply receives it
            for future in waiting:
                _answer(future, error)
        finally:
            # Only a flight that was canceled itself leaves anybody without an answer.
            for future in waiting:
                future.cancel()


def _answer(future: asyncio.Future[Reply], reply: Reply | Exception) -> None:
    """Hand over *reply*, unless nobody waits any more."""
    if future.done():
        return
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)
