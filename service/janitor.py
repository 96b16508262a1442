"""Keeping Redis tidy: trimming what everybody has settled, and handlers that are no more.

Nothing unsettled is ever dropped from here, but on an operator's word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import NamedTuple

import structlog

from . import metrics
from .connections import Connections, Script, ScriptCall
from .layout import Keys

TIDY_EVERY_S = 60.0

_TRIM = Script("trim")
_RETIRE = Script("retire")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Group(NamedTuple):
    """What one handler's group stands at, in all partitions together.

    Attributes:
        handler: Its name.
        unsettled: Transitions it has not settled; None when Redis does not know.
        replays: What is replayed to it and not yet settled.
        dead: Its dead letters.
    """

    handler: str
    unsettled: int | None
    replays: int
    dead: int


class Janitor:
    """Trims, and reports groups without an owner, now and then.

    Args:
        connections: Open clients.
        keys: The layout.
        handlers: All handlers of the deployment: the owners of groups.
        retention_s: Seconds every entry is kept at least.
    """

    def __init__(
        self, connections: Connections, keys: Keys, *, handlers: Collection[str], retention_s: int
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._handlers = handlers
        self._retention_s = retention_s
        self._tidied_at = float("-inf")
        self._orphans: set[str] = set()

    async def tidy(self, partitions: Collection[int]) -> None:
        """Do what is due in *partitions*.

        Raises:
            RedisError: Redis did not answer; what was not done waits for the next time.
        """
        now = asyncio.get_running_loop().time()
        if now < self._tidied_at + TIDY_EVERY_S:
            return
        self._tidied_at = now
        removed = await trim(
            self._connections, self._keys, partitions, retention_s=self._retention_s
        )
        if removed:
            log.info("stream.trimmed", entries=removed)
        found = await _unsettled(self._connections, self._keys, partitions)
        orphans = found.keys() - {*self._handlers}
        for handler in sorted(orphans - self._orphans):
            log.warning("group.orphaned", handler=handler)
        self._orphans = orphans
        metrics.ORPHAN_GROUPS.set(len(orphans))


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
    partitions = range(keys.partitions)
    return [
        Group(
            name,
            unsettled,
            replays=await _length(connections, [keys.replays(p, name) for p in partitions]),
            dead=await _length(connections, [keys.dead(p, name) for p in partitions]),
        )
        for name, unsettled in sorted((await _unsettled(connections, keys, partitions)).items())
    ]


async def works(connections: Connections, keys: Keys, handler: str) -> bool:
    """Say whether any worker still works for a handler, or did a moment ago.

    Raises:
        RedisError: Redis did not answer.
    """
    return bool(await connections.client.exists(keys.workers(handler)))


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
    return sum(_raised(await connections.run(calls)))


async def _unsettled(
    connections: Connections, keys: Keys, partitions: Collection[int]
) -> dict[str, int | None]:
    """Return what each group has not settled, in these partitions together."""
    unsettled: dict[str, int | None] = {}
    for partition in partitions:
        stream = keys.transitions(partition)
        if not await connections.client.exists(stream):
            continue
        for found in await connections.client.xinfo_groups(stream):
            name, lag = found["name"].decode(), found["lag"]
            before = unsettled.get(name, 0)
            unknown = lag is None or before is None
            unsettled[name] = None if unknown else before + lag + found["pending"]
    return unsettled


async def _length(connections: Connections, streams: Sequence[str]) -> int:
    return sum([await connections.client.xlen(stream) for stream in streams])


def _raised(replies: Sequence[int | Exception]) -> list[int]:
    """Return *replies*, unless one of them is an error."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return [reply for reply in replies if isinstance(reply, int)]
