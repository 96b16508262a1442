"""Waiters are woken by every later entry of a stream they wait for, and miss none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from redis.exceptions import RedisError

from service.delivery import stream_watcher as module
from service.delivery.stream_watcher import StreamWatcher
from service.storage.connections import Connections
from tests.support.waiting import PATIENCE_S, until

NEW, REPLAYS, OTHER_REPLAYS = "idv:{0}:transitions", "idv:{0}:replays:a", "idv:{0}:replays:b"
START = "0-0"


@pytest.fixture
async def watcher(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StreamWatcher]:
    """Yield a watcher of partition 0 whose blocking reads outlast every test."""
    monkeypatch.setattr(module, "BLOCK_S", 10 * PATIENCE_S)
    opened = StreamWatcher(connections)
    yield opened
    await opened.close()


async def waiter(watcher: StreamWatcher, last_read: Mapping[str, str]) -> asyncio.Task[None]:
    """Return a task that waits, once its read is under way."""
    before = len(watcher._waiters)
    task = asyncio.create_task(watcher.wait_after(last_read))
    await until(lambda: len(watcher._waiters) > before and bool(watcher._watched))
    return task


async def until_blocking(client: Any) -> None:
    """Wait until a read blocks in Redis."""

    async def is_blocking() -> bool:
        return int((await client.info("clients"))["blocked_clients"]) > 0

    await until(is_blocking)


async def add(client: Any, stream: str, entry_id: str = "*") -> str:
    """Append an entry; return its id."""
    added: bytes = await client.xadd(stream, {"a": 1}, id=entry_id)
    return added.decode()


async def woken(*waiters: asyncio.Task[None]) -> None:
    """Wait until all of these have been woken."""
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*waiters)


@pytest.mark.parametrize("stream", [NEW, REPLAYS])
async def test_an_entry_in_either_stream_wakes_every_waiter(
    watcher: StreamWatcher, client: Any, stream: str
) -> None:
    """Also in a stream that did not exist before; then nothing is watched any more."""
    waiters = [await waiter(watcher, {NEW: START, REPLAYS: START}) for _ in range(3)]
    await add(client, stream)
    await woken(*waiters)
    await until(lambda: watcher._watching is None)


@pytest.mark.parametrize("stream", [NEW, REPLAYS])
async def test_an_entry_that_is_there_wakes_at_once(
    watcher: StreamWatcher, client: Any, stream: str
) -> None:
    """An entry later than the last one read ends the wait; that one itself does not."""
    entry_id = await add(client, stream)
    await asyncio.wait_for(watcher.wait_after({NEW: START, REPLAYS: START}), PATIENCE_S)
    waiting = await waiter(watcher, {NEW: entry_id, REPLAYS: entry_id})
    assert not waiting.done()
    waiting.cancel()


async def test_a_stream_new_to_the_watch_waits_for_one_read(
    watcher: StreamWatcher, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiter with a stream that is not watched yet waits for the end of one blocking read."""
    monkeypatch.setattr(module, "BLOCK_S", 0.2)
    reads: list[Any] = []
    block_once = watcher._block_once

    async def counted() -> None:
        reads.append(None)
        await block_once()

    monkeypatch.setattr(watcher, "_block_once", counted)
    first = await waiter(watcher, {NEW: START, REPLAYS: START})
    await add(client, OTHER_REPLAYS)
    joining = await waiter(watcher, {NEW: START, OTHER_REPLAYS: START})
    before = len(reads)
    await woken(joining)
    assert len(reads) <= before + 1
    await woken(first)


async def test_a_waiter_behind_the_watch_is_woken_by_what_it_has_not_read(
    watcher: StreamWatcher, client: Any
) -> None:
    """Ids are compared as numbers: 10-1 is later than 9-1."""
    await add(client, NEW, "9-1")
    await add(client, NEW, "10-1")
    ahead = await waiter(watcher, {NEW: "10-1", REPLAYS: START})
    await asyncio.wait_for(watcher.wait_after({NEW: "9-1", REPLAYS: START}), PATIENCE_S)
    assert not ahead.done()
    await add(client, NEW, "10-2")
    await woken(ahead)


async def test_a_waiter_behind_a_deleted_entry_waits(watcher: StreamWatcher, client: Any) -> None:
    """Where the only later entry was deleted, a waiter neither wakes nor polls."""
    first, second = await add(client, NEW), await add(client, NEW)
    await client.xdel(NEW, second)
    waiters = [await waiter(watcher, {NEW: second}), await waiter(watcher, {NEW: first})]
    await until_blocking(client)
    assert not any(task.done() for task in waiters)
    await add(client, NEW)
    await woken(*waiters)


async def test_an_error_of_the_read_reaches_every_waiter(
    watcher: StreamWatcher, client: Any
) -> None:
    """All waiters raise it; the next one makes the watcher read again."""
    waiters = [await waiter(watcher, {NEW: START}) for _ in range(2)]
    await until_blocking(client)
    await client.client_kill_filter(_type="normal", skipme=True)
    for result in await asyncio.gather(*waiters, return_exceptions=True):
        assert isinstance(result, RedisError)
    await add(client, NEW)
    await asyncio.wait_for(watcher.wait_after({NEW: START}), PATIENCE_S)


async def test_closing_ends_the_watch(watcher: StreamWatcher) -> None:
    """Closing ends the read at once, though a waiter is left."""
    gone, left = [await waiter(watcher, {NEW: START}) for _ in range(2)]
    gone.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await watcher.close()
    assert watcher._watching is None
    left.cancel()
