"""What the state of a Redis server means for the promises, as findings. Pure: it asks nothing.

`health` reads the state; `check` shows the findings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..config import MAX_CLOCK_DIFFERENCE_S, Durability
from ..findings import RANKS, Finding, Promise, Severity

CLOCK_WARNING_S = 30.0
MAX_MEMORY_USED = 0.8
OLDEST_VERSION = 7


class _State(NamedTuple):
    """What is known of one primary; see `assess`."""

    described: Mapping[str, Any]
    skew_s: float
    durability: Durability
    write_error: str


_Judgement = tuple[Severity, str]

FINE, WARNING, FATAL = Severity
_NOT_PERMITTED = "CONFIG GET is not permitted"
# The cause of each error reply to a write. Until it is removed, workers wait too.
_WRITE_ERRORS = {
    "OOM": "it has reached maxmemory; workers go on and make room",
    "MISCONF": "its last snapshot, or write to the append-only file, failed: look at its disk",
    "NOREPLICAS": "fewer replicas follow than min-replicas-to-write asks for",
    "READONLY": "it is a replica: REDIS_URL must lead to its primary",
    "MASTERDOWN": "it is a replica that has lost its primary: REDIS_URL must lead to a primary",
    "ERR": "REDIS_URL may name a database that it does not have",
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
    state = _State(described, skew_s, durability, write_error)
    version = _finding("version", _version(state))
    if version.severity is FATAL:
        return [version]
    return [_finding(name, rule(state)) for name, (_, rule) in _RULES.items()]


def assess_writes(write_error: str) -> Finding:
    """Return what the first word of an error reply to a write means; empty for no error."""
    return _finding("writes", _writes(_State({}, 0.0, Durability.NONE, write_error)))


def unreachable_primary(reason: str) -> Finding:
    """Return what it means that one primary of a Cluster does not answer, while others do."""
    meaning = (
        f"a primary is silent ({reason}): events of its sessions get 503 until another takes over"
    )
    return _finding("writes", (FATAL, meaning))


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
        if as_bad < len(per_primary) and worst.severity is not FINE:
            worst = worst._replace(
                meaning=f"{worst.meaning} (on {as_bad} of {len(per_primary)} primaries)"
            )
        joined.append(worst)
    return joined


def _finding(name: str, verdict: _Judgement) -> Finding:
    (severity, meaning), (promises, _) = verdict, _RULES[name]
    return Finding(name, severity, promises, meaning)


def _clock(state: _State) -> _Judgement:
    skew_s = abs(state.skew_s)
    if skew_s <= CLOCK_WARNING_S:
        return FINE, "our clock and Redis's agree"
    if skew_s <= MAX_CLOCK_DIFFERENCE_S:
        return WARNING, (
            "our clock and Redis's differ by more than 30 s: genuine signatures may be refused"
        )
    return FATAL, (
        f"our clock and Redis's differ by more than {MAX_CLOCK_DIFFERENCE_S} s: one of them is "
        "wrong, and no event is admitted"
    )


def _version(state: _State) -> _Judgement:
    # Valkey calls itself Redis 7.2.4 as well.
    version = str(state.described.get("redis_version", OLDEST_VERSION))
    if int(version.partition(".")[0]) >= OLDEST_VERSION:
        return FINE, "our scripts run on it"
    return FATAL, "older than Redis 7.0: it does not run our scripts"


def _writes(state: _State) -> _Judgement:
    word = state.write_error
    if not word:
        return FINE, "Redis takes writes"
    cause = _WRITE_ERRORS.get(word, "its own log may say why")
    return FATAL, f"Redis answers {word} to every write, so every event gets 503: {cause}"


def _eviction(state: _State) -> _Judgement:
    policy = state.described.get("maxmemory_policy")
    if policy in ("noeviction", None):
        return FINE, "a full Redis refuses writes and forgets nothing"
    return FATAL, (
        "maxmemory-policy is not noeviction: a full Redis would forget events and transitions in "
        "silence, so every event gets 503"
    )


def _memory(state: _State) -> _Judgement:
    """Warn before Redis is full; where no limit is set, before the machine is."""
    limit = state.described.get("maxmemory") or state.described.get("total_system_memory") or 0
    if not limit or state.described.get("used_memory", 0) <= MAX_MEMORY_USED * limit:
        return FINE, "there is room"
    what, then = "maxmemory", "Stripe gets 503 and nothing is lost"
    if not state.described.get("maxmemory"):
        what, then = "the machine's memory, and no maxmemory is set", "the system may end Redis"
    return WARNING, f"more than 80 % of {what} is used: once full, {then}"


def _role(state: _State) -> _Judgement:
    if state.described.get("role") != "slave":
        return FINE, "this Redis takes writes"
    return FATAL, "this Redis is a replica and takes no writes: REDIS_URL must lead to its primary"


def _persistence(state: _State) -> _Judgement:
    if not state.described.get("aof_enabled"):
        return WARNING, (
            "appendonly is off: a restart of Redis loses what was acknowledged since its last "
            "snapshot"
        )
    for field, failed, then in (
        ("aof_last_write_status", "write to the append-only file", "Redis refuses further writes"),
        ("aof_last_bgrewrite_status", "rewrite of the append-only file", "it grows without end"),
        ("rdb_last_bgsave_status", "snapshot", "Redis refuses writes while it stays so"),
    ):
        if state.described.get(field, "ok") != "ok":
            return WARNING, f"the last {failed} failed, the disk may be full: {then}"
    return FINE, "what is on disk outlives a restart of Redis"


def _fsync(state: _State) -> _Judgement:
    if not state.described.get("aof_enabled"):
        return FINE, "does not matter while appendonly is off"
    obstacle = _fsync_obstacle(state.described)
    if not obstacle:
        return FINE, "what is acknowledged is on disk"
    cause = f"{obstacle}:"
    if state.described.get("appendfsync") is None:
        cause = f"appendfsync cannot be read, {_NOT_PERMITTED}: unless it is always,"
    return WARNING, (
        f"{cause} when Redis is killed or loses power, the last seconds of what was acknowledged "
        "may be lost, the more the slower its disk"
    )


def _replication(state: _State) -> _Judgement:
    if not state.described.get("connected_slaves"):
        return WARNING, "no replica is connected: what is lost with this Redis and its disk is lost"
    if len({*state.described.get("replica-priorities", ())} - {0}) > 1:
        return WARNING, (
            "replicas differ in replica-priority: Sentinel may promote one that was cut off and "
            "lacks what was acknowledged since; give all the same, or 0 to those it must leave"
        )
    least = state.described.get("min-replicas-to-write")
    if least is None:
        return FINE, (f"a replica follows; min-replicas-to-write cannot be read, {_NOT_PERMITTED}")
    if int(least) > 0:
        return FINE, "a replica follows"
    return WARNING, (
        "min-replicas-to-write is 0: a primary cut off from its replicas goes on acknowledging "
        "what is lost when one of them takes over"
    )


def _durability(state: _State) -> _Judgement:
    """Decide whether what DURABILITY asks for can hold at all."""
    wanted, problem = state.durability, ""
    if wanted is Durability.FSYNC and (obstacle := _fsync_obstacle(state.described)):
        problem = f"=fsync, but {obstacle}"
    elif wanted is Durability.REPLICA and not state.described.get("connected_slaves"):
        problem = "=replica, but no replica is connected"
    if problem:
        return FATAL, f"DURABILITY{problem}: every event gets 503"
    return FINE, f"DURABILITY={wanted} holds"


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


# The promises that a loss of data breaks: forgotten events are taken for new ones, and transitions
# that waited for a handler are gone.
_KEPT = (Promise.DURABLE, Promise.ONCE, Promise.FORWARD_ONLY)
# Each finding's name, the promises that it touches, and its rule.
_RULES: dict[str, tuple[Sequence[Promise], Callable[[_State], _Judgement]]] = {
    "clock": ((Promise.AUTHENTIC, Promise.ONCE), _clock),
    "version": ((Promise.DURABLE,), _version),
    "writes": ((Promise.DURABLE,), _writes),
    "eviction": ((*_KEPT, Promise.ALONE), _eviction),
    "memory": ((Promise.DURABLE, Promise.ALONE), _memory),
    "role": ((Promise.DURABLE,), _role),
    "persistence": (_KEPT, _persistence),
    "fsync": (_KEPT, _fsync),
    "replication": (_KEPT, _replication),
    "durability": ((Promise.DURABLE,), _durability),
}
