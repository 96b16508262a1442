"""One budget of requests to Stripe's API for each mode, shared by all processes of a deployment.

The budget is in Redis (`take_request.lua`). Priorities decide who waits when it runs out: fetches
of thin events take any request, the reconciler leaves a quarter of the burst, `backfill` a half.
One of the last two that has waited for `PATIENCE_S` passes beyond the budget: else fetches without
an end would keep the reconciler from finding what was lost. The reconciler and `backfill` ask for
few pages at once, so that is less than one request a second.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from enum import Enum

from redis.exceptions import RedisError

from ..errors import Unavailable
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..storage.redis_errors import unavailable_reason
from ..storage.scripts import Script

# Half of the time that a request has, waiting included (`client.DEADLINE_S`).
PATIENCE_S = 10.0

_TAKE = Script(__package__, "take_request.lua")


class Priority(Enum):
    """Who asks; the value is the share of the burst that it leaves to others."""

    FETCH = 0.0
    RECONCILE = 0.25
    BACKFILL = 0.5


class RateLimiter:
    """Lets requests pass at a limited rate, over all processes of the deployment.

    Args:
        connections: Open clients.
        keys: The layout.
        rate: Requests a second, for each mode. In the first second a fifth more may pass: with the
            default that is still less than the 25 that Stripe allows in test mode.
    """

    def __init__(self, connections: Connections, keys: Keys, rate: int) -> None:
        self._connections = connections
        self._keys = keys
        self._rate = rate
        self._burst = max(2, rate // 5)
        # Of the callers in one process with one priority only the first asks Redis.
        self._turns: defaultdict[tuple[bool, Priority], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def wait(self, *, is_live: bool, priority: Priority) -> None:
        """Wait until a request may be made; the caller sets a deadline.

        Raises:
            Unavailable: Redis did not answer.
        """
        key = self._keys.api_rate(is_live=is_live)
        clock = asyncio.get_running_loop().time
        patient_until = clock() + PATIENCE_S
        async with self._turns[is_live, priority]:
            # Other processes take from the budget too, so no event of ours could end the wait.
            while wait_s := await self._take(key, priority):
                if priority is not Priority.FETCH and clock() >= patient_until:
                    break
                await asyncio.sleep(wait_s)

    async def _take(self, key: str, priority: Priority) -> float:
        """Take a request from a budget; return 0, or else the seconds to wait before."""
        arguments = (self._rate, self._burst, priority.value * self._burst)
        try:
            wait_us: int = await self._connections.run_one(_TAKE, [key], arguments)
        except (RedisError, OSError) as error:
            reason = unavailable_reason(error)
        else:
            return wait_us / 1e6
        raise Unavailable(reason)
