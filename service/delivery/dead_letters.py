"""Dead letters and the past: found, handed to a handler again, or dropped.

What is replayed goes onto a stream that the handler's worker reads beside the new entries, so
order, retries and settling stay the worker's business. How letters come to be is in `consumer`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.scripts import Script
from ..transitions import stream_entry
from ..transitions.transition import StatusTransition

MAX_PER_CALL = 200

_REPLAY = Script(__package__, "lua/replay.lua")


class Wanted(NamedTuple):
    """Which entries are meant; None means any.

    Attributes:
        session_id: Of this session.
        event_type: Of this type, whole.
        reason: Buried for this reason.
        since: Not before this time.
    """

    session_id: str | None = None
    event_type: str | None = None
    reason: str | None = None
    since: datetime | None = None

    def covers(self, transition: StatusTransition | None, reason: str | None) -> bool:
        """Say whether an entry is meant, but for its time."""
        if self.reason is not None and reason != self.reason:
            return False
        if transition is None:
            return self.session_id is None and self.event_type is None
        return self.session_id in (None, transition.session_id) and self.event_type in (
            None,
            transition.event_type,
        )


class Entry(NamedTuple):
    """One entry of a stream: a dead letter, or a transition of the past.

    Attributes:
        id: `<partition>-<entry id>`, by which the commands name it.
        partition: Where it is.
        entry_id: Its id in its stream.
        at: When it came there.
        transition: What it is about; None when it cannot be read.
        reason: Why it was buried; None for the past.
        error: The class of the last error.
        place: Where that was raised: files, lines and functions.
        attempts: How often it was tried.
    """

    id: str
    partition: int
    entry_id: str
    at: datetime
    transition: StatusTransition | None
    reason: str | None
    error: str | None
    place: str | None
    attempts: int


async def letters(
    connections: Connections, keys: Keys, handler: str, wanted: Wanted
) -> AsyncIterator[Entry]:
    """Yield a handler's dead letters, oldest first in each partition."""
    for partition in range(keys.partitions):
        stream = keys.dead_letters(partition, handler)
        async for entry in _entries(connections, stream, partition, wanted):
            yield entry


async def past(connections: Connections, keys: Keys, wanted: Wanted) -> AsyncIterator[Entry]:
    """Yield what the streams of transitions still hold, oldest first in each partition."""
    for partition in range(keys.partitions):
        async for entry in _entries(connections, keys.transitions(partition), partition, wanted):
            yield entry


class Replayed(NamedTuple):
    """What became of entries that were to be replayed.

    Attributes:
        put: How many the handler is handed again.
        left_out: How many it is not: its group has not settled them, so they come anyway.
    """

    put: int
    left_out: int


async def replay(
    connections: Connections,
    keys: Keys,
    handler: str,
    entries: Sequence[Entry],
    *,
    name: str,
    dry_run: bool = False,
) -> Replayed:
    """Hand entries of one partition to a handler again, those that are still there.

    Dead letters are no more once they are replayed; the past stays where it is.

    Args:
        connections: Open clients.
        keys: The layout.
        handler: The handler's name.
        entries: Dead letters of that handler, or transitions of the past; not both.
        name: The replay's name, which every message of it carries.
        dry_run: Of the past only say what would be handed over.

    Raises:
        RedisError: Redis refused or did not answer, or the handler has no group there.
    """
    partition, are_dead = entries[0].partition, entries[0].reason is not None
    source = keys.dead_letters(partition, handler) if are_dead else keys.transitions(partition)
    streams = [source, keys.replays(partition, handler)]
    entry_ids = [entry.entry_id for entry in entries]
    what = "move" if are_dead else "count" if dry_run else "copy"
    return Replayed(*await connections.run_one(_REPLAY, streams, [handler, name, what, *entry_ids]))


async def drop(connections: Connections, keys: Keys, handler: str, entries: Sequence[Entry]) -> int:
    """Delete dead letters of one partition; return how many were still there."""
    stream = keys.dead_letters(entries[0].partition, handler)
    return int(await connections.client.xdel(stream, *(entry.entry_id for entry in entries)))


def described(entry: Entry) -> dict[str, Any]:
    """Return all that is known of an entry, flat, as builtin types for people and machines."""
    found: dict[str, Any] = {
        "id": entry.id,
        "at": entry.at.isoformat(timespec="milliseconds"),
        "reason": entry.reason,
        "error": entry.error,
        "place": entry.place,
        "attempts": entry.attempts,
    }
    if entry.transition is not None:
        found |= msgspec.to_builtins(entry.transition)
    return found


async def _entries(
    connections: Connections, stream: str, partition: int, wanted: Wanted
) -> AsyncIterator[Entry]:
    """Read a stream page by page, as it was when the reading began."""
    first = "-" if wanted.since is None else _first_id(wanted.since)
    newest = await connections.client.xrevrange(stream, count=1)
    last = newest[0][0] if newest else "-"
    while page := await connections.client.xrange(stream, first, last, count=MAX_PER_CALL):
        for entry_id, fields in page:
            entry = _entry(partition, entry_id.decode(), fields)
            if wanted.covers(entry.transition, entry.reason):
                yield entry
        first = f"({page[-1][0].decode()}"


def _first_id(since: datetime) -> str:
    return str(max(0, int(since.timestamp() * 1000)))


def _entry(partition: int, entry_id: str, fields: dict[bytes, bytes]) -> Entry:
    def text(name: bytes) -> str | None:
        found: Any = fields.get(name)
        return None if found is None else found.decode()

    try:
        transition = stream_entry.unpack(fields)
    except ValueError:
        transition = None
    return Entry(
        id=f"{partition}-{entry_id}",
        partition=partition,
        entry_id=entry_id,
        at=datetime.fromtimestamp(int(entry_id.partition("-")[0]) / 1000, UTC),
        transition=transition,
        reason=text(b"reason"),
        error=text(b"error"),
        place=text(b"place"),
        attempts=int(text(b"attempts") or 0),
    )
