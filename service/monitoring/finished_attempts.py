"""The finished attempts to deliver to a handler, as its streams keep them for a while.

The scripts of `delivery` note each attempt in the step that ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple

from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script, ScriptCall, raise_first

MAX_LATEST = 50

_LATEST_ATTEMPTS = Script(__package__, "latest_attempts.lua")


class Attempt(NamedTuple):
    """One finished attempt to deliver a transition to a handler.

    Attributes:
        at: When it ended.
        outcome: `delivered`, `failed` or `dead_lettered`.
        attempt: Its number, from 1.
        error: The class of the error, or why it became a dead letter; empty if it was delivered.
        place: Where that was raised: files, lines and functions.
        is_replay: Whether it was an attempt of a replay.
    """

    at: datetime
    outcome: str
    attempt: int
    error: str
    place: str
    is_replay: bool


class NotedAttempt(NamedTuple):
    """A finished attempt, and what it was about.

    Attributes:
        event_id: The event whose transition was to be delivered.
        letter_id: The id of the dead letter that it ended in; None for none.
        attempt: The attempt.
    """

    event_id: str
    letter_id: str | None
    attempt: Attempt


async def read_latest(connections: Connections, keys: Keys, handler: str) -> list[NotedAttempt]:
    """Return a handler's latest finished attempts over all partitions, the newest first.

    Raises:
        RedisError: Redis did not answer.
    """
    found = await connections.run(
        [
            ScriptCall(_LATEST_ATTEMPTS, [keys.finished_attempts(partition, handler)], [MAX_LATEST])
            for partition in range(keys.partitions)
        ]
    )
    raise_first(found)
    entries = [entry for partition in found for entry in partition]
    entries.sort(key=lambda entry: [int(part) for part in entry[0].split(b"-")], reverse=True)
    return list(decode(entries[:MAX_LATEST]))


def decode(entries: Iterable[tuple[bytes, Sequence[bytes]]]) -> Iterator[NotedAttempt]:
    """Yield the attempts in some entries, as XRANGE returns them; leave out what cannot be read."""
    for entry_id, values in entries:
        # What is not ours, or another version's.
        with suppress(KeyError, ValueError):
            yield _decode_one(entry_id, values)


def _decode_one(entry_id: bytes, values: Sequence[bytes]) -> NotedAttempt:
    texts = [value.decode() for value in values]
    fields = dict(zip(texts[::2], texts[1::2], strict=True))
    attempt = Attempt(
        at=datetime.fromtimestamp(int(entry_id.partition(b"-")[0]) / 1000, UTC),
        outcome=fields["outcome"],
        attempt=int(fields["attempt"]),
        error=fields.get("error", ""),
        place=fields.get("place", ""),
        is_replay="replay" in fields,
    )
    return NotedAttempt(fields["event"], fields.get("letter"), attempt)
