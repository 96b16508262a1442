"""Group commit: items that wait are sent together; while one batch is under way, the next gathers.

`Batcher` knows nothing of what it carries: `inbox` sends events this way, `delivery` sends acks.
`Deadlines` fails items that wait too long. `ScriptBatcher` batches single calls of scripts.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from .. import cancellation
from .connections import Connections
from .scripts import NO_NEEDS, Argument, Needs, Script, ScriptCall

# How late after its deadline an item may fail.
DEADLINE_CHECK_EVERY_S = 0.05
# Bounds what one reply may hold, and for how long a batch keeps the next one waiting.
MAX_SCRIPT_CALLS = 128

Item = TypeVar("Item")
Reply = TypeVar("Reply")


class Batcher(Generic[Item, Reply]):
    """Flush the items of one loop turn as one batch; one batch at a time, no timer.

    Args:
        flush: Sends a list of items and returns one reply, or one exception, for each, in order.
        max_items: The most items of one batch.
        waits_for_more: Whether each batch waits for as long as every turn of the loop brings more.
            It makes fewer batches where items come from tasks that take turns.
    """

    def __init__(
        self,
        flush: Callable[[list[Item]], Awaitable[Sequence[Reply | Exception]]],
        *,
        max_items: int,
        waits_for_more: bool = False,
    ) -> None:
        self._flush = flush
        self._max_items = max_items
        self._waits_for_more = waits_for_more
        self._waiting: deque[tuple[Item, asyncio.Future[Reply]]] = deque()
        self._flushing: asyncio.Task[None] | None = None
        self._is_closed = False

    def submit(self, item: Item) -> asyncio.Future[Reply]:
        """Put *item* into the next batch; the future returns its reply or raises.

        After `close` it is canceled at once.
        """
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Reply] = loop.create_future()
        if self._is_closed:
            reply.cancel()
            return reply
        self._waiting.append((item, reply))
        if self._flushing is None:
            self._flushing = loop.create_task(self._flush_until_empty())
        return reply

    async def close(self) -> None:
        """Cancel the batch under way and every item that waits; return when none is left.

        What `flush` uses must stay open until then.
        """
        self._is_closed = True
        if self._flushing is not None:
            await cancellation.cancel_and_wait(self._flushing)
        for _, reply in self._waiting:
            reply.cancel()
        self._waiting.clear()

    async def _flush_until_empty(self) -> None:
        try:
            while self._waiting:
                if self._waits_for_more:
                    await self._wait_for_more()
                size = min(len(self._waiting), self._max_items)
                await self._flush_batch([self._waiting.popleft() for _ in range(size)])
        finally:
            self._flushing = None

    async def _wait_for_more(self) -> None:
        """Wait for as long as each turn of the loop brings more."""
        before = 0
        while before < len(self._waiting) < self._max_items:
            before = len(self._waiting)
            await asyncio.sleep(0)

    async def _flush_batch(self, batch: list[tuple[Item, asyncio.Future[Reply]]]) -> None:
        futures = [future for _, future in batch]
        try:
            replies = await self._flush([item for item, _ in batch])
            for future, reply in zip(futures, replies, strict=True):
                _resolve(future, reply)
        except Exception as error:  # noqa: BLE001 - every item of the batch receives it
            for future in futures:
                _resolve(future, error)
        finally:
            # Only the cancellation of the batch leaves a future unresolved.
            for future in futures:
                future.cancel()


def _resolve(future: asyncio.Future[Reply], reply: Reply | Exception) -> None:
    """Resolve *future*, unless its caller has been canceled or its deadline has passed."""
    if future.done():
        return
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)


class Deadlines:
    """Fails futures that are not resolved in time, all of them by one timer.

    A timer for each would cost more than most of what is waited for.

    Args:
        make_error: Makes the error for a future whose deadline has passed.
    """

    def __init__(self, make_error: Callable[[], Exception]) -> None:
        self._make_error = make_error
        self._watched: deque[tuple[float, asyncio.Future[Any]]] = deque()

    def watch(self, deadline: float, future: asyncio.Future[Any]) -> None:
        """Fail *future* at *deadline* of the loop's clock, never earlier than the one before."""
        self._watched.append((deadline, future))
        if len(self._watched) == 1:
            asyncio.get_running_loop().call_later(DEADLINE_CHECK_EVERY_S, self._check)

    def _check(self) -> None:
        """Drop resolved futures, fail those that are overdue, and check again later."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._watched:
            deadline, future = self._watched[0]
            if not future.done():
                if deadline > now:
                    break
                future.set_exception(self._make_error())
            self._watched.popleft()
        if self._watched:
            loop.call_later(DEADLINE_CHECK_EVERY_S, self._check)


class ScriptBatcher:
    """Runs scripts; the calls of one loop turn share a round trip.

    A worker may have hundreds of consumers, each with a call under way. Each on a connection of its
    own, they would exhaust the pool as soon as Redis is some milliseconds away. In Cluster only
    calls to one primary share a batch: while one primary fails, calls to the others go on.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._batchers: dict[tuple[str, Needs], Batcher[ScriptCall, Any]] = {}

    async def run_one(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument],
        *,
        needs: Needs = NO_NEEDS,
    ) -> Any:
        """Run one script and return its reply; *needs* as for `Connections.run`.

        Raises:
            RedisError: The call failed, or it is unknown whether it did.
        """
        shard = (self._connections.primary_of(keys[0]), needs)
        batcher = self._batchers.get(shard)
        if batcher is None:

            async def flush(calls: Sequence[ScriptCall]) -> list[Any]:
                return await self._connections.run(calls, needs=needs)

            batcher = self._batchers[shard] = Batcher(flush, max_items=MAX_SCRIPT_CALLS)
        return await batcher.submit(ScriptCall(script, keys, arguments))
