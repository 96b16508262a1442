"""Is this process fit for traffic? What Redis's configuration means for the promises, in words.

Nothing here answers HTTP; `web` asks `Health` and `check` prints `Finding`s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import structlog
from redis.exceptions import RedisError, ResponseError

from . import metrics
from .config import Durability, Settings
from .connections import Connections, shortage
from .errors import Unavailable

PROBE_EVERY_S = 1.0
INSPECT_EVERY_S = 60.0
MOST_CLOCK_SKEW_S = 30.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Severity(StrEnum):
    """How bad a finding is: `fatal` keeps the process out of service."""

    FINE = "fine"
    WARNING = "warning"
    FATAL = "fatal"


class Finding(NamedTuple):
    """One fact about Redis and what it means for a promise."""

    name: str
    severity: Severity
    meaning: str


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
    client = connections.client
    before = time.time()
    seconds, microseconds = await client.time(**_first_node(connections))
    skew_s = seconds + microseconds / 1e6 - (before + time.time()) / 2
    described = await _described(connections)
    return [
        _clock(skew_s),
        _eviction(described.get("maxmemory_policy")),
        _role(described.get("role")),
        _persistence(described),
        _durability(described, settings.durability),
    ]


async def _described(connections: Connections) -> Mapping[str, Any]:
    """Return INFO's fields, and `appendfsync` where the server lets us ask for it.

    In Cluster, of replicas those of the primary that has fewest.
    """
    target = _first_node(connections)
    described = dict(await connections.client.info(**target))
    if connections.is_cluster:
        replicas = [
            (await connections.client.info("replication", target_nodes=node))["connected_slaves"]
            for node in connections.client.get_primaries()
        ]
        described["connected_slaves"] = min(replicas)
    try:
        described |= await connections.client.config_get("appendfsync", **target)
    except ResponseError:
        described["appendfsync"] = None
    return described


def _first_node(connections: Connections) -> dict[str, Any]:
    """In Cluster, one primary stands for all: they are configured alike."""
    if not connections.is_cluster:
        return {}
    return {"target_nodes": connections.client.get_primaries()[0]}


def _clock(skew_s: float) -> Finding:
    if abs(skew_s) <= MOST_CLOCK_SKEW_S:
        return Finding("clock", Severity.FINE, "our clock and Redis's agree")
    return Finding(
        "clock",
        Severity.FATAL,
        "our clock and Redis's differ by more than 30 s: genuine signatures may be refused",
    )


def _eviction(policy: str | None) -> Finding:
    if policy in ("noeviction", None):
        return Finding("eviction", Severity.FINE, "a full Redis refuses writes and forgets nothing")
    return Finding(
        "eviction",
        Severity.FATAL,
        "maxmemory-policy is not noeviction: a full Redis would "
        "forget events and transitions in silence",
    )


def _role(role: str | None) -> Finding:
    if role == "slave":
        return Finding(
            "role",
            Severity.FATAL,
            "this Redis is a replica and takes no writes: REDIS_URL must lead to its primary",
        )
    return Finding("role", Severity.FINE, "this Redis takes writes")


def _persistence(described: Mapping[str, Any]) -> Finding:
    if not described.get("aof_enabled"):
        return Finding(
            "persistence",
            Severity.WARNING,
            "appendonly is off: a restart of Redis loses what "
            "was acknowledged since its last snapshot",
        )
    if described["appendfsync"] == "always":
        return Finding("persistence", Severity.FINE, "what is acknowledged is on disk")
    if described["appendfsync"] is None:
        return Finding(
            "persistence",
            Severity.WARNING,
            "appendfsync cannot be read, CONFIG GET is not permitted: unless it is always, a "
            "power cut may lose about a second of what was acknowledged",
        )
    return Finding(
        "persistence",
        Severity.WARNING,
        "appendfsync is not always: a power cut may lose about a second of what was acknowledged",
    )


def _durability(described: Mapping[str, Any], wanted: Durability) -> Finding:
    """Say whether what DURABILITY asks for can hold at all."""
    name = "durability"
    on_disk = described.get("aof_enabled") and described["appendfsync"] == "always"
    if wanted is Durability.FSYNC and not on_disk:
        return Finding(
            name,
            Severity.FATAL,
            "DURABILITY=fsync needs appendonly yes, appendfsync always and CONFIG GET to see it",
        )
    if wanted is Durability.REPLICA and not described.get("connected_slaves"):
        return Finding(name, Severity.FATAL, "DURABILITY=replica, but no replica is connected")
    return Finding(name, Severity.FINE, f"DURABILITY={wanted} holds")
