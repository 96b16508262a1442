"""What a self-test has left in Redis: looked at, and taken out again where it can be.

Reads the ledger and the streams; what the sessions were is `selftest`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redis.exceptions import RedisError, ResponseError

from ..config import Settings
from ..errors import ConfigError
from ..inbox import session_record
from ..storage import layout
from ..storage.connections import Connections, connect
from ..storage.layout import Keys
from ..storage.redis_errors import unavailable_reason
from ..transitions import stream_entry
from ..transitions.transition import is_selftest
from .selftest import Lived, Row, Trial

SETTLE_DEADLINE_S = 15.0
POLL_S = 0.1
MAX_SHOWN = 3
MAX_PENDING = 10_000
# Clocks may differ by as much before anybody complains.
SKEW_S = 60


class _Handed(NamedTuple):
    """One transition of ours on a stream."""

    stream: str
    entry_id: bytes
    sequence: int
    raw: bytes


async def rows(settings: Settings, trial: Trial, *, since: float) -> list[Row]:
    """Return what Redis shows of the promises, and take our own sessions out of the ledger.

    Where Redis does not answer, or holds another deployment, that is said, and nothing held
    against anybody.
    """
    keys = Keys(settings.redis_prefix, settings.partitions)
    try:
        async with connect(settings.redis_url) as connections:
            if await layout.is_claimed(connections, keys):
                found = await _look(connections, keys, settings.handlers, trial, since)
                await _forget(connections, keys, trial)
                return found
            seen = "nothing was ever stored under REDIS_PREFIX"
    except ConfigError as error:
        seen = str(error)
    except (RedisError, OSError) as error:
        seen = unavailable_reason(error)
    return [Row("what is left in Redis is as promised", "an answer", seen, kept=None)]


async def _look(
    connections: Connections, keys: Keys, handlers: Sequence[str], trial: Trial, since: float
) -> list[Row]:
    handed = await _handed(connections, keys, trial.lives, since)
    return [
        await _remembered(connections, keys, trial.lives),
        await _unknown(connections, keys, trial.refused),
        _gapless(trial.lives, handed),
        await _secret(connections, keys, trial.lives, handed),
        await _settled(connections, handlers, [*itertools.chain(*handed.values())]),
    ]


async def _forget(connections: Connections, keys: Keys, trial: Trial) -> None:
    """Take sessions that no handler was shown out of the ledger; streams are trimmed in time."""
    for life in trial.lives:
        if is_selftest(life.session_id):
            # Not every operator may: then they are forgotten when their time is up.
            with contextlib.suppress(ResponseError):
                await connections.client.delete(keys.session(life.session_id))


async def _handed(
    connections: Connections, keys: Keys, lives: Sequence[Lived], since: float
) -> dict[str, list[_Handed]]:
    """Return what was handed over of each session."""
    ours = {life.session_id for life in lives}
    first = int((since - SKEW_S) * 1000)
    found: dict[str, list[_Handed]] = defaultdict(list)
    for partition in {keys.partition(session_id) for session_id in ours}:
        stream = keys.transitions(partition)
        for entry_id, fields in await connections.client.xrange(stream, min=first):
            try:
                transition = stream_entry.unpack(fields)
            except ValueError:
                continue
            if transition.session_id in ours:
                one = _Handed(stream, entry_id, transition.sequence, repr(fields).encode())
                found[transition.session_id].append(one)
    return found


async def _remembered(connections: Connections, keys: Keys, lives: Sequence[Lived]) -> Row:
    wrong = []
    for life in lives:
        record = None
        with contextlib.suppress(ValueError):
            record = await session_record.read(connections, keys, life.session_id)
        if (
            record is None
            or record.status != life.status
            or record.sequence != life.admitted
            or not life.event_ids <= {event.event_id for event in record.events}
        ):
            wrong.append(life.session_id)
    return _row("the ledger knows every event and each session's end", len(lives), wrong)


async def _unknown(connections: Connections, keys: Keys, refused: Sequence[str]) -> Row:
    known = [
        session_id
        for session_id in refused
        if await connections.client.hgetall(keys.session(session_id))
    ]
    return _row("of what was refused nothing is remembered", len(refused), known)


def _gapless(lives: Sequence[Lived], handed: Mapping[str, Sequence[_Handed]]) -> Row:
    wrong = [
        life.session_id
        for life in lives
        if [one.sequence for one in handed.get(life.session_id, ())]
        != [*range(1, life.admitted + 1)]
    ]
    return _row("each session is handed over as 1, 2, 3 … without a gap", len(lives), wrong)


async def _secret(
    connections: Connections,
    keys: Keys,
    lives: Sequence[Lived],
    handed: Mapping[str, Sequence[_Handed]],
) -> Row:
    told = []
    for life in lives:
        fields = await connections.client.hgetall(keys.session(life.session_id))
        held = b"".join([repr(fields).encode(), *(one.raw for one in handed[life.session_id])])
        if any(secret in held for secret in life.secrets):
            told.append(life.session_id)
    return _row("no client secret and no link is in Redis", len(lives), told)


async def _settled(
    connections: Connections, handlers: Sequence[str], handed: Sequence[_Handed]
) -> Row:
    """Wait until every handler has settled everything, for so long."""
    left: list[str] = []
    deadline = asyncio.get_running_loop().time() + SETTLE_DEADLINE_S
    while True:
        left = [name for name in handlers if await _unsettled(connections, name, handed)]
        if not left or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(POLL_S)
    expected = f"{len(handed)} transitions settled by {', '.join(handlers)}"
    seen = f"not by {', '.join(left)}" if left else "so for all"
    return Row("every handler settles what is handed over", expected, seen, kept=not left)


async def _unsettled(connections: Connections, handler: str, handed: Sequence[_Handed]) -> bool:
    """Say whether a handler's group has not read, or has read and not settled, one of them."""
    by_stream = sorted(handed, key=lambda one: (one.stream, _order(one.entry_id)))
    for stream, found in itertools.groupby(by_stream, key=lambda one: one.stream):
        ids = [one.entry_id for one in found]
        groups: Any = await connections.client.xinfo_groups(stream)
        read = [one["last-delivered-id"] for one in groups if one["name"] == handler.encode()]
        if not read or _order(read[0]) < _order(ids[-1]):
            return True
        pending: Any = await connections.client.xpending_range(
            stream, handler, min=ids[0], max=ids[-1], count=MAX_PENDING
        )
        if {one["message_id"] for one in pending} & {*ids}:
            return True
    return False


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)


def _row(promise: str, count: int, wrong: Sequence[str]) -> Row:
    named = ", ".join(wrong[:MAX_SHOWN])
    seen = f"not so for {len(wrong)}: {named}" if wrong else "so for all"
    return Row(promise, f"so for {count} sessions", seen, kept=not wrong)
