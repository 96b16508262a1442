"""Laws of readiness: what Redis's configuration means, and when traffic may come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import NoPermissionError
from structlog.testing import capture_logs

from service import cancellation
from service.config import Durability, Settings
from service.errors import ConfigError, UnavailableReason
from service.secret import Secret
from service.storage import health
from service.storage.assessment import (
    Finding,
    Promise,
    Severity,
    assess,
    combine,
    unreachable_primary,
)
from service.storage.connections import Connections, connect
from service.storage.health import Health, inspect, probe
from service.storage.layout import Keys, claim, is_claimed
from service.storage.redis_errors import unavailable_reason
from tests.support.harness import soon
from tests.support.proxy import proxy_to
from tests.support.servers import server, until

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
            (
                {"appendfsync": "always", "no_appendfsync_on_rewrite": "yes"},
                Durability.FSYNC,
                {"durability": FATAL},
            ),
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
    def test_what_redis_tells_is_judged(
        self, told: dict[str, Any], name: str, severity: Severity, words: str
    ) -> None:
        """What a disk, a full memory, an old server or a lone primary means is said in words."""
        findings = assess(HEALTHY | told, skew_s=0, durability=Durability.NONE)
        [found] = [one for one in findings if one.name == name]
        assert found.severity is severity
        assert words in found.meaning
        assert found.promises
        others = [one for one in findings if one.name != name]
        assert {one.severity for one in others} == {FINE}

    def test_of_a_server_that_is_too_old_nothing_else_is_said(self) -> None:
        """What it refuses it refuses because it is old."""
        told = HEALTHY | {"redis_version": "6.2.14"}
        [found] = assess(told, skew_s=0, durability=Durability.NONE, write_error="ERR")
        assert (found.name, found.severity) == ("version", FATAL)
        assert "older than Redis 7.0" in found.meaning

    @pytest.mark.parametrize(
        ("refused", "words"),
        [
            ("OOM", "maxmemory"),
            ("MISCONF", "disk"),
            ("BUSY", "SCRIPT KILL"),
            ("NEW", "its own log"),
        ],
    )
    def test_a_refused_write_is_fatal_with_its_word(self, refused: str, words: str) -> None:
        """What Redis answers to a write is told in its own word, and what that means."""
        findings = assess(HEALTHY, skew_s=0, durability=Durability.NONE, write_error=refused)
        [found] = [one for one in findings if one.name == "writes"]
        assert found.severity is FATAL
        assert refused in found.meaning
        assert words in found.meaning

    def test_a_silent_primary_is_told_beside_what_others_tell(self) -> None:
        """What one primary of a Cluster does not tell is no reason to tell nothing."""
        fine = assess(HEALTHY, skew_s=0, durability=Durability.NONE)
        findings = combine([fine, [unreachable_primary("redis_slow")]])
        assert [one.name for one in findings] == NAMES
        [told] = [one for one in findings if one.severity is not FINE]
        assert (told.name, told.severity) == ("writes", FATAL)
        assert told.meaning.endswith("(on 1 of 2 primaries)")

    def test_a_connected_replica_satisfies_replica(self) -> None:
        """DURABILITY=replica can hold where a replica is connected, and nowhere else."""
        for connected, severity in ((1, FINE), (0, FATAL)):
            described = HEALTHY | {"connected_slaves": connected}
            *_, found = assess(described, skew_s=0, durability=Durability.REPLICA)
            assert found.severity is severity

    def test_of_several_primaries_the_worst_is_told(self) -> None:
        """In Cluster each primary counts: one that evicts breaks the promise for its sessions."""

        def judged(**told: Any) -> list[Finding]:
            return assess(HEALTHY | told, skew_s=0, durability=Durability.NONE)

        findings = combine([judged(), judged(maxmemory_policy="allkeys-lru"), judged()])
        [eviction] = [one for one in findings if one.name == "eviction"]
        assert [one.name for one in findings] == NAMES
        assert eviction.severity is FATAL
        assert eviction.meaning.endswith("(on 1 of 3 primaries)")
        assert Promise.ONCE in eviction.promises
        assert combine([judged()] * 3) == judged()

    @pytest.mark.parametrize(
        ("ahead_s", "severity"),
        [(0, FINE), (29, FINE), (32, WARNING), (-31, WARNING), (299, WARNING), (302, FATAL)],
    )
    async def test_a_wrong_clock_is_told(
        self,
        connections: Connections,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        ahead_s: float,
        severity: Severity,
    ) -> None:
        """More than 30 s between our clock and Redis's, either way, is told; above 300 s fatal."""
        seconds, microseconds = await connections.client.time()
        monkeypatch.setattr("service.storage.health.time.time", lambda: seconds + ahead_s)

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
            await cancellation.cancel_and_wait(task)


class TestReadiness:
    """When a load balancer should send traffic here."""

    async def test_before_the_first_answer_it_is_not(
        self, connections: Connections, settings: Settings
    ) -> None:
        """Nobody is ready before Redis has answered once."""
        assert not Health(connections, settings).ready

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
        assert words == ["redis.recovered", "redis.lost"] * 2 + ["redis.recovered"]
        lost = [line for line in lines if line["event"] == "redis.lost"]
        assert {line["reason"] for line in lost} == {UnavailableReason.REDIS_UNREACHABLE}
        assert {line["address"] for line in lost} == {f"127.0.0.1:{proxy.port}"}

    async def test_a_draining_process_is_not_ready(self, watched: tuple[Health, Any, Any]) -> None:
        """Whoever is about to leave takes no traffic, however well Redis is."""
        one, _, _ = watched
        await until(lambda: one.ready)
        one.draining = True
        assert not one.ready

    async def test_a_wrong_clock_holds_until_it_is_mended(
        self, watched: tuple[Health, Any, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where no event would be admitted, there is no traffic; the right time brings it back."""
        one, _, lines = watched
        await until(lambda: one.ready)
        own = time.time
        with monkeypatch.context() as patched:
            patched.setattr("service.storage.health.time.time", lambda: own() - 302)
            await until(lambda: not one.ready)
            assert one.reason == "clocks_differ"
        health.INSPECT_EVERY_S = 60.0
        await until(lambda: one.ready)
        assert [line["severity"] for line in lines if line.get("finding") == "clock"] == [FATAL]

    async def test_another_layout_holds_until_it_is_ours(
        self, watched: tuple[Health, Any, Any], connections: Connections, keys: Keys
    ) -> None:
        """Where no event would be admitted, there is no traffic; told once."""
        one, _, lines = watched
        await until(lambda: one.ready)
        await claim(connections, keys)
        await connections.client.hset(keys.layout, "partitions", 16)
        await until(lambda: not one.ready)
        assert one.reason == "layout_differs"
        await connections.client.delete(keys.layout)
        await until(lambda: one.ready)
        [told] = [line["meaning"] for line in lines if line["event"] == "layout.differs"]
        assert told == "PARTITIONS is 8, but the layout in Redis was made for 16"

    async def test_what_breaks_a_promise_is_told_and_keeps_us_ready(
        self, watched: tuple[Health, Any, Any], connections: Connections
    ) -> None:
        """An evicting policy is a fatal finding; that events get 503 for it is said elsewhere."""
        one, _, lines = watched
        await until(lambda: one.ready)
        async with configured(connections, maxmemory_policy="allkeys-lru"):
            await until(lambda: any(line.get("finding") == "eviction" for line in lines))
            assert one.ready
        health.INSPECT_EVERY_S = 60.0
        await until(lambda: not any(each.severity is FATAL for each in one._findings))

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


@contextmanager
def unable_to_save(client: redis.Redis) -> Iterator[None]:
    """Let the last snapshot have failed."""
    in_the_way = Path(str(client.config_get("dir")["dir"])) / "dump.rdb"
    in_the_way.mkdir()
    client.config_set("save", "3600 1")
    client.set("key", "value")
    with contextlib.suppress(redis.RedisError):
        client.bgsave()
    soon(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield
    client.config_set("stop-writes-on-bgsave-error", "no")


@contextmanager
def running_a_script(client: redis.Redis) -> Iterator[None]:
    """Let a script run that has not come to its end."""
    client.config_set("busy-reply-threshold", "10")
    with (
        ThreadPoolExecutor(1) as threads,
        redis.Redis(port=client.connection_pool.connection_kwargs["port"]) as other,
    ):
        running = threads.submit(other.eval, "while true do end", 0)
        soon(lambda: _is_busy(client))
        yield
        client.script_kill()
        assert running.exception()


def _is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


@contextmanager
def full(client: redis.Redis) -> Iterator[None]:
    """Let there be no memory left."""
    client.config_set("maxmemory", "1")
    yield
    client.config_set("maxmemory", "0")


@contextmanager
def lonely(client: redis.Redis) -> Iterator[None]:
    """Let there be fewer replicas than it insists on."""
    client.config_set("min-replicas-to-write", "1")
    yield
    client.config_set("min-replicas-to-write", "0")


@contextmanager
def demoted(client: redis.Redis) -> Iterator[None]:
    """Make it a replica, of nobody who answers."""
    client.replicaof("127.0.0.1", 1)
    yield
    client.replicaof("NO", "ONE")


@contextmanager
def cut_off(client: redis.Redis) -> Iterator[None]:
    """The same, where it may not even tell what it knows."""
    client.config_set("replica-serve-stale-data", "no")
    with demoted(client):
        yield


@pytest.mark.parametrize(
    ("trouble", "word"),
    [
        (unable_to_save, "MISCONF"),
        (running_a_script, "BUSY"),
        (full, "OOM"),
        (lonely, "NOREPLICAS"),
        (demoted, "READONLY"),
        (cut_off, "READONLY"),
    ],
)
async def test_a_redis_that_answers_and_takes_nothing_leaves_us_ready(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_settings: Callable[..., Settings],
    trouble: Callable[[redis.Redis], AbstractContextManager[None]],
    word: str,
) -> None:
    """A refusal is an answer: it is told why nothing is taken, and who starts now need not wait."""
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.01)
    with server(tmp_path) as started, started.client() as client, capture_logs() as lines:

        def told() -> list[str]:
            return [line["meaning"] for line in lines if line.get("finding") == "writes"]

        settings = make_settings(redis_url=Secret(started.url))
        async with connect(settings.redis_url) as connections:
            one = Health(connections, settings)
            watching = asyncio.create_task(one.watch())
            await until(lambda: one.ready)
            assert await probe(connections) == ""
            with trouble(client):
                await until(lambda: bool(told()))
                assert f"Redis answers {word} to every write" in told()[0]
                assert one.ready
                assert await probe(connections) == word
            await until(lambda: not any(each.severity is FATAL for each in one._findings))
            await cancellation.cancel_and_wait(watching)
    assert not [line for line in lines if line["event"] == "redis.lost"]


async def test_a_redis_that_lets_us_ask_nothing_is_silent(redis_url: str) -> None:
    """Where our user may do nothing, or is nobody, that is no answer."""
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
    """A process waits for Redis as long as it takes, and refuses only what cannot be mended."""

    async def test_it_is_usable_when_redis_answers(self, watched: tuple[Health, Any, Any]) -> None:
        """That Redis is away is said at once and once; when it comes, its layout is claimed."""
        one, proxy, lines = watched
        proxy.refusing = True
        proxy.cut()
        await until(lambda: any(line["event"] == "redis.lost" for line in lines))
        assert (one.reason, one.usable.is_set()) == ("redis_unreachable", False)
        proxy.refusing = False
        await until(one.usable.is_set)
        await until(lambda: one.ready)
        assert await is_claimed(one._connections, one._keys)
        assert len([line for line in lines if line["event"] == "redis.lost"]) == 1

    async def test_a_server_too_old_ends_it(
        self,
        connections: Connections,
        make_settings: Callable[..., Settings],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """It is said which version is needed, and nothing is written."""

        async def described(*_: Any) -> Mapping[str, Any]:
            return HEALTHY | {"redis_version": "6.2.14"}

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
        async with configured(connections, min_replicas_to_write="1"):
            one = Health(connections, settings)
            watching = asyncio.create_task(one.watch())
            await until(one.usable.is_set)
            await until(lambda: one.ready)
            await cancellation.cancel_and_wait(watching)
