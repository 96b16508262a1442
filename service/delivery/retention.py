"""Trimming the streams of transitions by age, and reporting groups that hold it up.

Deletes only what every group has acknowledged. That streams which are full are trimmed early is
done by `inbox`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

import structlog

from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.scripts import Script, ScriptCall, raise_first
from ..telemetry import metrics
from .consumer_groups import read_name

TRIM_EVERY_S = 60.0

_TRIM = Script(__package__, "lua/trim.lua")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Retention:
    """Trims streams from time to time, and reports orphaned groups.

    A group is orphaned when its handler is no longer configured. What it has not acknowledged is
    kept for ever, until an operator retires the handler.

    Args:
        connections: Open clients.
        keys: The layout.
        handlers: All configured handlers of the deployment.
        retention_s: Seconds for which every entry is kept at least.
    """

    def __init__(
        self, connections: Connections, keys: Keys, *, handlers: Collection[str], retention_s: int
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._handlers = handlers
        self._retention_s = retention_s
        self._trimmed_at = float("-inf")
        self._orphans: set[str] = set()

    async def trim_if_due(self, partitions: Collection[int]) -> None:
        """Trim *partitions*, unless that was done within `TRIM_EVERY_S`.

        Raises:
            RedisError: Redis did not answer; the next attempt is as far away as after a success.
        """
        if not partitions:
            # Other workers look after all of them now.
            self._report_orphans(set())
        now = asyncio.get_running_loop().time()
        if not partitions or now < self._trimmed_at + TRIM_EVERY_S:
            return
        self._trimmed_at = now
        removed, groups = await trim(
            self._connections, self._keys, partitions, retention_s=self._retention_s
        )
        if removed:
            metrics.STREAM_TRIMMED.labels("age").inc(removed)
            log.info("stream.trimmed", reason="age", entries=removed)
        self._report_orphans(groups - {*self._handlers})

    def _report_orphans(self, orphans: set[str]) -> None:
        """Log each orphaned group once, and count them."""
        for handler in sorted(orphans - self._orphans):
            log.warning("group.orphaned", handler=handler)
        self._orphans = orphans
        metrics.ORPHAN_GROUPS.set(len(orphans))


async def trim(
    connections: Connections, keys: Keys, partitions: Collection[int], *, retention_s: int
) -> tuple[int, set[str]]:
    """Delete what every group has acknowledged and what is older than *retention_s*.

    Returns how many entries were deleted, and the names of all groups.

    Raises:
        RedisError: Redis did not answer for some partition.
    """
    arguments = (retention_s, int(time.time()))
    calls = [ScriptCall(_TRIM, [keys.transitions(each)], arguments) for each in partitions]
    replies = await connections.run(calls)
    raise_first(replies)
    groups = {read_name(name) for _, names in replies for name in names}
    return sum(removed for removed, _ in replies), groups
