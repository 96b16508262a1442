"""Whether this process is fit for traffic: Redis is probed, and its state read, at intervals.

`web` serves the answer; what Redis's state means is in `assessment`.
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
from ..findings import RANKS, Finding, Severity
from ..telemetry import metrics
from . import assessment, layout
from .connections import Connections, display_address
from .keys import Keys
from .redis_errors import error_word, unavailable_reason
from .scripts import FSYNC_SETTINGS, Script

PROBE_EVERY_S = 1.0
INSPECT_EVERY_S = 60.0
CONFIG_READ = (*FSYNC_SETTINGS, "min-replicas-to-write")
# Errors that are not an answer: the server is away, or does not accept our user.
_NO_ANSWER = {UnavailableReason.REDIS_UNREACHABLE, UnavailableReason.REDIS_UNAUTHORIZED}

# Reasons of single events, while the process is ready.
_EVENT_REASONS = {
    UnavailableReason.BACKLOG_FULL,
    UnavailableReason.API_KEY_MISSING,
    UnavailableReason.BUSY,
}

_PROBE = Script(__package__, "probe.lua")

DRAINING = "draining"
# Why a process is not ready: a closed list.
REASONS = (DRAINING, *(one for one in UnavailableReason if one not in _EVENT_REASONS))

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Health:
    """Whether the process is ready, and why not.

    It is ready while Redis answers, the layout is ours, the clocks agree and it does not drain. It
    stays ready while Redis answers but takes no writes (full, short of replicas, unable to save,
    busy, a replica, a Cluster without some primary): no other receiver would do better, and our own
    503 is a better answer to Stripe than that of a load balancer without a backend.
    """

    def __init__(self, connections: Connections, settings: Settings) -> None:
        self._connections = connections
        self._settings = settings
        self._keys = Keys(settings.redis_prefix, settings.partitions)
        # Why Redis does not answer; so it is until the first answer.
        self._no_answer: UnavailableReason | None = UnavailableReason.REDIS_UNREACHABLE
        self._is_logged_as_lost = False
        self._write_error = ""
        self._findings: list[Finding] = []
        self._layout_problem = ""
        # Set once Redis has answered, is new enough, and has our layout.
        self.usable = asyncio.Event()
        self.is_draining = False

    @property
    def is_ready(self) -> bool:
        """Whether a load balancer should send traffic here."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Why a load balancer should send no traffic here, as one word; None while it should."""
        if self.is_draining:
            return DRAINING
        if self._no_answer is not None:
            return self._no_answer
        if self._layout_problem:
            return UnavailableReason.LAYOUT_DIFFERS
        return UnavailableReason.CLOCKS_DIFFER if _is_fatal(self._findings, "clock") else None

    async def watch(self) -> None:
        """Probe Redis for ever, and inspect it every minute or when something is wrong.

        Raises:
            ConfigError: When Redis first answers it is too old or has another layout.
        """
        inspected_at = float("-inf")
        while True:
            now = time.monotonic()
            try:
                write_error = await probe(self._connections)
                is_due = now - inspected_at >= INSPECT_EVERY_S
                if is_due or write_error != self._write_error or _is_fatal(self._findings):
                    self._note_findings(await inspect(self._connections, self._settings))
                    inspected_at, self._write_error = now, write_error
                if not self.usable.is_set():
                    await self._check_usable()
                await self._check_layout()
                self._note_answer()
            except (RedisError, OSError) as error:
                self._note_no_answer(unavailable_reason(error))
            metrics.READY.set(self.is_ready)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _check_usable(self) -> None:
        """Check version and layout, and claim the layout where there is none."""
        if _is_fatal(self._findings, "version"):
            raise ConfigError(
                [f"Redis is {one.meaning}" for one in self._findings if one.name == "version"]
            )
        if not await layout.is_claimed(self._connections, self._keys):
            await layout.claim(self._connections, self._keys)
        if self._connections.is_cluster:
            # A cluster client's first use must not be concurrent.
            await self._connections.blocking_client.initialize()
        self.usable.set()

    async def _check_layout(self) -> None:
        problem = ""
        try:
            await layout.is_claimed(self._connections, self._keys)
        except ConfigError as error:
            problem = str(error)
        except (RedisError, OSError):
            # Busy, or a Cluster without this primary: the layout that was read last still counts.
            return
        if problem and problem != self._layout_problem:
            log.error("layout.differs", meaning=problem)
        self._layout_problem = problem

    def _note_answer(self) -> None:
        if self._no_answer is not None:
            self._no_answer, self._is_logged_as_lost = None, False
            log.info("redis.recovered")

    def _note_no_answer(self, reason: UnavailableReason) -> None:
        metrics.REDIS_ERRORS.labels(reason).inc()
        if not self._is_logged_as_lost or reason is not self._no_answer:
            self._no_answer, self._is_logged_as_lost = reason, True
            log.error("redis.lost", reason=reason, server=display_address(self._settings.redis_url))

    def _note_findings(self, found: list[Finding]) -> None:
        """Export *found*, and log the findings that were not there before."""
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
            # Connections that have verified better settings must verify them again.
            self._connections.replace_all()
        self._findings = found


async def probe(connections: Connections) -> str:
    """Return the first word of Redis's error reply to a write, such as `OOM`; empty for none.

    In Cluster one primary that answers is enough.

    Raises:
        RedisError: It does not answer, or does not accept our user.
    """
    targets = await _primaries(connections)
    answers = await asyncio.gather(*(_write_error(connections, each) for each in targets))
    words = [each for each in answers if isinstance(each, str)]
    for error in answers:
        if not words and isinstance(error, Exception):
            raise error
    return max(words)


async def _write_error(
    connections: Connections, target: Mapping[str, Any]
) -> str | RedisError | OSError:
    """Return the first word of a primary's error reply to a write, or why it does not answer."""
    try:
        await connections.client.execute_command("EVAL", _PROBE.source, 0, **target)
    except ResponseError as error:
        return error if unavailable_reason(error) in _NO_ANSWER else error_word(error)
    except (RedisError, OSError) as error:
        return error
    return ""


async def inspect(connections: Connections, settings: Settings) -> list[Finding]:
    """Return what Redis's persistence, eviction, replication and clock mean for the promises.

    In Cluster a primary that does not answer is a finding.

    Raises:
        RedisError: Redis did not answer.
    """
    per_primary, errors = [], []
    for target in await _primaries(connections):
        try:
            per_primary.append(await _inspect_primary(connections, settings, target))
        except (RedisError, OSError) as error:
            errors.append(error)
    if not per_primary:
        raise errors[0]
    per_primary += [[assessment.unreachable_primary(unavailable_reason(error))] for error in errors]
    return assessment.combine(per_primary)


async def _inspect_primary(
    connections: Connections, settings: Settings, target: Mapping[str, Any]
) -> list[Finding]:
    write_error = await _write_error(connections, target)
    if isinstance(write_error, Exception):
        raise write_error
    try:
        before = time.time()
        seconds, microseconds = await connections.client.time(**target)
        skew_s = seconds + microseconds / 1e6 - (before + time.time()) / 2
        described = await _described(connections, target)
    except ResponseError as error:
        # A busy server answers every command with an error.
        return [assessment.assess_writes(write_error or error_word(error))]
    return assessment.assess(
        described, skew_s=skew_s, durability=settings.durability, write_error=write_error
    )


async def _described(connections: Connections, target: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return INFO's fields, and the settings that our user may read."""
    described = dict(await connections.client.info(**target))
    with contextlib.suppress(ResponseError):
        described |= await connections.client.config_get(*CONFIG_READ, **target)
    with contextlib.suppress(RedisError, OSError):
        described["replica-priorities"] = await connections.replica_priorities()
    return described


def _is_fatal(found: Collection[Finding], name: str | None = None) -> bool:
    """Return whether any finding, or the one called *name*, is fatal."""
    return any(one.severity is Severity.FATAL for one in found if name in (None, one.name))


async def _primaries(connections: Connections) -> list[dict[str, Any]]:
    """Return redis-py's option for each primary; a Cluster has several, each with its own events.

    Raises:
        RedisError: No node of a Cluster answers.
    """
    if not connections.is_cluster:
        return [{}]
    await connections.client.initialize()
    return [{"target_nodes": node} for node in connections.client.get_primaries()]
