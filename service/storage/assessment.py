"""What the state of a Redis server means for the promises, as findings. Pure: it asks nothing.

`health` reads the state; `check` shows the findings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from ..config import MAX_CLOCK_DIFFERENCE_S, Durability

CLOCK_WARNING_S = 30.0
MAX_MEMORY_USED = 0.8
OLDEST_VERSION = 7


class Severity(StrEnum):
    """How bad a finding is: `fatal` breaks a promise, or keeps every event from being admitted."""

    FINE = "fine"
    WARNING = "warning"
    FATAL = "fatal"


class Promise(StrEnum):
    """A promise, in the words of the README."""

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
# The promises that a loss of data breaks: forgotten events are taken for new ones, and transitions
# that waited for a handler are gone.
_MEMORY = (Promise.DURABLE, Promise.ONCE, Promise.FORWARD_ONLY)
_NOT_PERMITTED = "CONFIG GET is not permitted"
# The cause of each error reply to a write. Until it is removed, workers wait too.
_WRITE_ERRORS = {
    "OOM": "it has reached maxmemory; workers go on and make room",
    "MISCONF": "its last snapshot, or write to the append-only file, failed: look at its disk",
    "NOREPLICAS": "fewer replicas follow than min-replicas-to-write asks for",
    "READONLY": "it is a replica: REDIS_URL must lead to its primary",
    "MASTERDOWN": "it is a replica that has lost its primary: REDIS_URL must lead to a primary",
    "BUSY": "a script or a module has been running for too long: SCRIPT KILL ends a script",
}


def assess(
    described: Mapping[str, Any], *, skew_s: float, durability: Durability, write_error: str = ""
) -> list[Finding]:
    """Return what one primary's state means for the promises.

    Args:
        described: The fields of INFO and of the configuration; one that may not be read is missing.
        skew_s: By how much its clock is ahead of ours.
        durability: What must hold before an event is acknowledged.
        write_error: The first word of its error reply to a write; empty where it takes writes.
    """
    version = _version(described)
    if version.severity is Severity.FATAL:
        return [version]
    return [
        _clock(skew_s),
        version,
        assess_writes(write_error),
        _eviction(described.get("maxmemory_policy")),
        _memory(described),
        _role(described.get("role")),
        _persistence(described),
        _fsync(described),
        _replication(described),
        _durability(described, durability),
    ]


def combine(per_primary: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Join the findings of all primaries: the worst of each name, and how many have it."""
    by_name: dict[str, list[Finding]] = {}
    for found in per_primary:
        for one in found:
            by_name.setdefault(one.name, []).append(one)
    joined = []
    for same in by_name.values():
        worst = max(same, key=lambda one: RANKS[one.severity])
        as_bad = sum(one.severity is worst.severity for one in same)
        if as_bad < len(per_primary) and worst.severity is not Severity.FINE:
            worst = worst._replace(
                meaning=f"{worst.meaning} (on {as_bad} of {len(per_primary)} primaries)"
            )
        joined.append(worst)
    return joined


def assess_writes(write_error: str) -> Finding:
    """Return what the first word of an error reply to a write means; empty for no error."""
    if not write_error:
        return Finding("writes", Severity.FINE, (Promise.DURABLE,), "Redis takes writes")
    why = _WRITE_ERRORS.get(write_error, "its own log may say why")
    return Finding(
        "writes",
        Severity.FATAL,
        (Promise.DURABLE,),
        f"Redis answers {write_error} to every write, so every event gets 503: {why}",
    )


def unreachable_primary(reason: str) -> Finding:
    """Return what it means that one primary of a Cluster does not answer, while others do."""
    return Finding(
        "writes",
        Severity.FATAL,
        (Promise.DURABLE,),
        f"a primary is silent ({reason}): events of its sessions get 503 until another takes over",
    )


def _clock(skew_s: float) -> Finding:
    promises = (Promise.AUTHENTIC, Promise.ONCE)
    if abs(skew_s) <= CLOCK_WARNING_S:
        return Finding("clock", Severity.FINE, promises, "our clock and Redis's agree")
    if abs(skew_s) <= MAX_CLOCK_DIFFERENCE_S:
        return Finding(
            "clock",
            Severity.WARNING,
            promises,
            "our clock and Redis's differ by more than 30 s: genuine signatures may be refused",
        )
    return Finding(
        "clock",
        Severity.FATAL,
        promises,
        f"our clock and Redis's differ by more than {MAX_CLOCK_DIFFERENCE_S} s: one of them is "
        "wrong, and no event is admitted",
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
        "older than Redis 7.0: it does not run our scripts",
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
        "maxmemory-policy is not noeviction: a full Redis would forget events and transitions in "
        "silence, so every event gets 503",
    )


def _memory(described: Mapping[str, Any]) -> Finding:
    """Return a warning before Redis is full; where no limit is set, before the machine is."""
    name, promises = "memory", (Promise.DURABLE, Promise.ALONE)
    limit = described.get("maxmemory") or described.get("total_system_memory") or 0
    if not limit or described.get("used_memory", 0) <= MAX_MEMORY_USED * limit:
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
    return Finding(name, Severity.FINE, _MEMORY, "what is on disk outlives a restart of Redis")


def _fsync(described: Mapping[str, Any]) -> Finding:
    name = "fsync"
    if not described.get("aof_enabled"):
        return Finding(name, Severity.FINE, _MEMORY, "does not matter while appendonly is off")
    obstacle = _fsync_obstacle(described)
    if not obstacle:
        return Finding(name, Severity.FINE, _MEMORY, "what is acknowledged is on disk")
    cause = f"{obstacle}:"
    if described.get("appendfsync") is None:
        cause = f"appendfsync cannot be read, {_NOT_PERMITTED}: unless it is always,"
    return Finding(
        name,
        Severity.WARNING,
        _MEMORY,
        f"{cause} when Redis is killed or loses power, the last seconds of what was acknowledged "
        "may be lost, the more the slower its disk",
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
    if len({*described.get("replica-priorities", ())} - {0}) > 1:
        return Finding(
            name,
            Severity.WARNING,
            _MEMORY,
            "replicas differ in replica-priority: Sentinel may promote one that was cut off and "
            "lacks what was acknowledged since; give all the same, or 0 to those it must leave",
        )
    least = described.get("min-replicas-to-write")
    if least is None or int(least) > 0:
        unknown = (
            f"; min-replicas-to-write cannot be read, {_NOT_PERMITTED}" if least is None else ""
        )
        return Finding(name, Severity.FINE, _MEMORY, f"a replica follows{unknown}")
    return Finding(
        name,
        Severity.WARNING,
        _MEMORY,
        "min-replicas-to-write is 0: a primary cut off from its replicas goes on acknowledging "
        "what is lost when one of them takes over",
    )


def _durability(described: Mapping[str, Any], wanted: Durability) -> Finding:
    """Return whether what DURABILITY asks for can hold at all."""
    problem = ""
    if wanted is Durability.FSYNC and (obstacle := _fsync_obstacle(described)):
        problem = f"=fsync, but {obstacle}"
    elif wanted is Durability.REPLICA and not described.get("connected_slaves"):
        problem = "=replica, but no replica is connected"
    meaning = f"DURABILITY{problem}: every event gets 503" if problem else ""
    severity = Severity.FATAL if problem else Severity.FINE
    return Finding(
        "durability", severity, (Promise.DURABLE,), meaning or f"DURABILITY={wanted} holds"
    )


def _fsync_obstacle(described: Mapping[str, Any]) -> str:
    """Return why a reply does not mean that the write is on disk; empty where it does."""
    if not described.get("aof_enabled"):
        return "appendonly is not yes"
    for name, value in (("appendfsync", "always"), ("no-appendfsync-on-rewrite", "no")):
        if described.get(name) is None:
            return f"{name} cannot be read, {_NOT_PERMITTED}"
        if described[name] != value:
            return f"{name} is not {value}"
    return ""
