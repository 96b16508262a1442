"""Periodic work on a worker's partitions besides delivering: measure, publish, trim.

Each kind of work is one round trip, however many partitions there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from ..config import DAY_S, Settings
from ..storage.connections import Connections
from ..storage.keys import Keys
from ..telemetry import metrics
from .consumer_groups import Lag, measure_lags
from .dead_letter_expiry import DeadLetterExpiry
from .leases import Assignment
from .retention import Retention
from .retries import CircuitBreakers

MEASURE_EVERY_S = 15.0
# Written again on each run; expires when no worker writes it any more.
CIRCUIT_TTL_S = 5


class PartitionMaintenance:
    """Measures a worker's lag, publishes its open circuits in Redis, trims streams.

    Args:
        connections: Open clients.
        keys: The layout.
        settings: Retention times, and the handlers of the deployment.
        worker: The worker's name.
        circuits: The circuit breakers of each handler that the worker runs.
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
        self._retention = Retention(
            connections,
            keys,
            handlers=settings.handlers,
            retention_s=settings.stream_retention_days * DAY_S,
        )
        self._dead_letter_expiry = DeadLetterExpiry(
            connections, keys, retention_s=settings.dead_letter_retention_days * DAY_S
        )

    async def run_due(self, assignments: Sequence[Assignment]) -> None:
        """Do what is due for these handlers' partitions.

        Raises:
            RedisError: Redis did not answer; what was not done is due at the next run.
        """
        await self._publish_open_circuits()
        now = asyncio.get_running_loop().time()
        if now >= self._measured_at + MEASURE_EVERY_S:
            # A worker without partitions measures as soon as it has some.
            self._measured_at = now if assignments else float("-inf")
            await self._measure(assignments)
        await self._retention.trim_if_due({partition for _, partition in assignments})
        await self._dead_letter_expiry.expire_if_due(assignments)

    async def _publish_open_circuits(self) -> None:
        """Write to Redis which destinations this worker cannot reach, for `check`."""
        for handler, circuit in self._circuits.items():
            if circuit.is_open:
                key = self._keys.circuit(handler)
                await self._connections.client.set(key, self._worker, ex=CIRCUIT_TTL_S)

    async def _measure(self, assignments: Sequence[Assignment]) -> None:
        """Set the gauges of lag and dead letters."""
        found: dict[str, list[Lag]] = {handler: [] for handler in self._circuits}
        measured = await measure_lags(self._connections, self._keys, assignments)
        for (handler, _), lag in zip(assignments, measured, strict=True):
            if not isinstance(lag, Exception):
                found[handler].append(lag)
        for handler, each in found.items():
            oldest_s = max((lag.oldest_s for lag in each), default=0.0)
            metrics.OLDEST_SECONDS.labels(handler).set(oldest_s)
            metrics.DEAD_LETTERS.labels(handler).set(sum(lag.dead_letters for lag in each))
            entries = [lag.entries for lag in each if lag.entries is not None]
            # The number is not always known: the last value says more than a partial sum.
            if len(entries) == len(each):
                metrics.LAG_ENTRIES.labels(handler).set(sum(entries))
