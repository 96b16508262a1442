"""Laws of waiting: whatever comes into a stream that is waited for wakes; nothing is missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.delivery import stream_watcher as module
from service.delivery.stream_watcher import StreamWatcher
from service.storage.connections import Connections
from tests.support.servers import PATIENCE_S, until

NEW, MINE, OTHERS = "idv:{0}:transitions", "idv:{0}:replays:a", "idv:{0}:replays:b"
NOTHING = "0-0"


@pytest.fixture
async def stream_watcher(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StreamWatcher]:
    """Yield arrivals of partition 0, whose blocks outlast every test; all is closed at the end."""
    monkeypatch.setattr(module, "BLOCK_S", 10 * PATIENCE_S)
    opened = StreamWatcher(connections, 0)
    yield opened
    await opened.close()


@pytest.fixture
def client(connections: Connections) -> Any:
    """Return a plain client."""
    return connections.client


async def waiting(stream_watcher: StreamWatcher, most: int) -> None:
    """Wait until so many wait, and their watch has gone out."""
    await until(lambda: len(stream_watcher._waiting) >= most and bool(stream_watcher._watched))


@pytest.mark.parametrize("stream", [NEW, MINE])
async def test_either_stream_wakes(stream_watcher: StreamWatcher, client: Any, stream: str) -> None:
    """New mail wakes, and so does a replay, though its stream did not exist before."""
    waits = asyncio.create_task(stream_watcher.wait_after({NEW: NOTHING, MINE: NOTHING}))
    await waiting(stream_watcher, 1)
    await client.xadd(stream, {"a": 1})
    await asyncio.wait_for(waits, PATIENCE_S)


@pytest.mark.parametrize("stream", [NEW, MINE])
async def test_what_is_there_wakes_at_once(
    stream_watcher: StreamWatcher, client: Any, stream: str
) -> None:
    """An entry later than what was read ends the wait at once."""
    entry_id = (await client.xadd(stream, {"a": 1})).decode()
    await asyncio.wait_for(stream_watcher.wait_after({NEW: NOTHING, MINE: NOTHING}), PATIENCE_S)
    waits = asyncio.create_task(stream_watcher.wait_after({NEW: entry_id, MINE: entry_id}))
    await waiting(stream_watcher, 1)
    assert not waits.done()
    waits.cancel()


async def test_a_stream_new_to_the_watch_has_its_turn(
    stream_watcher: StreamWatcher, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who joins with a stream that is not watched yet waits one block at the longest."""
    monkeypatch.setattr(module, "BLOCK_S", 0.2)
    blocks: list[Any] = []
    one_read = stream_watcher._one_read

    async def counted() -> None:
        blocks.append(None)
        await one_read()

    monkeypatch.setattr(stream_watcher, "_one_read", counted)
    first = asyncio.create_task(stream_watcher.wait_after({NEW: NOTHING, MINE: NOTHING}))
    await waiting(stream_watcher, 1)
    await client.xadd(OTHERS, {"a": 1})
    joins = asyncio.create_task(stream_watcher.wait_after({NEW: NOTHING, OTHERS: NOTHING}))
    await waiting(stream_watcher, 2)
    before = len(blocks)
    await joins
    assert len(blocks) <= before + 1
    await first


async def test_the_earliest_reader_is_waited_for(
    stream_watcher: StreamWatcher, client: Any
) -> None:
    """Ids are compared as numbers: whoever has read least is woken by what he has not read."""
    await client.xadd(NEW, {"a": 1}, id="9-1")
    await client.xadd(NEW, {"a": 1}, id="10-1")
    ahead = asyncio.create_task(stream_watcher.wait_after({NEW: "10-1", MINE: NOTHING}))
    await waiting(stream_watcher, 1)
    await asyncio.wait_for(stream_watcher.wait_after({NEW: "9-1", MINE: NOTHING}), PATIENCE_S)
    assert not ahead.done()
    await client.xadd(NEW, {"a": 1}, id="10-2")
    await asyncio.wait_for(ahead, PATIENCE_S)


async def test_closing_ends_the_watch(stream_watcher: StreamWatcher) -> None:
    """After closing nothing watches any more."""
    waits = asyncio.create_task(stream_watcher.wait_after({NEW: NOTHING}))
    await waiting(stream_watcher, 1)
    await stream_watcher.close()
    assert stream_watcher._watch is None
    waits.cancel()
