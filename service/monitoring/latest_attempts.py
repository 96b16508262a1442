"""The latest finished attempts of one handler, over all partitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.scripts import Script, ScriptCall, raise_first

MAX_SHOWN = 50

_LATEST_DELIVERIES = Script(__package__, "latest_deliveries.lua")


class LatestAttempt(NamedTuple):
    """One finished attempt.

    Attributes:
        at: When it ended.
        event_id: The event; empty where the entry could not be read.
        outcome: `delivered`, `failed` or `dead_lettered`.
        attempt: Its number, from 1.
        error: The class of the error, or why it became a dead letter; empty if it was delivered.
        place: Where that was raised: files, lines and functions.
        is_replay: Whether it was an attempt of a replay.
    """

    at: datetime
    event_id: str
    outcome: str
    attempt: int
    error: str
    place: str
    is_replay: bool


async def read_latest_attempts(
    connections: Connections, keys: Keys, handler: str
) -> list[LatestAttempt]:
    """Return a handler's latest finished attempts, the newest first.

    Raises:
        RedisError: Redis did not answer.
    """
    found = await connections.run(
        [
            ScriptCall(_LATEST_DELIVERIES, [keys.deliveries(partition, handler)], [MAX_SHOWN])
            for partition in range(keys.partitions)
        ]
    )
    raise_first(found)
    entries = [entry for partition in found for entry in partition]
    entries.sort(key=lambda entry: [int(part) for part in entry[0].split(b"-")], reverse=True)
    return list(_attempts(entries[:MAX_SHOWN]))


def _attempts(entries: Iterable[tuple[bytes, list[bytes]]]) -> Iterator[LatestAttempt]:
    for entry_id, fields in entries:
        # What is not ours, or another version's, is left out.
        with suppress(KeyError, ValueError):
            yield _attempt(entry_id, fields)


def _attempt(entry_id: bytes, fields: list[bytes]) -> LatestAttempt:
    found: Mapping[bytes, bytes] = dict(zip(fields[::2], fields[1::2], strict=True))
    return LatestAttempt(
        at=datetime.fromtimestamp(int(entry_id.partition(b"-")[0]) / 1000, UTC),
        event_id=found[b"event"].decode(),
        outcome=found[b"outcome"].decode(),
        attempt=int(found[b"attempt"]),
        error=found.get(b"error", b"").decode(),
        place=found.get(b"place", b"").decode(),
        is_replay=found.get(b"replay") == b"1",
    )
