"""Laws of readiness: what Redis's configuration means, and when traffic may come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from proxy import proxy_to
from redis.exceptions import NoPermissionError
from servers import PATIENCE_S, until
from structlog.testing import capture_logs

from service import health, tasks
from service.config import Durability, Settings
from service.connections import Connections, connect
from service.errors import Shortage, Unavailable
from service.findings import Finding, Promise, Severity, judge, together
from service.health import Health, await_redis, inspect
from service.secret import Secret

NAMES = [
    *("clock", "version", "eviction", "memory", "role"),
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
    "aof_last_write_status": "ok",
    "role": "master",
    "connected_slaves": 1,
    "min-replicas-to-write": "1",
}
FINE, WARNING, FATAL = Severity.FINE, Severity.WARNING, Severity.FATAL


@asynccontextmanager
async def configured(connections: Connections, **options: str) -> AsyncIterator[None]:
    """Change the server's configuration for the length of the block."""
    names = [name.replace("_", "-") for name in options]
    before = {name: (await connections.client.config_get(name))[name] for name in names}
    for name, value in zip(names, options.values(), strict=True):
        await connections.client.config_set(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            await connections.client.config_set(name, value)


class TestFindings:
    """One finding for each promise, whatever the configuration."""

    @pytest.mark.parametrize(
        ("options", "wanted", "expected"),
        [
            ({}, Durability.NONE, {}),
            ({"appendfsync": "always"}, Durability.NONE, {"fsync": FINE}),
            (
                {"appendonly": "no"},
                Durability.NONE,
                {"persistence": WARNING, "fsync": FINE},
            ),
            ({"maxmemory_policy": "volatile-lru"}, Durability.NONE, {"eviction": FATAL}),
            ({"maxmemory_policy": "allkeys-lru"}, Durability.NONE, {"eviction": FATAL}),
            ({"appendfsync": "always"}, Durability.FSYNC, {"fsync": FINE}),
            ({}, Durability.FSYNC, {"durability": FATAL}),
            ({"appendfsync": "no"}, Durability.FSYNC, {"durability": FATAL}),
            (
                {"appendonly": "no", "appendfsync": "always"},
                Durability.FSYNC,
                {"durability": FATAL, "persistence": WARNING, "fsync": FINE},
            ),
            ({}, Durability.REPLICA, {"durability": FATAL}),
        ],
    )
    async def test_each_configuration_is_judged(
        self,
        connections: Connections,
        make_settings: Callable[..., Settings],
        options: dict[str, str],
        wanted: Durability,
        expected: dict[str, Severity],
    ) -> None:
        """Everything that could lose what was acknowledged is said, and nothing else."""
        async with configured(connections, **options):
            findings = await inspect(connections, make_settings(durability=wanted))

        assert [one.name for one in findings] == NAMES
        usual = dict.fromkeys(NAMES, FINE) | {"fsync": WARNING, "replication": WARNING}
        assert {one.name: one.severity for one in findings} == usual | expected
        assert all(one.meaning for one in findings)

    async def test_what_may_not_be_asked_is_said(
        self, connections: Connections, make_settings: Callable[..., Settings]
    ) -> None:
        """Where CONFIG is not permitted we say that we do not know, and promise no fsync."""
        await connections.client.execute_command(
            *("ACL", "SETUSER", "limited", "on", ">pass", "~*", "+@all", "-config")
        )
        limited = make_settings().redis_url.reveal() + "?username=limited&password=pass"
        try:
            async with (
                connect(Secret(limited)) as few,
                configured(connections, appendfsync="always"),
            ):
                with pytest.raises(NoPermissionError):
                    await few.client.config_get("appendfsync")
                for wanted, severity in ((Durability.NONE, FINE), (Durability.FSYNC, FATAL)):
                    *_, fsync, _, durability = await inspect(few, make_settings(durability=wanted))
                    assert fsync.severity is WARNING
                    assert "cannot be read" in fsync.meaning
                    assert durability.severity is severity
        finally:
            await connections.client.execute_command("ACL", "DELUSER", "limited")

    @pytest.mark.parametrize(
        ("told", "name", "severity", "words"),
        [
            ({}, "persistence", FINE, "loses nothing"),
            ({"aof_last_write_status": "err"}, "persistence", WARNING, "write to the append-only"),
            ({"aof_last_bgrewrite_status": "err"}, "persistence", WARNING, "grows without end"),
            ({"rdb_last_bgsave_status": "err"}, "persistence", WARNING, "snapshot failed"),
            ({"redis_version": "6.2.14"}, "version", FATAL, "older than Redis 7.0"),
            ({"redis_version": "7.2.4"}, "version", FINE, "run"),
            ({"redis_version": "10.0.1"}, "version", FINE, "run"),
            ({"maxmemory": 100, "used_memory": 81}, "memory", WARNING, "Stripe gets 503"),
            ({"maxmemory": 100, "used_memory": 79}, "memory", FINE, "room"),
            ({"total_system_memory": 100, "used_memory": 81}, "memory", WARNING, "end Redis"),
            ({"role": "slave"}, "role", FATAL, "takes no writes"),
            ({"connected_slaves": 0}, "replication", WARNING, "no replica"),
            ({"min-replicas-to-write": "0"}, "replication", WARNING, "goes on acknowledging"),
            ({"min-replicas-to-write": "1"}, "replication", FINE, "follows"),
            ({"min-replicas-to-write": None}, "replication", FINE, "cannot be read"),
        ],
    )
    def test_what_redis_tells_is_judged(
        self, told: dict[str, Any], name: str, severity: Severity, words: str
    ) -> None:
        """What a disk, a full memory, an old server or a lone primary means is said in words."""
        findings = judge(HEALTHY | told, skew_s=0, durability=Durability.NONE)
        [found] = [one for one in findings if one.name == name]
        assert found.severity is severity
        assert words in found.meaning
        assert found.promises
        others = [one for one in findings if one.name != name]
        assert {one.severity for one in others} == {FINE}

    def test_a_connected_replica_satisfies_replica(self) -> None:
        """DURABILITY=replica can hold where a replica is connected, and nowhere else."""
        for connected, severity in ((1, FINE), (0, FATAL)):
            described = HEALTHY | {"connected_slaves": connected}
            *_, found = judge(described, skew_s=0, durability=Durability.REPLICA)
            assert found.severity is severity

    def test_of_several_primaries_the_worst_is_told(self) -> None:
        """In Cluster each primary counts: one that evicts breaks the promise for its sessions."""

        def judged(**told: Any) -> list[Finding]:
            return judge(HEALTHY | told, skew_s=0, durability=Durability.NONE)

        findings = together([judged(), judged(maxmemory_policy="allkeys-lru"), judged()])
        [eviction] = [one for one in findings if one.name == "eviction"]
        assert [one.name for one in findings] == NAMES
        assert eviction.severity is FATAL
        assert eviction.meaning.endswith("(on 1 of 3 primaries)")
        assert Promise.ONCE in eviction.promises
        assert together([judged()] * 3) == judged()

    @pytest.mark.parametrize(
        ("ahead_s", "severity"), [(0, FINE), (29, FINE), (32, FATAL), (-31, FATAL)]
    )
    async def test_a_wrong_clock_is_fatal(
        self,
        connections: Connections,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        ahead_s: float,
        severity: Severity,
    ) -> None:
        """More than 30 s between our clock and Redis's, either way, keeps us out of service."""
        seconds, microseconds = await connections.client.time()
        monkeypatch.setattr("service.health.time.time", lambda: seconds + ahead_s)

        async def stopped() -> tuple[int, int]:
            return seconds, microseconds

        monkeypatch.setattr(connections.client, "time", stopped)
        clock, *_ = await inspect(connections, settings)
        assert clock.severity is severity


@pytest.fixture
async def watched(
    redis_url: str, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Health, Any, Any]]:
    """Yield a watching `Health` behind a proxy, the proxy, and the log lines so far."""
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.01)
    monkeypatch.setattr(health, "INSPECT_EVERY_S", 0.02)
    with capture_logs() as lines:
        async with proxy_to(redis_url) as proxy, connect(Secret(proxy.url)) as connections:
            one = Health(connections, make_settings(redis_url=Secret(proxy.url)))
            task = asyncio.create_task(one.watch())
            yield one, proxy, lines
            await tasks.end(task)


class TestReadiness:
    """When a load balancer should send traffic here."""

    def test_before_the_first_answer_it_is_not(self, settings: Settings) -> None:
        """Nobody is ready before Redis has answered once."""
        assert not Health(Connections(None, None, is_cluster=True), settings).ready

    async def test_it_goes_with_redis_and_comes_back(
        self, watched: tuple[Health, Any, Any]
    ) -> None:
        """Ready while Redis answers, not while it does not, and again without help; said once."""
        one, proxy, lines = watched
        for _ in range(2):
            await until(lambda: one.ready)
            proxy.refusing = True
            proxy.cut()
            await until(lambda: not one.ready)
            proxy.refusing = False
        await until(lambda: one.ready)

        words = [line["event"] for line in lines if line["event"] != "redis.finding"]
        assert words == ["redis.answered", "redis.lost"] * 2 + ["redis.answered"]
        lost = [line for line in lines if line["event"] == "redis.lost"]
        assert {line["reason"] for line in lost} == {Shortage.REDIS_UNREACHABLE}

    async def test_a_draining_process_is_not_ready(self, watched: tuple[Health, Any, Any]) -> None:
        """Whoever is about to leave takes no traffic, however well Redis is."""
        one, _, _ = watched
        await until(lambda: one.ready)
        one.draining = True
        assert not one.ready

    async def test_a_fatal_finding_holds_until_it_is_mended(
        self, watched: tuple[Health, Any, Any], connections: Connections
    ) -> None:
        """An evicting policy turns readiness off, and mending it turns it on again soon."""
        one, _, lines = watched
        await until(lambda: one.ready)
        async with configured(connections, maxmemory_policy="allkeys-lru"):
            await until(lambda: not one.ready)
        health.INSPECT_EVERY_S = 60.0
        await until(lambda: one.ready)
        assert [line["severity"] for line in lines if line.get("finding") == "eviction"] == [FATAL]

    async def test_a_finding_is_logged_once(self, watched: tuple[Health, Any, Any]) -> None:
        """However often Redis is looked at, what has not changed is not said again."""
        one, _, lines = watched
        await until(lambda: one.ready)
        client = one._connections.client
        seen = (await client.info("commandstats"))["cmdstat_config|get"]["calls"]

        async def looked_often() -> bool:
            stats = await client.info("commandstats")
            return bool(stats["cmdstat_config|get"]["calls"] >= seen + 5)

        await until(looked_often)
        said = [line["finding"] for line in lines if line["event"] == "redis.finding"]
        assert said == ["fsync", "replication"]


class TestWaiting:
    """A start waits for Redis, but not for ever."""

    async def test_it_ends_when_redis_answers(self, redis_url: str) -> None:
        """A Redis that comes up in time is no error."""
        async with proxy_to(redis_url) as proxy, connect(Secret(proxy.url)) as connections:
            proxy.refusing = True
            waiting = asyncio.create_task(await_redis(connections, PATIENCE_S))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            proxy.refusing = False
            await waiting

    async def test_it_ends_at_the_deadline(self) -> None:
        """A Redis that does not come up is said in one word."""
        async with connect(Secret("redis://127.0.0.1:1")) as connections:
            with pytest.raises(Unavailable) as refused:
                await await_redis(connections, 0.1)
        assert refused.value.reason is Shortage.REDIS_UNREACHABLE
