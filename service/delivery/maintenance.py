"""What a worker does for the partitions it works besides delivering: measure, tell, trim.

Each look is one round trip, however many partitions there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from ..config import DAY_S, Settings
from ..storage.connections import Connections
from ..storage.layout import Keys
from ..telemetry import metrics
from .dead_letter_expiry import LetterExpiry
from .lag import Lag, lags
from .retention import Janitor
from .retries import CircuitBreakers

MEASURE_EVERY_S = 15.0
# Said again every turn, forgotten when no worker says it any more.
CIRCUIT_TTL_S = 5


class PartitionMaintenance:
    """Sets the gauges of one worker's lag, keeps its open circuits known in Redis, and trims.

    Args:
        connections: Open clients.
        keys: The layout.
        settings: For how long what is kept, and the handlers of the deployment.
        worker: The worker's name.
        circuits: The circuit of each handler the worker works for.
    """

    def __init__(
        self,
        connections: Connections,
        keys: Keys,
        settings: Settings,
        worker: str,
        circuits: Mapping[str, CircuitBreakers],
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._worker = worker
        self._circuits = circuits
        self._measured_at = float("-inf")
        self._janitor = Janitor(
            connections,
            keys,
            handlers=settings.handlers,
            retention_s=settings.stream_retention_days * DAY_S,
        )
        self._letter_expiry = LetterExpiry(
            connections, keys, retention_s=settings.dead_letter_retention_days * DAY_S
        )

    async def turn(self, places: Sequence[tuple[str, int]]) -> None:
        """Do what is due for *places*, by handler and partition.

        Raises:
            RedisError: Redis did not answer; what was not done waits for the next turn.
        """
        await self._tell_of_circuits()
        now = asyncio.get_running_loop().time()
        if now >= self._measured_at + MEASURE_EVERY_S:
            # A worker that holds nothing yet is looked at again as soon as it does.
            self._measured_at = now if places else float("-inf")
            await self._measure(places)
        await self._janitor.tidy({partition for _, partition in places})
        await self._letter_expiry.turn(places)

    async def _tell_of_circuits(self) -> None:
        """Let `check` see which queues cannot be reached from here."""
        for handler, circuit in self._circuits.items():
            if circuit.is_open:
                key = self._keys.circuit(handler)
                await self._connections.client.set(key, self._worker, ex=CIRCUIT_TTL_S)

    async def _measure(self, places: Sequence[tuple[str, int]]) -> None:
        """Set the gauges of what is not settled."""
        found: dict[str, list[Lag]] = {handler: [] for handler in self._circuits}
        measured = await lags(self._connections, self._keys, places)
        for (handler, _), lag in zip(places, measured, strict=True):
            if not isinstance(lag, Exception):
                found[handler].append(lag)
        for handler, each in found.items():
            oldest_s = max((lag.oldest_s for lag in each), default=0.0)
            metrics.OLDEST_SECONDS.labels(handler).set(oldest_s)
            metrics.DEAD_LETTERS.labels(handler).set(sum(lag.dead for lag in each))
            entries = [lag.entries for lag in each if lag.entries is not None]
            # Where Redis does not know, the last it knew says more than a wrong number.
            if len(entries) == len(each):
                metrics.LAG_ENTRIES.labels(handler).set(sum(entries))
