"""Waiting for new entries: one blocking read for each stream, shared by all its consumers.

Only wakes them. Reading needs a lease and is done in `consumer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from .. import cancellation
from ..storage.clients import BLOCK_S
from ..storage.connections import Connections


class StreamWatcher:
    """Wakes the consumers of one stream when it, or the replays of one of them, grows.

    Each waiter names the last id it has read of each of its streams. A later entry in any stream
    that is waited for wakes every waiter: reading in vain is cheaper than telling them apart.
    """

    def __init__(self, connections: Connections) -> None:
        self._client = connections.blocking_client
        self._waiters: list[tuple[Mapping[str, str], asyncio.Future[None]]] = []
        self._watching: asyncio.Task[None] | None = None
        self._watched: Mapping[str, str] = {}

    async def wait_after(self, last_read: Mapping[str, str]) -> None:
        """Wait until one of the streams has an entry later than the id given for it.

        Raises:
            RedisError: The streams cannot be read.
        """
        loop = asyncio.get_running_loop()
        grown: asyncio.Future[None] = loop.create_future()
        self._waiters.append((last_read, grown))
        try:
            if self._watching is None:
                self._watching = loop.create_task(self._watch_while_waited_for())
            # The read under way may block behind an entry that this waiter has not read.
            elif not self._is_watched(last_read) and await self._has_later(last_read):
                return
            await grown
        finally:
            grown.cancel()

    async def close(self) -> None:
        """Stop watching. Waiters that are left are not woken."""
        if self._watching is not None:
            await cancellation.cancel_and_wait(self._watching)

    async def _watch_while_waited_for(self) -> None:
        try:
            while self._waiters:
                await self._block_once()
                self._waiters = [waiter for waiter in self._waiters if not waiter[1].done()]
        finally:
            self._watching = None

    async def _block_once(self) -> None:
        """Block behind the earliest id of each stream that is waited for; wake all waiters."""
        self._watched = _earliest([last_read for last_read, _ in self._waiters])
        error = None
        try:
            if not await self._has_later(self._watched, "BLOCK", int(BLOCK_S * 1000)):
                return
        except Exception as raised:  # noqa: BLE001 - every waiter receives it
            error = raised
        for _, grown in self._waiters:
            if not grown.done():
                if error is None:
                    grown.set_result(None)
                else:
                    grown.set_exception(error)

    def _is_watched(self, last_read: Mapping[str, str]) -> bool:
        """Say whether the read under way sees whatever comes after these ids.

        A stream that it does not watch counts as watched: the next read includes it.
        """
        return all(
            _order(entry_id) >= _order(self._watched.get(stream, entry_id))
            for stream, entry_id in last_read.items()
        )

    async def _has_later(self, last_read: Mapping[str, str], *block: str | int) -> bool:
        return bool(
            await self._client.execute_command(
                "XREAD", *block, "COUNT", 1, "STREAMS", *last_read.keys(), *last_read.values()
            )
        )


def _earliest(reads: list[Mapping[str, str]]) -> dict[str, str]:
    earliest: dict[str, str] = {}
    for last_read in reads:
        for stream, entry_id in last_read.items():
            earliest[stream] = min(earliest.get(stream, entry_id), entry_id, key=_order)
    return earliest


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
