"""Pages of a handler's dead letters, the newest first over all partitions.

A page ends at a number of letters, or when so many were looked at that a filter finds too few among
them. Either way it says where to read on.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from typing import NamedTuple

from ..storage.connections import Connections
from ..storage.keys import Keys
from .dead_letters import MAX_PER_CALL, Entry, EntryFilter, entry_of, id_at, position
from .sources import source_of

# How many dead letters are looked at for one page, whether they are meant or not.
MAX_SCANNED = 1000


class LetterPage(NamedTuple):
    """Some of a handler's dead letters.

    Attributes:
        letters: The letters, the newest first.
        goes_on_at: What to pass as *before* to read on, further back; None at the end.
        scanned: How many letters were looked at.
    """

    letters: list[Entry]
    goes_on_at: str | None
    scanned: int


async def read_page(
    connections: Connections,
    keys: Keys,
    handler: str,
    wanted: EntryFilter,
    *,
    before: str = "",
    size: int = 50,
) -> LetterPage:
    """Return up to *size* of a handler's dead letters, the newest of all partitions first.

    At most `MAX_SCANNED` letters are looked at; there may be more even if none was found.

    Args:
        connections: Open clients.
        keys: The layout.
        handler: The handler's name.
        wanted: Which letters to return.
        before: Where another page ended; empty for the newest.
        size: The most letters to return.

    Raises:
        ValueError: *before* is no such place.
    """
    letters: list[Entry] = []
    last, scanned = before, 0
    async for entry in _read_back(connections, keys, handler, wanted, before=before, size=size):
        if len(letters) == size or scanned == MAX_SCANNED:
            return LetterPage(letters, last, scanned)
        last, scanned = entry.id, scanned + 1
        if wanted.covers(entry):
            letters.append(entry)
    return LetterPage(letters, None, scanned)


async def _read_back(
    connections: Connections,
    keys: Keys,
    handler: str,
    wanted: EntryFilter,
    *,
    before: str,
    size: int,
) -> AsyncIterator[Entry]:
    """Yield the dead letters of all partitions that are older than *before*, the newest first."""
    below = position(keys, before) if before else None

    async def read(partition: int) -> AsyncIterator[Entry]:
        stream, first = keys.dead_letters(partition, handler), id_at(wanted.since, "-")
        last, count = id_at(wanted.until, "+"), size // keys.partitions + 1
        if below is not None:
            # Of letters with the same id, those of the greater partitions came before.
            last = f"{'' if partition < below[2] else '('}{below[0]}-{below[1]}"
        while page := await connections.client.xrevrange(stream, last, first, count=count):
            for entry_id, fields in page:
                yield entry_of(source_of(handler), partition, entry_id.decode(), fields)
            if len(page) < count:
                return
            last, count = f"({page[-1][0].decode()}", min(2 * count, MAX_PER_CALL)

    readers = [read(partition) for partition in range(keys.partitions)]
    newest = await asyncio.gather(*(anext(reader, None) for reader in readers))
    waiting = [(_rank(keys, entry), entry) for entry in newest if entry is not None]
    heapq.heapify(waiting)
    while waiting:
        _, entry = waiting[0]
        yield entry
        following = await anext(readers[entry.partition], None)
        if following is None:
            heapq.heappop(waiting)
        else:
            heapq.heapreplace(waiting, (_rank(keys, following), following))


def _rank(keys: Keys, entry: Entry) -> tuple[int, ...]:
    """Return what is less for a newer entry."""
    return tuple(-part for part in position(keys, entry.id))
