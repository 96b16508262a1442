"""Room in streams of transitions that are full: new events outrank the history kept for replays.

Whoever admits asks for it, so that it is made whether or not a worker runs. Only what every group
has settled is deleted. What is left is a backlog, and the log names the group that holds it.
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

MAX_LOOKED_AT_PER_CALL = 500
# While room is looked for, other events wait; where there is none, it is not looked for each time.
LOOK_FOR_S = 0.05
LOOK_AGAIN_AFTER_S = 1.0
BEGINNING = b"-"

_MAKE_ROOM = Script(__package__, "make_room.lua")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(slots=True)
class _Search:
    """How far one stream was looked through: what is pending before that is not looked at twice.

    Attributes:
        at: Where to go on.
        deleted: Entries deleted since the beginning was looked at.
        again_at: When to look again, in the event loop's time.
    """

    at: bytes = BEGINNING
    deleted: int = 0
    again_at: float = 0.0


class Headroom:
    """Makes room in full streams, a little at a time.

    Args:
        connections: Open clients.
        keys: The layout.
    """

    def __init__(self, connections: Connections, keys: Keys) -> None:
        self._connections = connections
        self._keys = keys
        self._searches: defaultdict[int, _Search] = defaultdict(_Search)

    async def make(self, partitions: Collection[int]) -> bool:
        """Make room in these partitions' streams; say whether there is room in one of them now."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        full = [each for each in partitions if self._searches[each].again_at <= began]
        has_made = False
        while full and loop.time() <= began + LOOK_FOR_S:
            found = await self._look(full)
            has_made = has_made or True in found
            full = [each for each, made in zip(full, found, strict=True) if made is None]
        for partition in full:
            self._rest(partition)
        return has_made

    async def _look(self, partitions: Collection[int]) -> list[bool | None]:
        """Look at a part of each stream; say for each whether room was made, None to look on."""
        calls = [
            ScriptCall(
                _MAKE_ROOM,
                [self._keys.transitions(partition)],
                [self._searches[partition].at, MAX_LOOKED_AT_PER_CALL],
            )
            for partition in partitions
        ]
        found: list[bool | None] = []
        for partition, reply in zip(partitions, await self._connections.run(calls), strict=True):
            if isinstance(reply, Exception):
                metrics.REDIS_ERRORS.labels(unavailable_reason(reply)).inc()
                self._rest(partition)
                found.append(False)
            else:
                found.append(self._note(partition, *reply))
        return found

    def _note(
        self, partition: int, deleted: int, following: bytes, group: bytes, unsettled: int
    ) -> bool | None:
        """Note what a look has found; say whether it made room, None where to look on."""
        search = self._searches[partition]
        search.at = following or BEGINNING
        search.deleted += deleted
        if deleted:
            metrics.STREAM_TRIMMED.labels("full").inc(deleted)
            log.info("stream.trimmed", reason="full", partition=partition, entries=deleted)
            return True
        if following:
            return None
        # The end. What was pending before may be settled by now, if anything was meanwhile.
        was_fruitful, search.deleted = search.deleted > 0, 0
        if was_fruitful:
            return None
        log.error(
            "backlog.filled", partition=partition, handler=group.decode(), transitions=unsettled
        )
        self._rest(partition)
        return False

    def _rest(self, partition: int) -> None:
        self._searches[partition].again_at = asyncio.get_running_loop().time() + LOOK_AGAIN_AFTER_S
