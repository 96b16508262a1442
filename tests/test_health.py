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

from service import health
from service.config import Durability, Settings
from service.connections import Connections, connect
from service.errors import Shortage, Unavailable
from service.health import Health, Severity, await_redis, inspect
from service.secret import Secret

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
            ({}, Durability.NONE, {"persistence": WARNING}),
            ({"appendfsync": "always"}, Durability.NONE, {}),
            ({"appendonly": "no"}, Durability.NONE, {"persistence": WARNING}),
            ({"maxmemory_policy": "volatile-lru"}, Durability.NONE, {"eviction": FATAL}),
            ({"maxmemory_policy": "allkeys-lru"}, Durability.NONE, {"eviction": FATAL}),
            ({"appendfsync": "always"}, Durability.FSYNC, {}),
            ({}, Durability.FSYNC, {"durability": FATAL}),
            ({"appendfsync": "no"}, Durability.FSYNC, {"durability": FATAL}),
            (
                {"appendonly": "no", "appendfsync": "always"},
                Durability.FSYNC,
                {"durability": FATAL},
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

        names = ["clock", "eviction", "role", "persistence", "durability"]
        assert [one.name for one in findings] == names
        severities = {one.name: one.severity for one in findings}
        always = options.get("appendfsync") == "always" and "appendonly" not in options
        usual = {"persistence": FINE if always else WARNING}
        assert severities == dict.fromkeys(severities, FINE) | usual | expected
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
                    *_, persistence, durability = await inspect(
                        few, make_settings(durability=wanted)
                    )
                    assert persistence.severity is WARNING
                    assert "cannot be read" in persistence.meaning
                    assert durability.severity is severity
        finally:
            await connections.client.execute_command("ACL", "DELUSER", "limited")

    def test_a_replica_is_no_place_to_write(self) -> None:
        """What is admitted must be written, so a replica keeps us out of service."""
        assert health._role("slave").severity is FATAL
        assert health._role("master").severity is FINE

    def test_a_connected_replica_satisfies_replica(self) -> None:
        """DURABILITY=replica can hold where a replica is connected, and nowhere else."""
        for connected, severity in ((1, FINE), (0, FATAL)):
            described = {"connected_slaves": connected, "aof_enabled": 0, "appendfsync": None}
            assert health._durability(described, Durability.REPLICA).severity is severity

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
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


class TestReadiness:
    """When a load balancer should send traffic here."""

    def test_before_the_first_answer_it_is_not(self, settings: Settings) -> None:
        """Nobody is ready before Redis has answered once."""
        assert not Health(Connections(None, None, is_cluster=False), settings).ready

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
        assert [line["finding"] for line in lines if line["event"] == "redis.finding"] == [
            "persistence"
        ]


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
