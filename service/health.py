"""Is this process fit for traffic? Asks Redis, again and again, how it is.

Nothing here answers HTTP; `web` asks `Health`. What an answer means is in `findings`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

import structlog
from redis.exceptions import RedisError, ResponseError

from . import findings, metrics
from .config import Settings
from .connections import Connections, shortage
from .errors import Unavailable
from .findings import RANKS, Finding, Severity

PROBE_EVERY_S = 1.0
INSPECT_EVERY_S = 60.0
ASKED_OF_THE_CONFIGURATION = ("appendfsync", "min-replicas-to-write")

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Health:
    """What the probes report. Ready while Redis answers, nothing is fatal and nobody drains.

    A Redis that answers and takes nothing for now (full, short of replicas, a Cluster without some
    primary) leaves us ready: no other receiver would do better, and our own 503 tells Stripe more
    than a load balancer with nobody behind it.
    """

    def __init__(self, connections: Connections, settings: Settings) -> None:
        self._connections = connections
        self._settings = settings
        self._answering = False
        self._findings: list[Finding] = []
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send traffic here."""
        return self._fit and not self.draining

    @property
    def _fit(self) -> bool:
        fatal = any(finding.severity is Severity.FATAL for finding in self._findings)
        return self._answering and not fatal

    async def watch(self) -> None:
        """Probe Redis for ever, and look at its configuration now and then."""
        inspected_at = float("-inf")
        while True:
            now = time.monotonic()
            try:
                await self._connections.client.ping()
                if now - inspected_at >= INSPECT_EVERY_S or not self._fit:
                    self._note(await inspect(self._connections, self._settings))
                    inspected_at = now
                self._answered(answering=True)
            except (RedisError, OSError) as error:
                metrics.REDIS_ERRORS.labels(shortage(error)).inc()
                self._answered(answering=False, reason=shortage(error))
            metrics.READY.set(self.ready)
            await asyncio.sleep(PROBE_EVERY_S)

    def _answered(self, *, answering: bool, reason: str | None = None) -> None:
        if answering != self._answering:
            self._answering = answering
            if answering:
                log.info("redis.answered")
            else:
                log.error("redis.lost", reason=reason)

    def _note(self, findings: list[Finding]) -> None:
        """Log what is new among *findings*, once each."""
        for finding in findings:
            metrics.REDIS_RISK.labels(finding.name).set(RANKS[finding.severity])
            if finding.severity is not Severity.FINE and finding not in self._findings:
                log.warning(
                    "redis.finding",
                    finding=finding.name,
                    severity=finding.severity,
                    meaning=finding.meaning,
                )
        self._findings = findings


async def await_redis(connections: Connections, deadline_s: float) -> None:
    """Wait until Redis answers.

    Raises:
        Unavailable: It did not within *deadline_s* seconds.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            await connections.client.ping()
            await connections.blocking_client.ping()
        except (RedisError, OSError) as error:
            if time.monotonic() > deadline:
                raise Unavailable(shortage(error)) from None
            await asyncio.sleep(0.2)
        else:
            return


async def inspect(connections: Connections, settings: Settings) -> list[Finding]:
    """Say what Redis's persistence, eviction, replication and clock mean for the promises.

    Raises:
        RedisError: Redis did not answer.
    """
    return findings.together(
        [await _judged(connections, settings, each) for each in _primaries(connections)]
    )


async def _judged(
    connections: Connections, settings: Settings, target: Mapping[str, Any]
) -> list[Finding]:
    before = time.time()
    seconds, microseconds = await connections.client.time(**target)
    skew_s = seconds + microseconds / 1e6 - (before + time.time()) / 2
    return findings.judge(
        await _described(connections, target),
        skew_s=skew_s,
        durability=settings.durability,
    )


async def _described(connections: Connections, target: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return INFO's fields, and of the configuration what the server lets us ask for."""
    described = dict(await connections.client.info(**target))
    with contextlib.suppress(ResponseError):
        described |= await connections.client.config_get(*ASKED_OF_THE_CONFIGURATION, **target)
    return described


def _primaries(connections: Connections) -> list[dict[str, Any]]:
    """Return whom to ask: in Cluster every primary, for each holds events of its own."""
    if not connections.is_cluster:
        return [{}]
    return [{"target_nodes": node} for node in connections.client.get_primaries()]
