"""What each state of Redis means for the promises."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import Durability
from service.findings import Finding, Promise, Severity
from service.storage.assessment import assess, combine, unreachable_primary

NAMES = [
    *("clock", "version", "writes", "eviction", "memory", "role"),
    *("persistence", "fsync", "replication", "durability"),
]
HEALTHY: dict[str, Any] = {
    "redis_version": "7.2.4",
    "maxmemory_policy": "noeviction",
    "maxmemory": 0,
    "total_system_memory": 1000,
    "used_memory": 10,
    "aof_enabled": 1,
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "aof_last_write_status": "ok",
    "role": "master",
    "connected_slaves": 1,
    "min-replicas-to-write": "1",
}
FINE, WARNING, FATAL = Severity.FINE, Severity.WARNING, Severity.FATAL


@pytest.mark.parametrize(
    ("state", "name", "severity", "words"),
    [
        ({}, "persistence", FINE, "outlives a restart"),
        ({"aof_last_write_status": "err"}, "persistence", WARNING, "write to the append-only"),
        ({"aof_last_bgrewrite_status": "err"}, "persistence", WARNING, "grows without end"),
        ({"rdb_last_bgsave_status": "err"}, "persistence", WARNING, "snapshot failed"),
        ({"redis_version": "7.2.4"}, "version", FINE, "run"),
        ({"redis_version": "10.0.1"}, "version", FINE, "run"),
        ({"maxmemory": 100, "used_memory": 81}, "memory", WARNING, "Stripe gets 503"),
        ({"maxmemory": 100, "used_memory": 79}, "memory", FINE, "room"),
        ({"total_system_memory": 100, "used_memory": 81}, "memory", WARNING, "end Redis"),
        ({"role": "slave"}, "role", FATAL, "takes no writes"),
        ({"maxmemory_policy": "volatile-lru"}, "eviction", FATAL, "not noeviction"),
        ({"maxmemory_policy": "allkeys-lru"}, "eviction", FATAL, "not noeviction"),
        ({"connected_slaves": 0}, "replication", WARNING, "no replica"),
        ({"min-replicas-to-write": "0"}, "replication", WARNING, "goes on acknowledging"),
        ({"min-replicas-to-write": "1"}, "replication", FINE, "follows"),
        ({"min-replicas-to-write": None}, "replication", FINE, "cannot be read"),
        ({"replica-priorities": [100, 100, 0]}, "replication", FINE, "follows"),
        ({"replica-priorities": [100, 1]}, "replication", WARNING, "Sentinel may promote"),
        ({"appendfsync": "everysec"}, "fsync", WARNING, "appendfsync is not always"),
        ({"appendfsync": None}, "fsync", WARNING, "unless it is always"),
        ({"no-appendfsync-on-rewrite": "yes"}, "fsync", WARNING, "on-rewrite is not no"),
    ],
)
def test_each_state_has_its_finding(
    state: dict[str, Any], name: str, severity: Severity, words: str
) -> None:
    """A disk, memory, a version, a replica or a setting makes one finding, and no other."""
    findings = assess(HEALTHY | state, skew_s=0, durability=Durability.NONE)
    [found] = [one for one in findings if one.name == name]
    assert found.severity is severity
    assert words in found.meaning
    assert found.promises
    others = [one for one in findings if one.name != name]
    assert {one.severity for one in others} == {FINE}


def test_a_server_that_is_too_old_has_no_other_finding() -> None:
    """Its other errors come from its version."""
    state = HEALTHY | {"redis_version": "6.2.14"}
    [found] = assess(state, skew_s=0, durability=Durability.NONE, write_error="ERR")
    assert (found.name, found.severity) == ("version", FATAL)
    assert "older than Redis 7.0" in found.meaning


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("OOM", "maxmemory"),
        ("MISCONF", "disk"),
        ("BUSY", "SCRIPT KILL"),
        ("ERR", "database"),
        ("NEW", "its own log"),
    ],
)
def test_an_error_reply_to_a_write_is_fatal(error: str, words: str) -> None:
    """The finding has the word of Redis, and its meaning."""
    findings = assess(HEALTHY, skew_s=0, durability=Durability.NONE, write_error=error)
    [found] = [one for one in findings if one.name == "writes"]
    assert found.severity is FATAL
    assert error in found.meaning
    assert words in found.meaning


def test_a_primary_that_does_not_answer_is_a_finding() -> None:
    """The findings of the other primaries stay."""
    fine = assess(HEALTHY, skew_s=0, durability=Durability.NONE)
    findings = combine([fine, [unreachable_primary("redis_slow")]])
    assert [one.name for one in findings] == NAMES
    [found] = [one for one in findings if one.severity is not FINE]
    assert (found.name, found.severity) == ("writes", FATAL)
    assert found.meaning.endswith("(on 1 of 2 primaries)")


@pytest.mark.parametrize(
    ("wanted", "state", "severity"),
    [
        (Durability.NONE, {"appendfsync": "everysec", "connected_slaves": 0}, FINE),
        (Durability.FSYNC, {}, FINE),
        (Durability.FSYNC, {"aof_enabled": 0}, FATAL),
        (Durability.FSYNC, {"appendfsync": "everysec"}, FATAL),
        (Durability.FSYNC, {"appendfsync": "no"}, FATAL),
        (Durability.FSYNC, {"appendfsync": None}, FATAL),
        (Durability.FSYNC, {"no-appendfsync-on-rewrite": "yes"}, FATAL),
        (Durability.REPLICA, {}, FINE),
        (Durability.REPLICA, {"connected_slaves": 0}, FATAL),
    ],
)
def test_durability_that_cannot_hold_is_fatal(
    wanted: Durability, state: dict[str, Any], severity: Severity
) -> None:
    """DURABILITY=fsync needs three settings, DURABILITY=replica a connected replica."""
    *_, found = assess(HEALTHY | state, skew_s=0, durability=wanted)
    assert (found.name, found.severity) == ("durability", severity)


@pytest.mark.parametrize(
    ("ahead_s", "severity"),
    [(0, FINE), (29, FINE), (32, WARNING), (-31, WARNING), (299, WARNING), (302, FATAL)],
)
def test_a_wrong_clock_is_a_finding(ahead_s: float, severity: Severity) -> None:
    """More than 30 s between our clock and Redis's, either way, is a warning; over 300 s fatal."""
    clock, *_ = assess(HEALTHY, skew_s=ahead_s, durability=Durability.NONE)
    assert clock.severity is severity


def test_the_worst_of_several_primaries_counts() -> None:
    """One primary that evicts breaks the promise for its sessions."""

    def assessed(**state: Any) -> list[Finding]:
        return assess(HEALTHY | state, skew_s=0, durability=Durability.NONE)

    findings = combine([assessed(), assessed(maxmemory_policy="allkeys-lru"), assessed()])
    [eviction] = [one for one in findings if one.name == "eviction"]
    assert [one.name for one in findings] == NAMES
    assert eviction.severity is FATAL
    assert eviction.meaning.endswith("(on 1 of 3 primaries)")
    assert Promise.ONCE in eviction.promises
    assert combine([assessed()] * 3) == assessed()
