"""Publishes in Redis that this process lives, and what it has counted since the last time.

Every five seconds, in one call of a script. What it counts are the differences of the Prometheus
counters, so that nothing is added where events are received and delivered. Per minute, so that what
happened while Redis did not answer is shown for the minutes in which it happened.

A call that failed is repeated with the same batch of counts. Its id keeps the script from counting
a batch twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Literal, NamedTuple

import msgspec
import structlog
from redis.exceptions import RedisError

from .. import __version__
from ..config import DAY_S
from ..errors import UnavailableReason
from ..inbox.decision_log import NotedReversal, recent_reversals
from ..storage.connections import Connections
from ..storage.health import Health
from ..storage.keys import Keys
from ..storage.redis_errors import unavailable_reason
from ..storage.scripts import Script
from ..telemetry import metrics

PUBLISH_EVERY_S = 5.0
# How soon a process is seen once Redis has answered for the first time.
USABLE_CHECK_S = 0.25
# How long a stopping process waits for Redis, to say that it is gone.
LAST_CALLS_S = 1.0
MINUTE_S = 60
# Ten minutes more than are shown.
MINUTE_TTL_S = 70 * MINUTE_S
DAY_TTL_S = 8 * DAY_S
MAX_REVERSALS = 200
# A process that was killed is shown for so long.
FORGET_AFTER_S = 600.0

_PUBLISH = Script(__package__, "publish.lua")

Kind = Literal["receiver", "worker", "dev"]

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Life(msgspec.Struct, frozen=True):
    """What a process says of itself, as it is stored.

    Attributes:
        kind: What it is.
        version: The version of this service.
        started_at: Unix time in seconds.
        reason: Why it is not ready; None while it is.
        works: The handlers that it calls.
        last_event_at: Unix time of its last verified event; 0 before the first.
    """

    kind: str
    version: str
    started_at: float
    reason: str | None
    works: tuple[str, ...]
    last_event_at: float


class _Batch(NamedTuple):
    """Counts of some minutes and days, each by its number since 1970, and reversals."""

    id: str
    minutes: dict[int, Counter[str]]
    days: dict[int, Counter[str]]
    reversals: list[NotedReversal]


class _Totals:
    """The counters of this process as they were read last."""

    def __init__(self) -> None:
        self._minute, self._day = self._read()

    def take_differences(self) -> tuple[Counter[str], Counter[str]]:
        """Return what was counted since the last call: as minutes have it, and as days have it."""
        minute, day = self._read()
        differences = minute - self._minute, day - self._day
        self._minute, self._day = minute, day
        return differences

    def _read(self) -> tuple[Counter[str], Counter[str]]:
        received = metrics.read_totals(metrics.EVENTS, "outcome")
        delivered = metrics.read_totals(metrics.DELIVERIES, "outcome", "handler")
        minute = Counter({f"received:{outcome}": n for (outcome,), n in received.items()})
        # A handler's name may contain a colon.
        minute.update({f"delivered:{':'.join(key)}": n for key, n in delivered.items()})
        day = Counter(
            reversals=metrics.read_totals(metrics.REVERSALS)[()],
            recovered=metrics.read_totals(metrics.EVENTS_RECOVERED)[()],
            dead_lettered=sum(n for (word, _), n in delivered.items() if word == "dead_lettered"),
        )
        return minute, day


class Publisher:
    """Publishes what one process does.

    Args:
        connections: Open clients.
        keys: The layout.
        health: Whether the process is ready, and whether Redis is usable.
        kind: What the process is.
        works: The handlers that it calls.
    """

    def __init__(
        self,
        connections: Connections,
        keys: Keys,
        health: Health,
        *,
        kind: Kind,
        works: Sequence[str],
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._health = health
        self._kind = kind
        self._works = tuple(works)
        # Containers on the host's network share its name, and each may have the process id 1. A
        # receiver and a worker must not take each other's place.
        self._name = f"{socket.gethostname()}-{os.getpid()} {kind}"
        self._started_at = time.time()
        self._totals = _Totals()
        self._minutes: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._days: defaultdict[int, Counter[str]] = defaultdict(Counter)
        # A batch of which it is not known that it was counted.
        self._unconfirmed: _Batch | None = None
        self._is_failure_logged = False

    async def run(self, stopping: asyncio.Event) -> None:
        """Publish until *stopping* is set; then publish the rest, and that the process is gone."""
        while not stopping.is_set():
            await self._try_to_publish()
            is_waiting = not self._health.usable.is_set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(USABLE_CHECK_S if is_waiting else PUBLISH_EVERY_S):
                    await stopping.wait()
        if self._health.usable.is_set():
            await self._try_to_leave()

    async def _try_to_leave(self) -> None:
        """Publish the rest, and that the process is gone; nothing is logged if that fails."""
        # Raised, any error would turn the end of the process into a failure.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LAST_CALLS_S):
                if self._unconfirmed:
                    await self._publish()
                self._collect(time.time())
                await self._publish(is_gone=True)

    async def _try_to_publish(self) -> None:
        try:
            self._collect(time.time())
            if self._health.usable.is_set():
                await self._publish()
                self._is_failure_logged = False
        except (RedisError, OSError) as error:
            self._note_failure(unavailable_reason(error))
        except Exception:
            # Raised, it would end the process, and with it what that is there for.
            log.exception("activity.crashed")

    def _note_failure(self, reason: UnavailableReason) -> None:
        metrics.REDIS_ERRORS.labels(reason).inc()
        # Where Redis does not answer at all, other lines say so.
        if self._health.is_ready and not self._is_failure_logged:
            self._is_failure_logged = True
            log.warning("activity.not_published", reason=reason)

    async def _publish(self, *, is_gone: bool = False) -> None:
        """Publish what was counted, or again the batch of the last call if that failed.

        Raises:
            RedisError: It is unknown whether the batch was counted.
        """
        batch = self._unconfirmed = self._unconfirmed or self._take_batch()
        counts = [
            *((self._keys.minute(n), MINUTE_TTL_S, found) for n, found in batch.minutes.items()),
            *((self._keys.day(n), DAY_TTL_S, found) for n, found in batch.days.items()),
        ]
        last_event_at = metrics.read_last_event()
        await self._connections.run_one(
            _PUBLISH,
            [
                self._keys.processes,
                self._keys.reversals,
                self._keys.day(int(last_event_at // DAY_S)),
                *(key for key, _, _ in counts),
            ],
            [
                self._name,
                b"" if is_gone else self._describe(last_event_at),
                int(last_event_at * 1000),
                DAY_TTL_S,
                _encode(batch, counts),
                MAX_REVERSALS,
                int(FORGET_AFTER_S * 1000),
            ],
        )
        self._unconfirmed = None

    def _collect(self, now: float) -> None:
        """Add what was counted since the last time to the present minute and day."""
        in_minute, in_day = self._totals.take_differences()
        minute, day = int(now // MINUTE_S), int(now // DAY_S)
        if in_minute:
            self._minutes[minute].update(in_minute)
        if in_day:
            self._days[day].update(in_day)
        # What Redis did not take for so long would be shown no more.
        for counts, oldest in (
            (self._minutes, minute - MINUTE_TTL_S // MINUTE_S),
            (self._days, day - DAY_TTL_S // DAY_S),
        ):
            for outdated in [number for number in counts if number < oldest]:
                del counts[outdated]

    def _take_batch(self) -> _Batch:
        reversals = [recent_reversals.popleft() for _ in range(len(recent_reversals))]
        batch = _Batch(secrets.token_hex(4), {**self._minutes}, {**self._days}, reversals)
        self._minutes.clear()
        self._days.clear()
        return batch

    def _describe(self, last_event_at: float) -> bytes:
        life = Life(
            self._kind,
            __version__,
            self._started_at,
            self._health.reason,
            self._works,
            last_event_at,
        )
        return msgspec.json.encode(life)


def _encode(batch: _Batch, counts: Sequence[tuple[str, int, Counter[str]]]) -> bytes:
    """Return a batch as the script takes it."""
    return msgspec.json.encode(
        {
            "id": batch.id,
            "counts": [
                (ttl_s, [*chain.from_iterable(found.items())]) for _, ttl_s, found in counts
            ],
            "reversals": [
                [str(each) for each in chain.from_iterable(one._asdict().items())]
                for one in batch.reversals
            ],
        }
    )
