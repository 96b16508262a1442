"""Keeping Redis tidy: trimming what everybody has settled, and handlers that are no more.

Nothing unsettled is ever dropped from here, but on an operator's word.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from .connections import Connections, Script, ScriptCall
from .layout import Keys

_TRIM = Script("trim")
_RETIRE = Script("retire")


class Group(NamedTuple):
    """What one handler's group stands at, in all partitions together.

    Attributes:
        handler: Its name.
        unsettled: Transitions it has not settled; None when Redis does not know.
        dead: Its dead letters.
    """

    handler: str
    unsettled: int | None
    dead: int


async def trim(
    connections: Connections, keys: Keys, partitions: Collection[int], *, retention_s: int
) -> int:
    """Remove what every group has settled and is older than asked for; return how many entries.

    Raises:
        RedisError: Redis did not answer, for some partition.
    """
    calls = [
        ScriptCall(_TRIM, [keys.transitions(partition)], [retention_s]) for partition in partitions
    ]
    return sum(_raised(await connections.run(calls)))


async def groups(connections: Connections, keys: Keys) -> list[Group]:
    """Return every group there is, whether a handler owns it or not, by name.

    Raises:
        RedisError: Redis did not answer.
    """
    unsettled: dict[str, int | None] = {}
    for partition in range(keys.partitions):
        stream = keys.transitions(partition)
        if not await connections.client.exists(stream):
            continue
        for found in await connections.client.xinfo_groups(stream):
            name, lag = found["name"].decode(), found["lag"]
            before = unsettled.get(name, 0)
            unknown = lag is None or before is None
            unsettled[name] = None if unknown else before + lag + found["pending"]
    return [
        Group(name, unsettled[name], await _dead_letters(connections, keys, name))
        for name in sorted(unsettled)
    ]


async def retire(connections: Connections, keys: Keys, handler: str) -> int:
    """Forget a handler, its place, its replays and its dead letters; return its partitions.

    Raises:
        RedisError: Redis did not answer, for some partition.
    """
    calls = [
        ScriptCall(
            _RETIRE,
            [
                keys.transitions(partition),
                keys.lease(partition, handler),
                keys.replays(partition, handler),
                keys.dead(partition, handler),
            ],
            [handler],
        )
        for partition in range(keys.partitions)
    ]
    await connections.client.delete(keys.workers(handler))
    return sum(_raised(await connections.run(calls)))


async def _dead_letters(connections: Connections, keys: Keys, handler: str) -> int:
    counts = [
        await connections.client.xlen(keys.dead(partition, handler))
        for partition in range(keys.partitions)
    ]
    return sum(counts)


def _raised(replies: Sequence[int | Exception]) -> list[int]:
    """Return *replies*, unless one of them is an error."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return [reply for reply in replies if isinstance(reply, int)]
