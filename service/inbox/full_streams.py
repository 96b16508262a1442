"""Trims streams that are full: a new event outranks history kept for replays.

Admission asks for it, so that it happens whether or not a worker runs. Only entries that every
group has acknowledged are deleted. The rest is a backlog, and the log names the slowest group.
Streams of notifications keep no history, so when they are full all of it is a backlog.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from ..storage.connections import Connections
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


class Stream(NamedTuple):
    """A stream of one partition: its key, and the partition."""

    key: str
    partition: int


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
    """Trims full streams, a bounded part at a time."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._progress: defaultdict[Stream, _Progress] = defaultdict(_Progress)

    async def trim(self, streams: Collection[Stream]) -> bool:
        """Trim *streams*; return whether one of them has room now."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        full = [each for each in streams if self._progress[each].paused_until <= began]
        has_trimmed = False
        while full and loop.time() <= began + MAX_TRIM_S:
            results = await self._trim_parts(full)
            has_trimmed = has_trimmed or True in results
            full = [each for each, trimmed in zip(full, results, strict=True) if trimmed is None]
        for stream in full:
            self._pause(stream)
        return has_trimmed

    async def _trim_parts(self, streams: Collection[Stream]) -> list[bool | None]:
        """Trim a part of each stream; return whether each has room now, None where to go on."""
        calls = [
            ScriptCall(_TRIM, [each.key], [self._progress[each].position, MAX_EXAMINED_PER_CALL])
            for each in streams
        ]
        results: list[bool | None] = []
        for stream, reply in zip(streams, await self._connections.run(calls), strict=True):
            if isinstance(reply, Exception):
                metrics.REDIS_ERRORS.labels(unavailable_reason(reply)).inc()
                self._pause(stream)
                results.append(False)
            else:
                results.append(self._note_part(stream, *reply))
        return results

    def _note_part(
        self, stream: Stream, deleted: int, position: bytes, group: bytes, backlog: int
    ) -> bool | None:
        """Note what became of a part; return whether there is room now, None where to go on."""
        progress = self._progress[stream]
        progress.position = position or BEGINNING
        progress.deleted += deleted
        if deleted:
            metrics.STREAM_TRIMMED.labels("full").inc(deleted)
            log.info("stream.trimmed", reason="full", partition=stream.partition, entries=deleted)
            return True
        if position:
            return None
        # The end of the stream. If anything was deleted on the way, entries that were pending then
        # may be acknowledged by now: begin once more.
        has_deleted, progress.deleted = progress.deleted > 0, 0
        if has_deleted:
            return None
        log.error(
            "backlog.filled",
            partition=stream.partition,
            # None where no worker has ever read it.
            handler=group.decode() or None,
            entries=backlog,
        )
        self._pause(stream)
        return False

    def _pause(self, stream: Stream) -> None:
        self._progress[stream].paused_until = asyncio.get_running_loop().time() + PAUSE_S
