"""The laws of `deadlines`: nobody waits longer than he said, and nobody is told too early."""

from __future__ import annotations

import asyncio
from typing import Any

from service.storage.deadlines import LOOK_EVERY_S, Deadlines
from tests.support import virtual_time


class OverdueError(Exception):
    """What a waiter is told."""


def test_each_is_told_at_his_own_deadline() -> None:
    """Whoever is not answered fails within one look after his deadline, and not before it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(OverdueError)
        told: dict[int, float] = {}

        async def wait(n: int) -> None:
            reply: asyncio.Future[Any] = loop.create_future()
            deadlines.watch(loop.time() + 5, reply)
            try:
                await reply
            except OverdueError:
                told[n] = loop.time()

        async with asyncio.TaskGroup() as waiters:
            for n in range(4):
                waiters.create_task(wait(n))
                await asyncio.sleep(1)
        assert sorted(told) == [0, 1, 2, 3]
        for n, at in told.items():
            assert n + 5 <= at <= n + 5 + 2 * LOOK_EVERY_S

    virtual_time.run(main())


def test_who_is_answered_is_let_go() -> None:
    """An answer in time stays the answer, and nothing is held, nor any timer, once all have one."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(OverdueError)
        for _ in range(3):
            replies: list[asyncio.Future[Any]] = [loop.create_future() for _ in range(9)]
            for reply in replies:
                deadlines.watch(loop.time() + 5, reply)
            for n, reply in enumerate(replies):
                reply.set_result(n)
            await asyncio.sleep(2 * LOOK_EVERY_S)
            assert [reply.result() for reply in replies] == [*range(9)]
            assert not deadlines._waiting
        # With a timer left over, this would return and not be found out as a hang.
        try:
            await loop.create_future()
        except RuntimeError:
            return

    try:
        virtual_time.run(main())
    except RuntimeError as error:
        assert "nothing will ever happen" in str(error)  # noqa: PT017 - raised by the loop itself
