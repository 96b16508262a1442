"""The age limit of dead letters: they hold personal metadata, and may never be looked at.

What is deleted cannot be restored, so a log line and a metric warn a week before.
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
from ..storage.keys import Keys
from ..storage.scripts import Script, ScriptCall, raise_first
from ..telemetry import metrics
from .leases import Assignment

EXPIRE_EVERY_S = 60.0
WARN_BEFORE_S = 7 * DAY_S
WARN_EVERY_S = float(DAY_S)
# Bounds the time that one call takes; a long backlog of old dead letters takes several.
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
        self._expired_at = float("-inf")
        self._warn_again_at: dict[str, float] = {}

    async def expire_if_due(self, assignments: Sequence[Assignment]) -> None:
        """Expire dead letters in one round trip, unless that was done within `EXPIRE_EVERY_S`.

        Raises:
            RedisError: Redis did not answer; the next attempt is as far away as after a success.
        """
        now = asyncio.get_running_loop().time()
        if not self._retention_s or now < self._expired_at + EXPIRE_EVERY_S:
            return
        # A worker without partitions looks as soon as it has some.
        self._expired_at = now if assignments else -math.inf
        deleted: dict[str, int] = defaultdict(int)
        next_in_s: dict[str, float] = {}
        replies = await self._expire(assignments) if assignments else []
        # Other workers report on the partitions that they hold now.
        metrics.DEAD_LETTERS_EXPIRE.clear()
        for (handler, _), (count, oldest_ms) in zip(assignments, replies, strict=True):
            deleted[handler] += count
            age_s = time.time() - oldest_ms / 1000
            expires_s = self._retention_s - age_s if oldest_ms else math.inf
            next_in_s[handler] = min(next_in_s.get(handler, math.inf), expires_s)
        for handler, expires_s in next_in_s.items():
            self._report(handler, deleted[handler], expires_s)

    async def _expire(self, assignments: Sequence[Assignment]) -> Sequence[Any]:
        now = int(time.time())
        limits = (MAX_CLOCK_DIFFERENCE_S, self._retention_s, MAX_DELETED_PER_CALL)
        replies = await self._connections.run(
            [
                ScriptCall(_EXPIRE, [self._keys.dead_letters(partition, handler)], [now, *limits])
                for handler, partition in assignments
            ]
        )
        raise_first(replies)
        return replies

    def _report(self, handler: str, deleted: int, expires_s: float) -> None:
        """Log what was deleted and, once a day, that the next ones will be soon."""
        metrics.DEAD_LETTERS_EXPIRE.labels(handler).set(expires_s)
        if deleted:
            log.warning("dead_letters.expired", handler=handler, dead_letters=deleted)
        now = asyncio.get_running_loop().time()
        if expires_s < WARN_BEFORE_S and now >= self._warn_again_at.get(handler, -math.inf):
            self._warn_again_at[handler] = now + WARN_EVERY_S
            log.warning("dead_letters.expiring", handler=handler, expires_s=round(expires_s))
