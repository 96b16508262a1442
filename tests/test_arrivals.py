"""Laws of waiting: whatever comes into a stream that is waited for wakes; nothing is missed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service import arrivals as module
from service.arrivals import Arrivals
from service.connections import BLOCK_S, Connections

NEW, MINE, OTHERS = "idv:{0}:transitions", "idv:{0}:replays:a", "idv:{0}:replays:b"
NOTHING = "0-0"


@pytest.fixture
async def arrivals(connections: Connections) -> AsyncIterator[Arrivals]:
    """Yield arrivals of partition 0; the watch is closed at the end."""
    opened = Arrivals(connections, 0)
    yield opened
    await opened.close()


@pytest.fixture
def client(connections: Connections) -> Any:
    """Return a plain client."""
    return connections.client


async def waiting(arrivals: Arrivals, most: int) -> None:
    """Wait until so many wait, and their watch has gone out."""
    async with asyncio.timeout(5):
        while len(arrivals._waiting) < most or not arrivals._watched:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [NEW, MINE])
async def test_either_stream_wakes(arrivals: Arrivals, client: Any, stream: str) -> None:
    """New mail wakes, and so does a replay, though its stream did not exist before."""
    waits = asyncio.create_task(arrivals.after({NEW: NOTHING, MINE: NOTHING}))
    await waiting(arrivals, 1)
    await client.xadd(stream, {"a": 1})
    await asyncio.wait_for(waits, BLOCK_S / 2)


@pytest.mark.parametrize("stream", [NEW, MINE])
async def test_what_is_there_wakes_at_once(arrivals: Arrivals, client: Any, stream: str) -> None:
    """An entry later than what was read ends the wait at once."""
    entry_id = (await client.xadd(stream, {"a": 1})).decode()
    await asyncio.wait_for(arrivals.after({NEW: NOTHING, MINE: NOTHING}), BLOCK_S / 2)
    waits = asyncio.create_task(arrivals.after({NEW: entry_id, MINE: entry_id}))
    await waiting(arrivals, 1)
    assert not waits.done()
    waits.cancel()


async def test_a_stream_new_to_the_watch_has_its_turn(
    arrivals: Arrivals, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who joins with a stream that is not watched yet waits one block at the longest."""
    monkeypatch.setattr(module, "BLOCK_S", 0.2)
    first = asyncio.create_task(arrivals.after({NEW: NOTHING, MINE: NOTHING}))
    await waiting(arrivals, 1)
    await client.xadd(OTHERS, {"a": 1})
    began = time.monotonic()
    await asyncio.wait_for(arrivals.after({NEW: NOTHING, OTHERS: NOTHING}), 2)
    assert time.monotonic() - began < 1
    await first


async def test_the_earliest_reader_is_waited_for(arrivals: Arrivals, client: Any) -> None:
    """Ids are compared as numbers: whoever has read least is woken by what he has not read."""
    await client.xadd(NEW, {"a": 1}, id="9-1")
    await client.xadd(NEW, {"a": 1}, id="10-1")
    ahead = asyncio.create_task(arrivals.after({NEW: "10-1", MINE: NOTHING}))
    await waiting(arrivals, 1)
    await asyncio.wait_for(arrivals.after({NEW: "9-1", MINE: NOTHING}), BLOCK_S / 2)
    assert not ahead.done()
    await client.xadd(NEW, {"a": 1}, id="10-2")
    await asyncio.wait_for(ahead, BLOCK_S * 2)


async def test_closing_ends_the_watch(arrivals: Arrivals) -> None:
    """After closing nothing watches any more."""
    waits = asyncio.create_task(arrivals.after({NEW: NOTHING}))
    await waiting(arrivals, 1)
    await arrivals.close()
    assert arrivals._watch is None
    waits.cancel()
