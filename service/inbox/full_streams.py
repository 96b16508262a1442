"""Trims streams of transitions that are full: a new event outranks history kept for replays.

Admission asks for it, so that it happens whether or not a worker runs. Only entries that every
group has acknowledged are deleted. The rest is a backlog, and the log names the slowest group.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import structlog

from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.redis_errors import unavailable_reason
from ..storage.scripts import Script, ScriptCall
from ..telemetry import metrics

MAX_EXAMINED_PER_CALL = 500
# Other events wait while a stream is trimmed.
MAX_TRIM_S = 0.05
# A stream in which nothing could be deleted is left alone for so long.
PAUSE_S = 1.0
BEGINNING = b"-"

_TRIM = Script(__package__, "trim_full_stream.lua")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(slots=True)
class _Progress:
    """How far one stream has been examined, so that pending entries are not examined each time.

    Attributes:
        position: Where to go on.
        deleted: Entries deleted since the beginning was examined.
        paused_until: When to examine it again, in the event loop's time.
    """

    position: bytes = BEGINNING
    deleted: int = 0
    paused_until: float = 0.0


class FullStreamTrimmer:
    """Trims full streams, a bounded part at a time.

    Args:
        connections: Open clients.
        keys: The layout.
    """

    def __init__(self, connections: Connections, keys: Keys) -> None:
        self._connections = connections
        self._keys = keys
        self._progress: defaultdict[int, _Progress] = defaultdict(_Progress)

    async def trim(self, partitions: Collection[int]) -> bool:
        """Trim these partitions' streams; return whether one of them has room now."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        full = [each for each in partitions if self._progress[each].paused_until <= began]
        has_trimmed = False
        while full and loop.time() <= began + MAX_TRIM_S:
            results = await self._trim_parts(full)
            has_trimmed = has_trimmed or True in results
            full = [each for each, trimmed in zip(full, results, strict=True) if trimmed is None]
        for partition in full:
            self._pause(partition)
        return has_trimmed

    async def _trim_parts(self, partitions: Collection[int]) -> list[bool | None]:
        """Trim a part of each stream; return whether each has room now, None where to go on."""
        calls = [
            ScriptCall(
                _TRIM,
                [self._keys.transitions(partition)],
                [self._progress[partition].position, MAX_EXAMINED_PER_CALL],
            )
            for partition in partitions
        ]
        results: list[bool | None] = []
        for partition, reply in zip(partitions, await self._connections.run(calls), strict=True):
            if isinstance(reply, Exception):
                metrics.REDIS_ERRORS.labels(unavailable_reason(reply)).inc()
                self._pause(partition)
                results.append(False)
            else:
                results.append(self._note_part(partition, *reply))
        return results

    def _note_part(
        self, partition: int, deleted: int, position: bytes, group: bytes, backlog: int
    ) -> bool | None:
        """Note what became of a part; return whether there is room now, None where to go on."""
        progress = self._progress[partition]
        progress.position = position or BEGINNING
        progress.deleted += deleted
        if deleted:
            metrics.STREAM_TRIMMED.labels("full").inc(deleted)
            log.info("stream.trimmed", reason="full", partition=partition, entries=deleted)
            return True
        if position:
            return None
        # The end of the stream. If anything was deleted on the way, entries that were pending then
        # may be acknowledged by now: begin once more.
        has_deleted, progress.deleted = progress.deleted > 0, 0
        if has_deleted:
            return None
        log.error(
            "backlog.filled", partition=partition, handler=group.decode(), transitions=backlog
        )
        self._pause(partition)
        return False

    def _pause(self, partition: int) -> None:
        self._progress[partition].paused_until = asyncio.get_running_loop().time() + PAUSE_S
