"""Is this process fit for traffic? Asks Redis, again and again, how it is.

Nothing here answers HTTP; `web` asks `Health`. What an answer means is in `findings`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Mapping
from typing import Any

import structlog
from redis.exceptions import RedisError, ResponseError

from ..config import Settings
from ..errors import ConfigError, UnavailableReason
from ..telemetry import metrics
from . import assessment, layout
from .assessment import RANKS, Finding, Severity
from .connections import Connections, display_address
from .layout import Keys
from .redis_errors import error_word, unavailable_reason
from .scripts import FSYNC_SETTINGS, Script

PROBE_EVERY_S = 1.0
INSPECT_EVERY_S = 60.0
ASKED_OF_THE_CONFIGURATION = (*FSYNC_SETTINGS, "min-replicas-to-write")
# What is told by a server that lets us ask nothing is no answer.
_SILENT = {UnavailableReason.REDIS_UNREACHABLE, UnavailableReason.REDIS_UNAUTHORIZED}

# Why an event cannot be admitted by a process that is ready.
_OF_EVENTS = {UnavailableReason.BACKLOG_FULL, UnavailableReason.BUSY}

_PROBE = Script(__package__, "probe.lua")

DRAINING = "draining"
# The closed list of why a process is not ready.
REASONS = (DRAINING, *(one for one in UnavailableReason if one not in _OF_EVENTS))

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Health:
    """What the probes report.

    Ready while Redis answers, its layout is ours, the clocks agree and the process does not drain.
    A Redis that answers and takes nothing for now (full, short of replicas, unable to save, busy,
    a replica, a Cluster without some primary) leaves us ready: no other receiver would do better,
    and our own 503 tells Stripe more than a load balancer with nobody behind it.
    """

    def __init__(self, connections: Connections, settings: Settings) -> None:
        self._connections = connections
        self._settings = settings
        self._keys = Keys(settings.redis_prefix, settings.partitions)
        # Why Redis is silent; until it has answered once it is.
        self._silence: UnavailableReason | None = UnavailableReason.REDIS_UNREACHABLE
        self._lost = False
        self._refused = ""
        self._findings: list[Finding] = []
        self._unlike_ours = ""
        # Set once Redis has answered, is new enough, and its layout is ours.
        self.usable = asyncio.Event()
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send traffic here."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Why a load balancer should send no traffic here, in one word."""
        if self.draining:
            return DRAINING
        if self._silence is not None:
            return self._silence
        if self._unlike_ours:
            return UnavailableReason.LAYOUT_DIFFERS
        return UnavailableReason.CLOCKS_DIFFER if _is_fatal(self._findings, "clock") else None

    async def watch(self) -> None:
        """Probe Redis for ever, and look at its configuration now and then.

        Raises:
            ConfigError: As it first answers, Redis is too old or has another layout.
        """
        inspected_at = float("-inf")
        while True:
            now = time.monotonic()
            try:
                refused = await probe(self._connections)
                is_due = now - inspected_at >= INSPECT_EVERY_S
                if is_due or refused != self._refused or _is_fatal(self._findings):
                    self._note(await inspect(self._connections, self._settings))
                    inspected_at, self._refused = now, refused
                if not self.usable.is_set():
                    await self._begin()
                await self._look_at_layout()
                self._answered()
            except (RedisError, OSError) as error:
                self._is_silent(unavailable_reason(error))
            metrics.READY.set(self.ready)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _begin(self) -> None:
        """Insist on a server and a layout that we can work with."""
        if _is_fatal(self._findings, "version"):
            raise ConfigError(
                [f"Redis is {one.meaning}" for one in self._findings if one.name == "version"]
            )
        if not await layout.is_claimed(self._connections, self._keys):
            await layout.claim(self._connections, self._keys)
        if self._connections.is_cluster:
            # Its first use must not be two uses at once.
            await self._connections.blocking_client.initialize()
        self.usable.set()

    async def _look_at_layout(self) -> None:
        problem = ""
        try:
            await layout.is_claimed(self._connections, self._keys)
        except ConfigError as error:
            problem = str(error)
        except (RedisError, OSError):
            # Busy, or a Cluster without this primary: as far as we know, nothing has changed.
            return
        if problem and problem != self._unlike_ours:
            log.error("layout.differs", meaning=problem)
        self._unlike_ours = problem

    def _answered(self) -> None:
        if self._silence is not None:
            self._silence, self._lost = None, False
            log.info("redis.recovered")

    def _is_silent(self, reason: UnavailableReason) -> None:
        metrics.REDIS_ERRORS.labels(reason).inc()
        if not self._lost or reason is not self._silence:
            self._silence, self._lost = reason, True
            log.error(
                "redis.lost", reason=reason, address=display_address(self._settings.redis_url)
            )

    def _note(self, found: list[Finding]) -> None:
        """Log what is new among findings, once each."""
        for finding in found:
            metrics.REDIS_FINDING_SEVERITY.labels(finding.name).set(RANKS[finding.severity])
            if finding.severity is not Severity.FINE and finding not in self._findings:
                log.warning(
                    "redis.finding",
                    finding=finding.name,
                    severity=finding.severity,
                    meaning=finding.meaning,
                )
        changed = set(found) - set(self._findings)
        if any(_is_fatal(changed, name) for name in ("durability", "eviction")):
            # Connections that have seen better settings are asked again before the next write.
            self._connections.replace_all()
        self._findings = found


async def probe(connections: Connections) -> str:
    """Return the word with which Redis refuses a write, such as `OOM`; empty where it takes it.

    In Cluster one primary that answers is enough.

    Raises:
        RedisError: It does not answer, or lets us ask nothing.
    """
    targets = await _primaries(connections)
    answers = await asyncio.gather(*(_refusal(connections, each) for each in targets))
    words = [each for each in answers if isinstance(each, str)]
    for error in answers:
        if not words and isinstance(error, Exception):
            raise error
    return max(words)


async def _refusal(
    connections: Connections, target: Mapping[str, Any]
) -> str | RedisError | OSError:
    """Return the word with which one primary refuses a write, or why it is silent."""
    try:
        await connections.client.execute_command("EVAL", _PROBE.source, 0, **target)
    except ResponseError as error:
        return error if unavailable_reason(error) in _SILENT else error_word(error)
    except (RedisError, OSError) as error:
        return error
    return ""


async def inspect(connections: Connections, settings: Settings) -> list[Finding]:
    """Say what Redis's persistence, eviction, replication and clock mean for the promises.

    In Cluster what some primary does not tell is a finding.

    Raises:
        RedisError: Redis did not answer.
    """
    of_each, silences = [], []
    for target in await _primaries(connections):
        try:
            of_each.append(await _judged(connections, settings, target))
        except (RedisError, OSError) as error:
            silences.append(error)
    if not of_each:
        raise silences[0]
    of_each += [[assessment.unreachable_primary(unavailable_reason(error))] for error in silences]
    return assessment.combine(of_each)


async def _judged(
    connections: Connections, settings: Settings, target: Mapping[str, Any]
) -> list[Finding]:
    refused = await _refusal(connections, target)
    if isinstance(refused, Exception):
        raise refused
    try:
        before = time.time()
        seconds, microseconds = await connections.client.time(**target)
        skew_s = seconds + microseconds / 1e6 - (before + time.time()) / 2
        described = await _described(connections, target)
    except ResponseError as error:
        # Busy, it answers nothing else.
        return [assessment.assess_writes(refused or error_word(error))]
    return assessment.assess(
        described, skew_s=skew_s, durability=settings.durability, refused=refused
    )


async def _described(connections: Connections, target: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return INFO's fields, and of the configuration what the server lets us ask for."""
    described = dict(await connections.client.info(**target))
    with contextlib.suppress(ResponseError):
        described |= await connections.client.config_get(*ASKED_OF_THE_CONFIGURATION, **target)
    with contextlib.suppress(RedisError, OSError):
        described["replica-priorities"] = await connections.replica_priorities()
    return described


def _is_fatal(found: Collection[Finding], name: str | None = None) -> bool:
    """Say whether any finding, or the one of a name, is fatal."""
    return any(one.severity is Severity.FATAL for one in found if name in (None, one.name))


async def _primaries(connections: Connections) -> list[dict[str, Any]]:
    """Return whom to ask: in Cluster every primary, for each holds events of its own.

    Raises:
        RedisError: No node of a Cluster answers.
    """
    if not connections.is_cluster:
        return [{}]
    await connections.client.initialize()
    return [{"target_nodes": node} for node in connections.client.get_primaries()]
