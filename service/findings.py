"""What Redis's state means for the promises, in words. Pure: what was read comes in, words go out.

Who asks Redis, and what follows from a finding, is `health`'s and `checks`' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from .config import Durability

MOST_CLOCK_SKEW_S = 30.0
MOST_MEMORY_USED = 0.8
OLDEST_VERSION = 7


class Severity(StrEnum):
    """How bad a finding is: `fatal` keeps the process out of service."""

    FINE = "fine"
    WARNING = "warning"
    FATAL = "fatal"


class Promise(StrEnum):
    """What is promised, in the words of the README."""

    AUTHENTIC = "authentic"
    DURABLE = "durable"
    ONCE = "once"
    FORWARD_ONLY = "forward only"
    ALONE = "each handler alone"
    SECRET = "secret"  # noqa: S105 - the promise's name


class Finding(NamedTuple):
    """One fact, and what it means for the promises it touches."""

    name: str
    severity: Severity
    promises: Sequence[Promise]
    meaning: str


RANKS = {Severity.FINE: 0, Severity.WARNING: 1, Severity.FATAL: 2}
# What was remembered and is gone is taken for new, and what waited for a handler does not come.
_MEMORY = (Promise.DURABLE, Promise.ONCE, Promise.FORWARD_ONLY)
_NOT_TOLD = "CONFIG GET is not permitted"


def judge(described: Mapping[str, Any], *, skew_s: float, durability: Durability) -> list[Finding]:
    """Say what one primary's INFO and configuration mean; a missing field is one not told."""
    return [
        _clock(skew_s),
        _version(described),
        _eviction(described.get("maxmemory_policy")),
        _memory(described),
        _role(described.get("role")),
        _persistence(described),
        _fsync(described),
        _replication(described),
        _durability(described, durability),
    ]


def together(of_each: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Join the findings of all primaries: of each kind the worst, and on how many it is so."""
    joined = []
    for alike in zip(*of_each, strict=True):
        worst = max(alike, key=lambda one: RANKS[one.severity])
        as_bad = sum(one.severity is worst.severity for one in alike)
        if as_bad < len(alike):
            worst = worst._replace(
                meaning=f"{worst.meaning} (on {as_bad} of {len(alike)} primaries)"
            )
        joined.append(worst)
    return joined


def _clock(skew_s: float) -> Finding:
    promises = (Promise.AUTHENTIC, Promise.ONCE)
    if abs(skew_s) <= MOST_CLOCK_SKEW_S:
        return Finding("clock", Severity.FINE, promises, "our clock and Redis's agree")
    return Finding(
        "clock",
        Severity.FATAL,
        promises,
        "our clock and Redis's differ by more than 30 s: genuine signatures may be refused",
    )


def _version(described: Mapping[str, Any]) -> Finding:
    name, promises = "version", (Promise.DURABLE,)
    # Valkey calls itself Redis 7.2.4 as well.
    version = str(described.get("redis_version", OLDEST_VERSION))
    if int(version.partition(".")[0]) >= OLDEST_VERSION:
        return Finding(name, Severity.FINE, promises, "our scripts run on it")
    return Finding(
        name,
        Severity.FATAL,
        promises,
        "older than Redis 7.0: it runs our scripts even when it is full, and they break off half "
        "way",
    )


def _eviction(policy: str | None) -> Finding:
    promises = (*_MEMORY, Promise.ALONE)
    if policy in ("noeviction", None):
        return Finding(
            "eviction", Severity.FINE, promises, "a full Redis refuses writes and forgets nothing"
        )
    return Finding(
        "eviction",
        Severity.FATAL,
        promises,
        "maxmemory-policy is not noeviction: a full Redis would "
        "forget events and transitions in silence",
    )


def _memory(described: Mapping[str, Any]) -> Finding:
    """Warn before Redis is full; where no limit is set, before the machine is."""
    name, promises = "memory", (Promise.DURABLE, Promise.ALONE)
    limit = described.get("maxmemory") or described.get("total_system_memory") or 0
    if not limit or described.get("used_memory", 0) <= MOST_MEMORY_USED * limit:
        return Finding(name, Severity.FINE, promises, "there is room")
    what, then = "maxmemory", "Stripe gets 503 and nothing is lost"
    if not described.get("maxmemory"):
        what, then = "the machine's memory, and no maxmemory is set", "the system may end Redis"
    return Finding(
        name, Severity.WARNING, promises, f"more than 80 % of {what} is used: once full, {then}"
    )


def _role(role: str | None) -> Finding:
    if role != "slave":
        return Finding("role", Severity.FINE, (Promise.DURABLE,), "this Redis takes writes")
    return Finding(
        "role",
        Severity.FATAL,
        (Promise.DURABLE,),
        "this Redis is a replica and takes no writes: REDIS_URL must lead to its primary",
    )


def _persistence(described: Mapping[str, Any]) -> Finding:
    name = "persistence"
    if not described.get("aof_enabled"):
        return Finding(
            name,
            Severity.WARNING,
            _MEMORY,
            "appendonly is off: a restart of Redis loses what "
            "was acknowledged since its last snapshot",
        )
    for field, failed, then in (
        ("aof_last_write_status", "write to the append-only file", "Redis refuses further writes"),
        ("aof_last_bgrewrite_status", "rewrite of the append-only file", "it grows without end"),
        ("rdb_last_bgsave_status", "snapshot", "Redis refuses writes while it stays so"),
    ):
        if described.get(field, "ok") != "ok":
            meaning = f"the last {failed} failed, the disk may be full: {then}"
            return Finding(name, Severity.WARNING, _MEMORY, meaning)
    return Finding(name, Severity.FINE, _MEMORY, "a restart of Redis loses nothing")


def _fsync(described: Mapping[str, Any]) -> Finding:
    name = "fsync"
    if not described.get("aof_enabled"):
        return Finding(name, Severity.FINE, _MEMORY, "does not matter while appendonly is off")
    if described.get("appendfsync") == "always":
        return Finding(name, Severity.FINE, _MEMORY, "what is acknowledged is on disk")
    said = "appendfsync is not always:"
    if described.get("appendfsync") is None:
        said = f"appendfsync cannot be read, {_NOT_TOLD}: unless it is always,"
    return Finding(
        name,
        Severity.WARNING,
        _MEMORY,
        f"{said} a power cut may lose about a second of what was acknowledged",
    )


def _replication(described: Mapping[str, Any]) -> Finding:
    name = "replication"
    if not described.get("connected_slaves"):
        return Finding(
            name,
            Severity.WARNING,
            _MEMORY,
            "no replica is connected: what is lost with this Redis and its disk is lost",
        )
    least = described.get("min-replicas-to-write")
    if least is None or int(least) > 0:
        told = f"; min-replicas-to-write cannot be read, {_NOT_TOLD}" if least is None else ""
        return Finding(name, Severity.FINE, _MEMORY, f"a replica follows{told}")
    return Finding(
        name,
        Severity.WARNING,
        _MEMORY,
        "min-replicas-to-write is 0: a primary cut off from its replicas goes on acknowledging "
        "what is lost when one of them takes over",
    )


def _durability(described: Mapping[str, Any], wanted: Durability) -> Finding:
    """Say whether what DURABILITY asks for can hold at all."""
    problem = ""
    on_disk = described.get("aof_enabled") and described.get("appendfsync") == "always"
    if wanted is Durability.FSYNC and not on_disk:
        problem = "=fsync needs appendonly yes, appendfsync always and CONFIG GET to see it"
    elif wanted is Durability.REPLICA and not described.get("connected_slaves"):
        problem = "=replica, but no replica is connected"
    severity = Severity.FATAL if problem else Severity.FINE
    return Finding(
        "durability", severity, (Promise.DURABLE,), f"DURABILITY{problem or f'={wanted} holds'}"
    )
