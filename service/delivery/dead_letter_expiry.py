"""The age limit of dead letters: they hold personal metadata, and nobody may have asked for them.

A week before the first ones go, the log and a metric say so. What is deleted is gone.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import structlog

from ..config import DAY_S, MAX_CLOCK_DIFFERENCE_S
from ..storage.connections import Connections
from ..storage.layout import Keys
from ..storage.scripts import Script, ScriptCall
from ..telemetry import metrics

LOOK_EVERY_S = 60.0
WARN_BEFORE_S = 7 * DAY_S
WARN_EVERY_S = float(DAY_S)
# In one partition, at each look: a backlog of old letters goes bit by bit.
MAX_DELETED_PER_CALL = 500

_EXPIRE = Script(__package__, "lua/expire_dead_letters.lua")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class DeadLetterExpiry:
    """Deletes dead letters that are too old, and warns before.

    Args:
        connections: Open clients.
        keys: The layout.
        retention_s: Seconds for which a dead letter is kept; 0 for ever.
    """

    def __init__(self, connections: Connections, keys: Keys, *, retention_s: int) -> None:
        self._connections = connections
        self._keys = keys
        self._retention_s = retention_s
        self._looked_at = float("-inf")
        self._warned_at: dict[str, float] = {}

    async def turn(self, assignments: Sequence[tuple[str, int]]) -> None:
        """Do what is due for *assignments*, by handler and partition, in one round trip.

        Raises:
            RedisError: Redis did not answer; what was not done waits for the next turn.
        """
        now = asyncio.get_running_loop().time()
        if not (assignments and self._retention_s) or now < self._looked_at + LOOK_EVERY_S:
            return
        self._looked_at = now
        deleted: dict[str, int] = defaultdict(int)
        left_s: dict[str, float] = {}
        for (handler, _), reply in zip(assignments, await self._expire(assignments), strict=True):
            if isinstance(reply, Exception):
                raise reply
            deleted[handler] += reply[0]
            expires_s = reply[1] / 1000 + self._retention_s - time.time() if reply[1] else math.inf
            left_s[handler] = min(left_s.get(handler, math.inf), expires_s)
        for handler, expires_s in left_s.items():
            self._tell(handler, deleted[handler], expires_s)

    async def _expire(self, assignments: Sequence[tuple[str, int]]) -> Sequence[Any]:
        limits = (MAX_CLOCK_DIFFERENCE_S, self._retention_s, MAX_DELETED_PER_CALL)
        return await self._connections.run(
            [
                ScriptCall(
                    _EXPIRE,
                    [self._keys.dead_letters(partition, handler)],
                    [int(time.time()), *limits],
                )
                for handler, partition in assignments
            ]
        )

    def _tell(self, handler: str, deleted: int, expires_s: float) -> None:
        """Say what was deleted, and, once a day, what soon will be."""
        metrics.DEAD_LETTERS_EXPIRE.labels(handler).set(expires_s)
        if deleted:
            log.warning("dead_letters.expired", handler=handler, dead_letters=deleted)
        now = asyncio.get_running_loop().time()
        if expires_s < WARN_BEFORE_S and now >= self._warned_at.get(handler, -math.inf):
            self._warned_at[handler] = now + WARN_EVERY_S
            log.warning("dead_letters.expiring", handler=handler, expires_s=round(expires_s))
