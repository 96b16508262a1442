"""What an operator does with dead letters and with history: read, replay and drop entries.

History is what the streams of transitions still hold. A replayed entry is appended to a stream that
the handler's worker reads beside the new entries, so order, retries and acknowledgements are the
worker's business. How an entry becomes a dead letter is in `consumer`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.scripts import Script
from .sources import TRANSITIONS, Item, Source, source_of

MAX_PER_CALL = 200

_REPLAY = Script(__package__, "lua/replay.lua")


class EntryFilter(NamedTuple):
    """Which entries are meant; None means any.

    Attributes:
        session_id: Those of this session.
        event_type: Those of this type, in full.
        reason: Dead letters with this reason.
        since: Those that were appended at this time or later.
    """

    session_id: str | None = None
    event_type: str | None = None
    reason: str | None = None
    since: datetime | None = None

    def matches(self, item: Item | None, reason: str | None) -> bool:
        """Say whether an entry is meant; its time is not looked at."""
        if self.reason is not None and reason != self.reason:
            return False
        if item is None:
            return self.session_id is None and self.event_type is None
        return self.session_id in (None, item.session_id) and self.event_type in (
            None,
            item.event_type,
        )


class Entry(NamedTuple):
    """One entry of a stream: a dead letter, or a transition of the history.

    Attributes:
        id: `<partition>-<entry id>`, as the commands print and take it.
        partition: The partition of its stream.
        entry_id: Its id in its stream.
        at: When it was appended.
        item: What it holds; None when it cannot be read.
        reason: Why it became a dead letter; None in the history.
        error: The class of the last error.
        place: Where that was raised: files, lines and functions.
        attempts: How often it was tried.
    """

    id: str
    partition: int
    entry_id: str
    at: datetime
    item: Item | None
    reason: str | None
    error: str | None
    place: str | None
    attempts: int


async def read_dead_letters(
    connections: Connections, keys: Keys, handler: str, wanted: EntryFilter
) -> AsyncIterator[Entry]:
    """Yield a handler's dead letters, the oldest first in each partition."""
    for partition in range(keys.partitions):
        stream = keys.dead_letters(partition, handler)
        async for entry in _read(connections, source_of(handler), stream, partition, wanted):
            yield entry


async def read_history(
    connections: Connections, keys: Keys, wanted: EntryFilter
) -> AsyncIterator[Entry]:
    """Yield what the streams of transitions still hold, the oldest first in each partition."""
    for partition in range(keys.partitions):
        stream = keys.transitions(partition)
        async for entry in _read(connections, TRANSITIONS, stream, partition, wanted):
            yield entry


class ReplayCounts(NamedTuple):
    """How many of the entries of one replay were replayed.

    Attributes:
        replayed: How many the handler gets again.
        left_out: How many it does not, because its group has not acknowledged them yet: the
            handler gets them anyway.
    """

    replayed: int
    left_out: int


async def replay(
    connections: Connections,
    keys: Keys,
    handler: str,
    entries: Sequence[Entry],
    *,
    name: str,
    dry_run: bool = False,
) -> ReplayCounts:
    """Replay those entries of one partition that still exist to a handler.

    Dead letters are moved, history is copied.

    Args:
        connections: Open clients.
        keys: The layout.
        handler: The handler's name.
        entries: Dead letters of that handler, or transitions of the history; not both.
        name: The replay's name, which each of its messages carries.
        dry_run: Only count; for history.

    Raises:
        RedisError: Redis refused or did not answer, or the handler has no group there.
    """
    partition, are_dead = entries[0].partition, entries[0].reason is not None
    source = keys.dead_letters(partition, handler) if are_dead else keys.transitions(partition)
    streams = [source, keys.replays(partition, handler)]
    verb = "move" if are_dead else "count" if dry_run else "copy"
    fields = " ".join(source_of(handler).fields)
    arguments = [handler, name, verb, fields, *(entry.entry_id for entry in entries)]
    return ReplayCounts(*await connections.run_one(_REPLAY, streams, arguments))


async def drop(connections: Connections, keys: Keys, handler: str, entries: Sequence[Entry]) -> int:
    """Delete dead letters of one partition; return how many of them still existed."""
    stream = keys.dead_letters(entries[0].partition, handler)
    return int(await connections.client.xdel(stream, *(entry.entry_id for entry in entries)))


def describe(entry: Entry) -> dict[str, Any]:
    """Return everything an entry holds, in one flat mapping of builtin types."""
    fields: dict[str, Any] = {
        "id": entry.id,
        "at": entry.at.isoformat(timespec="milliseconds"),
        "reason": entry.reason,
        "error": entry.error,
        "place": entry.place,
        "attempts": entry.attempts,
    }
    if entry.item is not None:
        fields |= msgspec.to_builtins(entry.item)
    return fields


async def _read(
    connections: Connections, source: Source, stream: str, partition: int, wanted: EntryFilter
) -> AsyncIterator[Entry]:
    """Read a stream in pages, up to the entry that was its last when the reading began."""
    first = "-" if wanted.since is None else _first_id(wanted.since)
    newest = await connections.client.xrevrange(stream, count=1)
    last = newest[0][0] if newest else "-"
    while page := await connections.client.xrange(stream, first, last, count=MAX_PER_CALL):
        for entry_id, fields in page:
            entry = _entry(source, partition, entry_id.decode(), fields)
            if wanted.matches(entry.item, entry.reason):
                yield entry
        first = f"({page[-1][0].decode()}"


def _first_id(since: datetime) -> str:
    return str(max(0, int(since.timestamp() * 1000)))


def _entry(source: Source, partition: int, entry_id: str, fields: dict[bytes, bytes]) -> Entry:
    def text(name: bytes) -> str | None:
        value: Any = fields.get(name)
        return None if value is None else value.decode()

    try:
        item = source.unpack(fields)
    except ValueError:
        item = None
    return Entry(
        id=f"{partition}-{entry_id}",
        partition=partition,
        entry_id=entry_id,
        at=datetime.fromtimestamp(int(entry_id.partition("-")[0]) / 1000, UTC),
        item=item,
        reason=text(b"reason"),
        error=text(b"error"),
        place=text(b"place"),
        attempts=int(text(b"attempts") or 0),
    )
