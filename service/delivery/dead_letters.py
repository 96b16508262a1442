"""What an operator does with dead letters and with history: read, replay and drop entries.

History is what the streams of transitions still hold. A replayed entry is appended to a stream that
the handler's worker reads beside the new entries, so order, retries and acknowledgements are the
worker's business. How an entry becomes a dead letter is in `consumer`.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import msgspec

from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script
from .sources import TRANSITIONS, Item, Source, source_of

# How many entries are read, and how many are replayed or deleted, by one call.
MAX_PER_CALL = 100

# What no clock shows: the ids of foreign entries may say any time.
_MAX_MS = 250_000_000_000_000

_ID = re.compile(r"(\d{1,3})-(\d{1,20})-(\d{1,20})", re.ASCII)
_REPLAY = Script(__package__, "lua/replay.lua")


class EntryFilter(NamedTuple):
    """Which entries are meant; None means any.

    Attributes:
        session_id: Those of this session.
        event_type: Those of this type, in full.
        reason: Dead letters with this reason.
        since: Those that were appended at this time or later.
        until: Those that were appended at this time or earlier, to the millisecond.
    """

    session_id: str | None = None
    event_type: str | None = None
    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def covers(self, entry: Entry) -> bool:
        """Say whether an entry is meant."""
        item, at = entry.item, _ms(entry.at)
        if self.reason is not None and entry.reason != self.reason:
            return False
        if (self.since and at < _ms(self.since)) or (self.until and at > _ms(self.until)):
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


# Entries of one partition: those that are meant among some that follow each other, so maybe none.
Chunk: TypeAlias = Sequence[Entry]


async def read_dead_letters(
    connections: Connections, keys: Keys, handler: str, wanted: EntryFilter
) -> AsyncIterator[Entry]:
    """Yield a handler's dead letters, the oldest first in each partition."""
    async for chunk in letter_chunks(connections, keys, handler, wanted):
        for entry in chunk:
            yield entry


async def count(connections: Connections, keys: Keys, handler: str) -> int:
    """Return how many dead letters a handler has."""
    streams = (keys.dead_letters(partition, handler) for partition in range(keys.partitions))
    return sum(await asyncio.gather(*(connections.client.xlen(stream) for stream in streams)))


async def find_one(
    connections: Connections, keys: Keys, handler: str, letter_id: str
) -> Entry | None:
    """Return a handler's dead letter by its id; None if there is none."""
    try:
        ms, number, partition = position(keys, letter_id)
    except ValueError:
        return None
    stream, entry_id = keys.dead_letters(partition, handler), f"{ms}-{number}"
    found = await connections.client.xrange(stream, entry_id, entry_id)
    return entry_of(source_of(handler), partition, entry_id, found[0][1]) if found else None


async def letter_chunks(
    connections: Connections,
    keys: Keys,
    handler: str,
    wanted: EntryFilter,
    ids: Collection[str] = (),
) -> AsyncIterator[Chunk]:
    """Yield the dead letters that *wanted* covers, of all or, if there are any, of those *ids*."""
    if not ids:
        for partition in range(keys.partitions):
            stream = keys.dead_letters(partition, handler)
            async for chunk in _read(connections, source_of(handler), stream, partition, wanted):
                yield chunk
    # Those of a session are in one partition, and are replayed in the order of their numbers.
    for letter_id in sorted({*ids}, key=partial(_place, keys)):
        found = await find_one(connections, keys, handler, letter_id)
        yield [found] if found is not None and wanted.covers(found) else []


async def history_chunks(
    connections: Connections, keys: Keys, wanted: EntryFilter
) -> AsyncIterator[Chunk]:
    """Yield what the streams of transitions still hold, the oldest first in each partition."""
    for partition in range(keys.partitions):
        stream = keys.transitions(partition)
        async for chunk in _read(connections, TRANSITIONS, stream, partition, wanted):
            yield chunk


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
    partition, are_dead = entries[0].partition, any(entry.reason is not None for entry in entries)
    source = keys.dead_letters(partition, handler) if are_dead else keys.transitions(partition)
    streams = [source, keys.replays(partition, handler)]
    verb = "move" if are_dead else "count" if dry_run else "copy"
    fields = " ".join(source_of(handler).fields)
    arguments = [handler, name, verb, fields, *(entry.entry_id for entry in entries)]
    return ReplayCounts(*await connections.run_one(_REPLAY, streams, arguments))


def new_name() -> str:
    """Return a name for a replay: its start time and a random part."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


async def drop(connections: Connections, keys: Keys, handler: str, entries: Sequence[Entry]) -> int:
    """Delete dead letters of one partition; return how many of them still existed."""
    stream = keys.dead_letters(entries[0].partition, handler)
    return int(await connections.client.xdel(stream, *(entry.entry_id for entry in entries)))


async def run_in_chunks(
    chunks: AsyncIterator[Chunk],
    act: Callable[[Chunk], Awaitable[None]],
    stopping: asyncio.Event,
) -> bool:
    """Call *act* for each chunk, also for empty ones; return False when stopped before the end.

    *stopping* takes effect between two chunks. Cancelling a call to Redis would leave it open
    whether the call was executed.
    """
    async for chunk in chunks:
        if stopping.is_set():
            return False
        await act(chunk)
    return True


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
) -> AsyncIterator[Chunk]:
    """Read a stream in chunks, up to the entry that was its last when the reading began."""
    first = id_at(wanted.since, "-")
    newest = await connections.client.xrevrange(stream, id_at(wanted.until, "+"), count=1)
    last = newest[0][0] if newest else "-"
    while found := await connections.client.xrange(stream, first, last, count=MAX_PER_CALL):
        entries = (entry_of(source, partition, one.decode(), fields) for one, fields in found)
        yield [entry for entry in entries if wanted.covers(entry)]
        first = f"({found[-1][0].decode()}"


def position(keys: Keys, letter_id: str) -> tuple[int, int, int]:
    """Return where a letter stands among those of all partitions; the greater, the newer.

    Raises:
        ValueError: There can be no letter with this id.
    """
    if (parts := _ID.fullmatch(letter_id)) is None:
        raise ValueError("not an id")
    partition, ms, number = map(int, parts.groups())
    if partition >= keys.partitions or not 0 < max(ms, number) < 2**64:
        raise ValueError("not an id")
    return ms, number, partition


def _place(keys: Keys, letter_id: str) -> tuple[int, int, int]:
    """Return the same; first come ids that no letter can have."""
    try:
        return position(keys, letter_id)
    except ValueError:
        return 0, 0, 0


def id_at(at: datetime | None, otherwise: str) -> str:
    """Return the id, without its second part, of entries that were appended at a time."""
    return otherwise if at is None else str(max(0, _ms(at)))


def _ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)


def entry_of(source: Source, partition: int, entry_id: str, fields: dict[bytes, bytes]) -> Entry:
    """Return an entry as it was read from its stream, whatever it holds: it may not be ours."""

    def text(name: bytes) -> str | None:
        value: Any = fields.get(name)
        return None if value is None else value.decode(errors="replace")

    try:
        item = source.unpack(fields)
    except ValueError:
        item = None
    return Entry(
        id=f"{partition}-{entry_id}",
        partition=partition,
        entry_id=entry_id,
        at=datetime.fromtimestamp(min(int(entry_id.partition("-")[0]), _MAX_MS) / 1000, UTC),
        item=item,
        reason=text(b"reason"),
        error=text(b"error"),
        place=text(b"place"),
        attempts=_whole_number(text(b"attempts")),
    )


def _whole_number(text: str | None) -> int:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,9}", text) else 0
