"""Keeping Redis tidy: trimming what everybody has settled, and handlers that are no more.

Nothing unsettled is ever dropped from here, but on an operator's word. Whatever is done for all
partitions is done in one round trip.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import structlog
from redis.exceptions import ResponseError

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.scripts import Script, ScriptCall
from ..telemetry import metrics
from .lag import Lag, lags

TIDY_EVERY_S = 60.0

_TRIM = Script(__package__, "lua/trim.lua")
_LIVING = Script(__package__, "lua/live_workers.lua")
_GROUPS = Script(__package__, "lua/groups.lua")
_RETIRE = Script(__package__, "lua/retire.lua")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Group(NamedTuple):
    """What one handler's group stands at, in all partitions together.

    Attributes:
        handler: Its name.
        unsettled: Transitions it has not settled; None when Redis does not know.
        replays: What is replayed to it and not yet settled.
        dead: Its dead letters.
        oldest_s: Seconds since the oldest transition it has not settled was admitted; 0 for none.
    """

    handler: str
    unsettled: int | None
    replays: int
    dead: int
    oldest_s: float


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
        if not partitions or now < self._tidied_at + TIDY_EVERY_S:
            return
        self._tidied_at = now
        removed, found = await trim(
            self._connections, self._keys, partitions, retention_s=self._retention_s
        )
        if removed:
            metrics.STREAM_TRIMMED.labels("age").inc(removed)
            log.info("stream.trimmed", reason="age", entries=removed)
        orphans = found - {*self._handlers}
        for handler in sorted(orphans - self._orphans):
            log.warning("group.orphaned", handler=handler)
        self._orphans = orphans
        metrics.ORPHAN_GROUPS.set(len(orphans))


async def trim(
    connections: Connections, keys: Keys, partitions: Collection[int], *, retention_s: int
) -> tuple[int, set[str]]:
    """Remove what every group has settled and is older than asked for.

    Returns how many entries were removed, and the names of all groups there are.

    Raises:
        RedisError: Redis did not answer, for some partition.
    """
    calls = [
        ScriptCall(_TRIM, [keys.transitions(partition)], [retention_s]) for partition in partitions
    ]
    replies = _raised(await connections.run(calls))
    return sum(removed for removed, _ in replies), _names(names for _, names in replies)


async def group_names(connections: Connections, keys: Keys) -> set[str]:
    """Return the names of all groups there are.

    Raises:
        RedisError: Redis did not answer.
    """
    partitions = range(keys.partitions)
    calls = [ScriptCall(_GROUPS, [keys.transitions(partition)], []) for partition in partitions]
    return _names(_raised(await connections.run(calls)))


async def groups(connections: Connections, keys: Keys) -> list[Group]:
    """Return every group there is, whether a handler owns it or not, by name.

    Raises:
        RedisError: Redis did not answer.
    """
    names = sorted(await group_names(connections, keys))
    places = [(name, partition) for name in names for partition in range(keys.partitions)]
    found: dict[str, list[Lag]] = {name: [] for name in names}
    for (name, _), lag in zip(places, await lags(connections, keys, places), strict=True):
        if isinstance(lag, Lag):
            found[name].append(lag)
        # In a partition that holds nothing yet there are no groups.
        elif not isinstance(lag, ResponseError):
            raise lag
    return [_group(name, each) for name, each in found.items()]


async def works(connections: Connections, keys: Keys, handler: str, *, lease_ttl_s: float) -> bool:
    """Say whether any worker still works for a handler, or did so within a lease's time.

    Raises:
        RedisError: Redis did not answer.
    """
    arguments = [int(lease_ttl_s * 1000)]
    return bool(await connections.run_one(_LIVING, [keys.workers(handler)], arguments))


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


def _group(name: str, each: Sequence[Lag]) -> Group:
    known = [lag.transitions for lag in each if lag.transitions is not None]
    return Group(
        name,
        unsettled=sum(known) if len(known) == len(each) else None,
        replays=sum(lag.replays for lag in each),
        dead=sum(lag.dead for lag in each),
        oldest_s=max((lag.oldest_s for lag in each), default=0.0),
    )


def _names(found: Iterable[Iterable[bytes]]) -> set[str]:
    return {name.decode() for names in found for name in names}


def _raised(replies: Sequence[Any]) -> Sequence[Any]:
    """Return *replies*, unless one of them is an error."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
