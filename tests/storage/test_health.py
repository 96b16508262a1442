"""Health: Redis's state is read, and decides whether a load balancer should send traffic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import NoPermissionError
from structlog.testing import capture_logs

from service import cancellation
from service.config import Durability, Settings
from service.errors import ConfigError, UnavailableReason
from service.findings import Severity
from service.secret import Secret
from service.storage import health
from service.storage.connections import Connections, connect
from service.storage.health import Health, inspect, probe
from service.storage.keys import Keys
from service.storage.layout import claim, is_claimed
from service.storage.redis_errors import unavailable_reason
from tests.support.proxy import proxy_to
from tests.support.servers import Server, server
from tests.support.troubles import (
    changed_config,
    cut_off,
    demoted,
    full,
    lacking_replicas,
    unable_to_save,
)
from tests.support.waiting import until, wait_until

NAMES = [
    *("clock", "version", "writes", "eviction", "memory", "role"),
    *("persistence", "fsync", "replication", "durability"),
]
FINE, WARNING, FATAL = Severity.FINE, Severity.WARNING, Severity.FATAL


@pytest.mark.parametrize(
    ("options", "wanted", "expected"),
    [
        ({}, Durability.NONE, {}),
        ({"appendonly": "no"}, Durability.NONE, {"persistence": WARNING, "fsync": FINE}),
        ({"maxmemory_policy": "volatile-lru"}, Durability.NONE, {"eviction": FATAL}),
        ({"appendfsync": "always"}, Durability.FSYNC, {"fsync": FINE}),
        (
            {"appendfsync": "always", "no_appendfsync_on_rewrite": "yes"},
            Durability.FSYNC,
            {"durability": FATAL},
        ),
        ({}, Durability.REPLICA, {"durability": FATAL}),
    ],
)
async def test_the_state_of_a_real_server_is_read(
    connections: Connections,
    make_settings: Callable[..., Settings],
    options: dict[str, str],
    wanted: Durability,
    expected: dict[str, Severity],
) -> None:
    """Everything that could lose acknowledged events is a finding, and nothing else."""
    async with changed_config(connections, **options):
        findings = await inspect(connections, make_settings(durability=wanted))

    assert [one.name for one in findings] == NAMES
    usual = dict.fromkeys(NAMES, FINE) | {"fsync": WARNING, "replication": WARNING}
    assert {one.name: one.severity for one in findings} == usual | expected
    assert all(one.meaning for one in findings)


async def test_settings_that_may_not_be_read_do_not_hold(
    connections: Connections, make_settings: Callable[..., Settings]
) -> None:
    """Without permission for CONFIG the findings say so, and DURABILITY=fsync does not hold."""
    await connections.client.execute_command(
        *("ACL", "SETUSER", "limited", "on", ">pass", "~*", "+@all", "-config")
    )
    limited = make_settings().redis_url.reveal() + "?username=limited&password=pass"
    try:
        async with (
            connect(Secret(limited)) as few,
            changed_config(connections, appendfsync="always"),
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
            await cancellation.cancel_and_wait(task)


class TestReadiness:
    """When a load balancer should send traffic here."""

    async def test_readiness_follows_redis(self, watched: tuple[Health, Any, Any]) -> None:
        """It is ready exactly while Redis answers; each change is logged once."""
        one, proxy, lines = watched
        for _ in range(2):
            await until(lambda: one.is_ready)
            proxy.refusing = True
            proxy.cut()
            await until(lambda: not one.is_ready)
            proxy.refusing = False
        await until(lambda: one.is_ready)

        words = [line["event"] for line in lines if line["event"] != "redis.finding"]
        assert words == ["redis.recovered", "redis.lost"] * 2 + ["redis.recovered"]
        lost = [line for line in lines if line["event"] == "redis.lost"]
        assert {line["reason"] for line in lost} == {UnavailableReason.REDIS_UNREACHABLE}
        assert {line["server"] for line in lost} == {f"127.0.0.1:{proxy.port}"}

    async def test_a_draining_process_is_not_ready(self, watched: tuple[Health, Any, Any]) -> None:
        """A process that is about to stop is not ready, whatever the state of Redis."""
        one, _, _ = watched
        await until(lambda: one.is_ready)
        one.is_draining = True
        assert not one.is_ready

    async def test_a_wrong_clock_makes_it_unready(
        self, watched: tuple[Health, Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While no event would be admitted it is not ready; with the right time it is again."""
        one, _, lines = watched
        await until(lambda: one.is_ready)
        own = time.time
        with monkeypatch.context() as patched:
            patched.setattr("service.storage.health.time.time", lambda: own() - 302)
            await until(lambda: not one.is_ready)
            assert one.reason == "clocks_differ"
        health.INSPECT_EVERY_S = 60.0
        await until(lambda: one.is_ready)
        severities = [line["severity"] for line in lines if line.get("finding") == "clock"]
        # An inspection during which the clock was set right measures half of the difference.
        assert severities in ([FATAL], [FATAL, WARNING])

    async def test_another_layout_makes_it_unready(
        self, watched: tuple[Health, Any, Any], connections: Connections, keys: Keys
    ) -> None:
        """While no event would be admitted it is not ready; the reason is logged once."""
        one, _, lines = watched
        await until(lambda: one.is_ready)
        await claim(connections, keys)
        await connections.client.hset(keys.layout, "partitions", 16)
        await until(lambda: not one.is_ready)
        assert one.reason == "layout_differs"
        await connections.client.delete(keys.layout)
        await until(lambda: one.is_ready)
        [meaning] = [line["meaning"] for line in lines if line["event"] == "layout.differs"]
        assert meaning == "PARTITIONS is 8, but the layout in Redis was made for 16"

    async def test_a_fatal_finding_may_leave_it_ready(
        self, watched: tuple[Health, Any, Any], connections: Connections
    ) -> None:
        """An evicting policy is fatal, and events get 503 for it; the process stays ready."""
        one, _, lines = watched
        await until(lambda: one.is_ready)
        async with changed_config(connections, maxmemory_policy="allkeys-lru"):
            await until(lambda: any(line.get("finding") == "eviction" for line in lines))
            assert one.is_ready
        health.INSPECT_EVERY_S = 60.0
        await until(lambda: not any(each.severity is FATAL for each in one._findings))

    async def test_a_finding_is_logged_once(self, watched: tuple[Health, Any, Any]) -> None:
        """However often Redis is inspected, an unchanged finding is not logged again."""
        one, _, lines = watched
        await until(lambda: one.is_ready)
        client = one._connections.client
        seen = (await client.info("commandstats"))["cmdstat_config|get"]["calls"]

        async def inspected_often() -> bool:
            stats = await client.info("commandstats")
            return bool(stats["cmdstat_config|get"]["calls"] >= seen + 5)

        await until(inspected_often)
        logged = [line["finding"] for line in lines if line["event"] == "redis.finding"]
        assert logged == ["fsync", "replication"]


@contextmanager
def running_a_script(server: Server) -> Iterator[None]:
    """Run a script that does not end."""
    with ThreadPoolExecutor(1) as threads, server.client() as client, server.client() as other:
        client.config_set("busy-reply-threshold", "10")
        running = threads.submit(other.eval, "while true do end", 0)
        wait_until(lambda: _is_busy(client))
        yield
        client.script_kill()
        assert running.exception()


def _is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


@pytest.mark.parametrize(
    ("trouble", "word"),
    [
        (unable_to_save, "MISCONF"),
        (running_a_script, "BUSY"),
        (full, "OOM"),
        (lacking_replicas, "NOREPLICAS"),
        (demoted, "READONLY"),
        (cut_off, "READONLY"),
    ],
)
async def test_a_redis_that_takes_no_writes_leaves_it_ready(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_settings: Callable[..., Settings],
    trouble: Callable[[Server], AbstractContextManager[None]],
    word: str,
) -> None:
    """An error reply is an answer: its word is a finding, and a starting process is ready."""
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.01)
    with server(tmp_path) as started, capture_logs() as lines:

        def meanings() -> list[str]:
            return [line["meaning"] for line in lines if line.get("finding") == "writes"]

        settings = make_settings(redis_url=Secret(started.url))
        async with connect(settings.redis_url) as connections:
            one = Health(connections, settings)
            watching = asyncio.create_task(one.watch())
            await until(lambda: one.is_ready)
            assert await probe(connections) == ""
            with trouble(started):
                await until(lambda: bool(meanings()))
                assert f"Redis answers {word} to every write" in meanings()[0]
                assert one.is_ready
                assert await probe(connections) == word
            await until(lambda: not any(each.severity is FATAL for each in one._findings))
            await cancellation.cancel_and_wait(watching)
    assert not [line for line in lines if line["event"] == "redis.lost"]


async def test_a_redis_that_does_not_accept_our_user_is_no_answer(redis_url: str) -> None:
    """A user without rights, or a wrong password, counts as no answer."""
    async with connect(Secret(redis_url)) as connections:
        await connections.client.execute_command(
            "ACL", "SETUSER", "limited", "on", ">pass", "+ping"
        )
        try:
            for user in ("limited:pass", "limited:wrong"):
                url = redis_url.replace("://", f"://{user}@")
                async with connect(Secret(url)) as limited:
                    with pytest.raises(redis.RedisError) as refused:
                        await probe(limited)
                    assert unavailable_reason(refused.value) is UnavailableReason.REDIS_UNAUTHORIZED
        finally:
            await connections.client.execute_command("ACL", "DELUSER", "limited")


class TestStart:
    """A process waits for Redis as long as it takes, and stops only where waiting is of no use."""

    async def test_it_is_usable_when_redis_answers(self, watched: tuple[Health, Any, Any]) -> None:
        """That Redis is away is logged at once and once; when it answers, the layout is claimed."""
        one, proxy, lines = watched
        proxy.refusing = True
        proxy.cut()
        await until(lambda: any(line["event"] == "redis.lost" for line in lines))
        assert (one.reason, one.usable.is_set()) == ("redis_unreachable", False)
        proxy.refusing = False
        await until(one.usable.is_set)
        await until(lambda: one.is_ready)
        assert await is_claimed(one._connections, one._keys)
        assert len([line for line in lines if line["event"] == "redis.lost"]) == 1

    async def test_a_server_too_old_ends_it(
        self,
        connections: Connections,
        make_settings: Callable[..., Settings],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The error says which version is needed, and nothing is written."""

        async def described(*_: Any) -> Mapping[str, Any]:
            return {"redis_version": "6.2.14"}

        monkeypatch.setattr(health, "_described", described)
        with pytest.raises(ConfigError, match=r"^Redis is older than Redis 7\.0"):
            await Health(connections, make_settings(redis_prefix="old")).watch()
        assert await connections.client.keys("old:*") == []

    async def test_another_layout_ends_it(
        self, connections: Connections, settings: Settings, keys: Keys
    ) -> None:
        """Two numbers of partitions on one server would admit each event twice."""
        await claim(connections, keys)
        await connections.client.hset(keys.layout, "partitions", 16)
        with pytest.raises(ConfigError, match="made for 16"):
            await Health(connections, settings).watch()

    async def test_a_server_that_takes_no_writes_is_usable(
        self, connections: Connections, settings: Settings, keys: Keys
    ) -> None:
        """Where the layout has been claimed, a start writes nothing."""
        await claim(connections, keys)
        async with changed_config(connections, min_replicas_to_write="1"):
            one = Health(connections, settings)
            watching = asyncio.create_task(one.watch())
            await until(one.usable.is_set)
            await until(lambda: one.is_ready)
            await cancellation.cancel_and_wait(watching)
