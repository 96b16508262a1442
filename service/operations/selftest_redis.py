"""Inspects what a self-test has left in Redis, and deletes its session records.

What was sent, and so what Redis must hold, is known to `selftest`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redis.exceptions import RedisError, ResponseError

from ..config import Settings
from ..errors import ConfigError
from ..inbox import session_record
from ..storage import layout
from ..storage.connections import Connections, connect
from ..storage.keys import Keys
from ..storage.redis_errors import unavailable_reason
from ..transitions import stream_entry
from ..transitions.transition import is_selftest
from .selftest import Row, SentSession

ACK_DEADLINE_S = 15.0
POLL_S = 0.1
MAX_NAMED = 3
MAX_PENDING = 10_000
# Redis's clock may be behind ours by this much.
MAX_SKEW_S = 60


class _Entry(NamedTuple):
    """One transition of the self-test on a stream."""

    stream: str
    entry_id: bytes
    sequence: int
    raw: bytes


# By the id of the session, in the order of the stream.
_Entries = Mapping[str, Sequence[_Entry]]


async def inspect_redis(
    settings: Settings, sent: Sequence[SentSession], *, since: float
) -> list[Row]:
    """Return what Redis shows of the promises, and delete the self-test's session records.

    Where Redis does not answer, or holds another deployment, one row says so: no promise was seen
    broken.
    """
    keys = Keys(settings.redis_prefix, settings.partitions)
    try:
        async with connect(settings.redis_url) as connections:
            if await layout.is_claimed(connections, keys):
                rows = await _inspect(connections, keys, settings.handlers, sent, since)
                await _delete_records(connections, keys, sent)
                return rows
            seen = "nothing was ever stored under REDIS_PREFIX"
    except ConfigError as error:
        seen = str(error)
    except (RedisError, OSError) as error:
        seen = unavailable_reason(error)
    return [Row("what is left in Redis is as promised", "an answer", seen, kept=None)]


async def _inspect(
    connections: Connections,
    keys: Keys,
    handlers: Sequence[str],
    sent: Sequence[SentSession],
    since: float,
) -> list[Row]:
    client = connections.client
    sessions = [each for each in sent if each.event_ids]
    refused = [each for each in sent if not each.event_ids]
    entries = await _find_entries(connections, keys, sessions, since)
    stored = {
        each.session_id: await client.hgetall(keys.session(each.session_id)) for each in sessions
    }
    unrecorded = [each for each in sessions if not await _is_recorded(connections, keys, each)]
    # The user `operator` may read session records, but has no EXISTS.
    recorded = [each for each in refused if await client.hgetall(keys.session(each.session_id))]
    gapped = [
        each
        for each in sessions
        if [entry.sequence for entry in entries.get(each.session_id, ())]
        != [*range(1, each.admitted + 1)]
    ]
    leaked = [
        each
        for each in sessions
        if _holds(each.secrets, stored[each.session_id], entries.get(each.session_id, ()))
    ]
    count = len(sessions)
    return [
        _row("every event and each final status is recorded", count, _ids(unrecorded)),
        _row("nothing is recorded of what was refused", len(refused), _ids(recorded)),
        _row("sequences are 1, 2, 3 … without a gap", count, _ids(gapped)),
        _row("no client secret and no link is in Redis", count, _ids(leaked)),
        await _wait_for_acks(connections, handlers, entries),
    ]


async def _find_entries(
    connections: Connections, keys: Keys, sessions: Sequence[SentSession], since: float
) -> _Entries:
    ids = set(_ids(sessions))
    first = int((since - MAX_SKEW_S) * 1000)
    found: dict[str, list[_Entry]] = defaultdict(list)
    for stream in {keys.transitions(keys.partition(session_id)) for session_id in ids}:
        for entry_id, fields in await connections.client.xrange(stream, min=first):
            with contextlib.suppress(ValueError):
                transition = stream_entry.unpack(fields)
                if transition.session_id in ids:
                    raw = repr(fields).encode()
                    entry = _Entry(stream, entry_id, transition.sequence, raw)
                    found[transition.session_id].append(entry)
    return found


async def _is_recorded(connections: Connections, keys: Keys, session: SentSession) -> bool:
    try:
        record = await session_record.read(connections, keys, session.session_id)
    except ValueError:
        return False
    return (
        record is not None
        and record.status == session.status
        and record.sequence == session.admitted
        and session.event_ids <= {event.event_id for event in record.events}
    )


def _holds(
    secrets: frozenset[bytes], record: Mapping[bytes, bytes], entries: Sequence[_Entry]
) -> bool:
    stored = b"".join([repr(record).encode(), *(entry.raw for entry in entries)])
    return any(secret in stored for secret in secrets)


async def _wait_for_acks(
    connections: Connections, handlers: Sequence[str], entries: _Entries
) -> Row:
    """Wait until every handler's group has acknowledged every entry."""
    ids: dict[str, list[bytes]] = defaultdict(list)
    for entry in (entry for each in entries.values() for entry in each):
        ids[entry.stream].append(entry.entry_id)
    deadline = time.monotonic() + ACK_DEADLINE_S
    late = list(handlers)
    while late := [each for each in late if not await _has_acked(connections, each, ids)]:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(POLL_S)
    expected = f"{sum(map(len, ids.values()))} transitions acknowledged by {', '.join(handlers)}"
    seen = f"not by {', '.join(late)}" if late else "so for all"
    kept = not late if ids else None
    return Row("every handler's worker acknowledges transitions", expected, seen, kept=kept)


async def _has_acked(
    connections: Connections, handler: str, ids: Mapping[str, Sequence[bytes]]
) -> bool:
    """Say whether a handler's group has read all entries, and none of them is still pending."""
    for stream, entry_ids in ids.items():
        first, last = min(entry_ids, key=_order), max(entry_ids, key=_order)
        groups: Any = await connections.client.xinfo_groups(stream)
        read = [each["last-delivered-id"] for each in groups if each["name"] == handler.encode()]
        # Entries beyond the last delivered one are not pending, but not acknowledged either.
        if not read or _order(read[0]) < _order(last):
            return False
        pending: Any = await connections.client.xpending_range(
            stream, handler, min=first, max=last, count=MAX_PENDING
        )
        if {each["message_id"] for each in pending} & {*entry_ids}:
            return False
    return True


async def _delete_records(
    connections: Connections, keys: Keys, sessions: Sequence[SentSession]
) -> None:
    """Delete the records of sessions for which no handler was called; streams are trimmed later."""
    for session_id in filter(is_selftest, _ids(sessions)):
        # Not every operator's Redis user may; then the records expire.
        with contextlib.suppress(ResponseError):
            await connections.client.delete(keys.session(session_id))


def _ids(sessions: Sequence[SentSession]) -> list[str]:
    return [session.session_id for session in sessions]


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)


def _row(promise: str, count: int, wrong: Sequence[str]) -> Row:
    named = ", ".join(wrong[:MAX_NAMED])
    seen = f"not so for {len(wrong)}: {named}" if wrong else "so for all"
    # Where no session was taken, nothing was tried.
    return Row(promise, f"so for {count} sessions", seen, kept=not wrong if count else None)
