"""`batching`: one batch at a time, each item its own reply, and no wait beyond a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from service.storage.batching import DEADLINE_CHECK_EVERY_S, Batcher, Deadlines
from tests.support import virtual_time

pytestmark = pytest.mark.anyio


class Doubler:
    """Replies to each number with its double, as soon as it may."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.under_way = 0
        self.may_reply = asyncio.Event()
        self.may_reply.set()
        self.fails_on: dict[int, Exception] = {}

    async def flush(self, items: list[int]) -> Sequence[int | Exception]:
        """Reply to one batch."""
        self.batches.append(items)
        self.under_way += 1
        assert self.under_way == 1
        try:
            await self.may_reply.wait()
            await asyncio.sleep(0)
        finally:
            self.under_way -= 1
        for item in items:
            if item in self.fails_on:
                raise self.fails_on[item]
        return [item * 2 if item >= 0 else ValueError(str(item)) for item in items]


async def run_ready() -> None:
    """Let everything that is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_loop_turn_is_one_batch() -> None:
    """Items of one loop turn are sent together, in order, each with its own reply."""
    doubler = Doubler()
    batcher = Batcher(doubler.flush, max_items=100)

    replies = await asyncio.gather(*(batcher.submit(n) for n in range(50)))

    assert replies == [n * 2 for n in range(50)]
    assert doubler.batches == [list(range(50))]


async def test_a_batch_may_wait_for_more() -> None:
    """Items that come in one turn after the other are sent together, up to a full batch."""
    doubler = Doubler()
    batcher = Batcher(doubler.flush, max_items=100, waits_for_more=True)
    replies = []
    for n in range(150):
        replies.append(batcher.submit(n))
        await asyncio.sleep(0)

    assert await asyncio.gather(*replies) == [n * 2 for n in range(150)]
    assert [len(batch) for batch in doubler.batches] == [100, 50]


async def test_one_batch_at_a_time() -> None:
    """A single item is sent in the next loop turn; while it is under way the next batch gathers."""
    doubler = Doubler()
    doubler.may_reply.clear()
    batcher = Batcher(doubler.flush, max_items=100)
    replies = [batcher.submit(1)]
    await asyncio.sleep(0)
    assert doubler.batches == [[1]]
    for n in range(2, 6):
        await run_ready()
        replies.append(batcher.submit(n))
    assert doubler.batches == [[1]]

    doubler.may_reply.set()

    assert await asyncio.gather(*replies) == [2, 4, 6, 8, 10]
    assert doubler.batches == [[1], [2, 3, 4, 5]]


async def test_a_batch_has_a_largest_size() -> None:
    """More items make several batches, still in order."""
    doubler = Doubler()
    batcher = Batcher(doubler.flush, max_items=4)

    replies = await asyncio.gather(*(batcher.submit(n) for n in range(10)))

    assert replies == [n * 2 for n in range(10)]
    assert doubler.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_an_exception_among_the_replies_is_of_one_item() -> None:
    """An exception among the replies is raised to the caller whose item it is for."""
    batcher = Batcher(Doubler().flush, max_items=100)

    replies = await asyncio.gather(*(batcher.submit(n) for n in (1, -2, 3)), return_exceptions=True)

    assert [replies[0], replies[2]] == [2, 6]
    assert isinstance(replies[1], ValueError)


async def test_a_failing_flush_fails_its_own_batch() -> None:
    """A flush that raises fails the items of its batch and no others; the next batch is sent."""
    doubler = Doubler()
    doubler.fails_on[2] = OSError("down")
    batcher = Batcher(doubler.flush, max_items=2)

    replies = await asyncio.gather(*(batcher.submit(n) for n in (1, 2, 3)), return_exceptions=True)

    assert [type(reply) for reply in replies] == [OSError, OSError, int]
    assert await batcher.submit(4) == 8


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_too_few_replies_leave_no_item_waiting(count: int) -> None:
    """Items without a reply fail, so that no caller waits for ever, and batches go on."""

    async def flush(items: list[int]) -> list[int]:
        return items[:count]

    batcher = Batcher(flush, max_items=100)

    replies = await asyncio.gather(*(batcher.submit(n) for n in (1, 2, 3)), return_exceptions=True)

    assert replies[:count] == [1, 2, 3][:count]
    assert all(isinstance(reply, ValueError) for reply in replies[count:])


async def test_a_canceled_caller_disturbs_no_other() -> None:
    """A caller that is canceled, before or during its batch, changes nothing for the others."""
    doubler = Doubler()
    doubler.may_reply.clear()
    batcher = Batcher(doubler.flush, max_items=100)

    async def wait_for(item: int) -> int:
        return await batcher.submit(item)

    callers = [asyncio.create_task(wait_for(n)) for n in (1, 2)]
    await run_ready()
    callers += [asyncio.create_task(wait_for(n)) for n in (3, 4)]
    await run_ready()
    for left in (callers[0], callers[2]):
        left.cancel()
    await run_ready()
    doubler.may_reply.set()

    assert await callers[1] == 4
    assert await callers[3] == 8
    assert callers[0].cancelled()
    assert callers[2].cancelled()


async def test_close_cancels_what_is_under_way_and_what_waits() -> None:
    """From the moment `close` begins nothing more is sent, and every future is canceled."""
    doubler = Doubler()
    doubler.may_reply.clear()
    batcher = Batcher(doubler.flush, max_items=100)
    under_way = batcher.submit(1)
    await run_ready()
    waiting = batcher.submit(2)
    closing = asyncio.create_task(batcher.close())
    while not closing.done():
        assert batcher.submit(3) is not None
        await asyncio.sleep(0)

    assert all(reply.cancelled() for reply in (under_way, waiting, batcher.submit(4)))
    assert batcher._flushing is None
    assert doubler.batches == [[1]]


class OverdueError(Exception):
    """The error of a future whose deadline has passed."""


def test_each_future_fails_at_its_own_deadline() -> None:
    """A future that is not resolved fails within one check after its deadline, and not before."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(OverdueError)
        failed_at: dict[int, float] = {}

        async def wait(n: int) -> None:
            future: asyncio.Future[Any] = loop.create_future()
            deadlines.watch(loop.time() + 5, future)
            try:
                await future
            except OverdueError:
                failed_at[n] = loop.time()

        async with asyncio.TaskGroup() as callers:
            for n in range(4):
                callers.create_task(wait(n))
                await asyncio.sleep(1)
        assert sorted(failed_at) == [0, 1, 2, 3]
        for n, at in failed_at.items():
            assert n + 5 <= at <= n + 5 + 2 * DEADLINE_CHECK_EVERY_S

    virtual_time.run(main())


def test_a_resolved_future_is_dropped() -> None:
    """A result in time stays the result; once all are resolved no future or timer is held."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(OverdueError)
        for _ in range(3):
            futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in range(9)]
            for future in futures:
                deadlines.watch(loop.time() + 5, future)
            for n, future in enumerate(futures):
                future.set_result(n)
            await asyncio.sleep(2 * DEADLINE_CHECK_EVERY_S)
            assert [future.result() for future in futures] == [*range(9)]
            assert not deadlines._watched
        # With a timer left over this would never end, and not be found out as a hang.
        await loop.create_future()

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        virtual_time.run(main())
