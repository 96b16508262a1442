"""Waiting for consumer: one blocking read per partition, shared by all who work it.

What has arrived is read elsewhere, under a lease; here it is only noticed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from .. import cancellation
from ..storage.clients import BLOCK_S
from ..storage.connections import Connections


class StreamWatcher:
    """Tells when streams of one partition have grown.

    Whoever waits says how far it has read each stream; anything later, in any stream that anybody
    waits for, wakes everybody.
    """

    def __init__(self, connections: Connections, partition: int) -> None:
        self.partition = partition
        self._client = connections.blocking_client
        self._waiting: list[tuple[Mapping[str, str], asyncio.Future[None]]] = []
        self._watch: asyncio.Task[None] | None = None
        self._watched: Mapping[str, str] = {}

    async def wait_after(self, read: Mapping[str, str]) -> None:
        """Wait until one of the streams holds an entry later than the one named for it.

        Raises:
            RedisError: The streams cannot be watched.
        """
        loop = asyncio.get_running_loop()
        arrival: asyncio.Future[None] = loop.create_future()
        self._waiting.append((read, arrival))
        try:
            if self._watch is None:
                self._watch = loop.create_task(self._watch_while_waited_for())
            # A watch that looks only at what comes later would pass this one by.
            elif not self._is_watched(read) and await self._found(read):
                return
            await arrival
        finally:
            arrival.cancel()

    async def close(self) -> None:
        """Stop watching; whoever still waits is on his own."""
        if self._watch is not None:
            await cancellation.cancel_and_wait(self._watch)

    async def _watch_while_waited_for(self) -> None:
        try:
            while self._waiting:
                await self._one_read()
                self._waiting = [waiter for waiter in self._waiting if not waiter[1].done()]
        finally:
            self._watch = None

    async def _one_read(self) -> None:
        """Block from the earliest place anybody waits at, and wake everybody."""
        self._watched = _earliest([read for read, _ in self._waiting])
        try:
            found = await self._found(self._watched, "BLOCK", int(BLOCK_S * 1000))
        except Exception as error:  # noqa: BLE001 - whoever waits receives it
            for _, arrival in self._waiting:
                if not arrival.done():
                    arrival.set_exception(error)
            return
        if found:
            for _, arrival in self._waiting:
                if not arrival.done():
                    arrival.set_result(None)

    def _is_watched(self, read: Mapping[str, str]) -> bool:
        """Say whether the watch sees what comes next; a stream new to it waits for its turn."""
        return all(
            _order(entry_id) >= _order(self._watched.get(stream, entry_id))
            for stream, entry_id in read.items()
        )

    async def _found(self, read: Mapping[str, str], *block: str | int) -> bool:
        return bool(
            await self._client.execute_command(
                "XREAD", *block, "COUNT", 1, "STREAMS", *read.keys(), *read.values()
            )
        )


def _earliest(reads: list[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for read in reads:
        for stream, entry_id in read.items():
            found[stream] = min(found.get(stream, entry_id), entry_id, key=_order)
    return found


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
