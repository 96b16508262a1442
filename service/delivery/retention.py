"""Keeping Redis tidy: trimming what everybody has settled, and handlers that are no more.

Nothing unsettled is ever dropped from here, but on an operator's word. Whatever is done for all
partitions is done in one round trip.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import structlog

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.scripts import Script, ScriptCall
from ..telemetry import metrics

TRIM_EVERY_S = 60.0

_TRIM = Script(__package__, "lua/trim.lua")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Retention:
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
        if not partitions or now < self._tidied_at + TRIM_EVERY_S:
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


def _names(found: Iterable[Iterable[bytes]]) -> set[str]:
    return {name.decode() for names in found for name in names}


def _raised(replies: Sequence[Any]) -> Sequence[Any]:
    """Return *replies*, unless one of them is an error."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
