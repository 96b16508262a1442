"""Laws of the clients: which URLs there are, which settings hold, and what a failure is called."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, SSLConnection

from service.config import Settings
from service.delivery.consumer_groups import create_groups
from service.errors import ConfigError, Unavailable, UnavailableReason
from service.inbox import session_record
from service.inbox.admission import Inbox, Outcome
from service.runtime.embedded_redis import EmbeddedServer
from service.secret import Secret
from service.storage import health
from service.storage.clients import BLOCK_S
from service.storage.connections import Connections, connect, display_address
from service.storage.layout import Keys, claim
from service.storage.redis_errors import unavailable_reason
from service.storage.scripts import NotReplicatedError, Script, ScriptCall, UnsafeConfigError
from service.stripe.events import Event, parse
from service.stripe.signatures import VerifiedPayload
from service.telemetry import metrics
from service.transitions.transition import make_change
from tests.support.harness import soon
from tests.support.proxy import Fault, proxy_to
from tests.support.servers import (
    PATIENCE_S,
    Server,
    free_port,
    frozen,
    sentinel,
    server,
    until,
    until_answers,
)
from tests.support.virtual_time import push

RELEASE = Script("service.delivery", "lua/release.lua")


class _Echo(Script):
    """Says what it is told."""

    def __init__(self) -> None:
        self.source = "#!lua\nreturn ARGV[1]"
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


ECHO = _Echo()


def first_event(session: str) -> Event:
    """Return a session's first event."""
    created = int(time.time())
    event = parse(
        VerifiedPayload(
            b'{"id": "evt_%s", "type": "identity.verification_session.created", "created": %d,'
            b' "data": {"object": {"id": "%s", "status": "requires_input"}}}'
            % (session.encode(), created, session.encode()),
            "fingerprint",
        )
    )
    assert isinstance(event, Event)
    return event


class TestUrls:
    """What REDIS_URL may be."""

    async def test_a_socket_and_a_database_are_taken(self, redis_server: EmbeddedServer) -> None:
        """A Unix socket's URL may name the database."""
        async with connect(Secret(f"{redis_server.url}?db=3")) as connections:
            assert await connections.client.ping()
            assert (await connections.client.client_info())["db"] == 3
            assert not connections.is_cluster

    @pytest.mark.parametrize(
        "url",
        [
            "http://hidden",
            "redis://hidden:port",
            "redis://[hidden",
            "redis://hidden?socket_timeout=60",
            "redis://hidden?decode_responses=true",
            "redis://hidden?retry_on_timeout=true",
            "redis://hidden?max_connections=hidden",
            "redis://hidden?nonsense=hidden",
            "redis://hidden?ssl_ca_certs=hidden",
            "redis://hidden?sentinel_password=hidden",
            "rediss://hidden?ssl_nonsense=hidden",
            "redis+sentinel://hidden",
            "redis+sentinel://hidden/service/hidden",
            "redis+sentinel://hidden:port/service",
            "redis+sentinel://hidden/service?socket_timeout=60",
            "rediss+sentinel://hidden/service?ssl_nonsense=hidden",
            "redis+cluster://hidden:port",
            "redis+cluster://hidden?cluster_error_retry_attempts=3",
            "rediss+cluster://hidden?ssl_nonsense=hidden",
        ],
    )
    async def test_what_cannot_be_is_refused_without_a_word_of_it(self, url: str) -> None:
        """A URL that is wrong, or would undo our settings, is an operator's error by name only."""
        with pytest.raises(ConfigError) as refused:
            async with connect(Secret(url)):
                pass

        assert refused.value.problems == ("REDIS_URL: not a usable URL",)
        assert refused.value.__cause__ is None

    @pytest.mark.parametrize(
        ("url", "where"),
        [
            ("redis://ann:hidden@one", "one:6379"),
            ("rediss://:hidden@[::1]:5000/4?ssl_ca_certs=hidden", "::1:5000"),
            ("unix://ann@/run/redis.sock?password=hidden", "/run/redis.sock"),
            ("redis+sentinel://ann:hid%40den@one,two:5000/main/4", "one:26379, two:5000"),
            ("rediss+cluster://ann:hidden@one,two:7001?ssl_keyfile=hidden", "one:6379, two:7001"),
            ("redis://ann:hidden/part@one", "?"),
        ],
    )
    def test_where_it_leads_is_told_without_who(self, url: str, where: str) -> None:
        """Hosts and ports, or a path, are for people to read; user and password are not."""
        assert display_address(Secret(url)) == where

    async def test_a_sentinel_url_says_everything(self) -> None:
        """Hosts, credentials of both kinds, service and database come from the URL."""
        url = "redis+sentinel://ann:p%40ss@one,[::1]:5000/main/4?sentinel_password=s"
        async with connect(Secret(url)) as connections:
            pool = connections.client.connection_pool
            found = pool.connection_kwargs
            hosts = [
                one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels
            ]

        assert (found["username"], found["password"], found["db"]) == ("ann", "p@ss", 4)
        assert pool.service_name == "main"
        assert [(one["host"], one["port"]) for one in hosts] == [("one", 26379), ("::1", 5000)]
        assert [(one.get("username"), one["password"]) for one in hosts] == [(None, "s")] * 2

    async def test_tls_is_for_the_sentinels_too(self) -> None:
        """`rediss+sentinel` encrypts what is said to the Sentinels and to the primary alike."""
        url = "rediss+sentinel://one/main?ssl_check_hostname=false"
        async with connect(Secret(url)) as connections:
            pool = connections.client.connection_pool
            [watcher] = pool.sentinel_manager.sentinels
            for one in (pool, watcher.connection_pool):
                assert issubclass(one.connection_class, SSLConnection)
                assert one.connection_kwargs["ssl_check_hostname"] is False


@pytest.mark.usefixtures("own_timeouts")
class TestSettings:
    """What we decided, whatever redis-py's defaults are."""

    @pytest.mark.parametrize("url", ["redis://nowhere", "redis+sentinel://nowhere/main"])
    async def test_they_hold(self, url: str) -> None:
        """No retries, no maintenance notifications, short time-outs; BLOCK ends before its own."""
        async with connect(Secret(url)) as connections:
            for client, longest in ((connections.client, 1.0), (connections.blocking_client, 9.0)):
                options = client.connection_pool.connection_kwargs
                assert options["retry"].get_retries() == 0
                assert not client.connection_pool.maint_notifications_enabled()
                assert options["legacy_responses"] is True
                assert options["socket_connect_timeout"] == 0.5
                assert options["socket_timeout"] <= longest
            assert options["socket_timeout"] > BLOCK_S

    async def test_pools_wait_a_moment_and_suffice(self, connections: Connections) -> None:
        """Short calls queue briefly for a connection; there is one for every blocking read."""
        pool = connections.client.connection_pool
        assert isinstance(pool, BlockingConnectionPool)
        assert pool.timeout == 0.25
        assert connections.blocking_client.connection_pool.max_connections >= 256

    async def test_nothing_is_executed_twice_by_the_client(self, redis_url: str) -> None:
        """A lost reply is an error here: asking again is the caller's decision."""
        async with proxy_to(redis_url) as proxy, connect(Secret(proxy.url)) as connections:
            await connections.client.ping()
            proxy.break_next(Fault.LOSE_REPLY, at=b"INCR")
            with pytest.raises(exceptions.ConnectionError):
                await connections.client.incr("counter")
            assert await connections.client.get("counter") == b"1"


class TestPool:
    """No connection is handed out that cannot be used."""

    async def test_a_connection_the_server_closed_is_not_handed_out(
        self, redis_url: str, connections: Connections
    ) -> None:
        """After the server has closed every idle connection the next calls succeed."""
        call = ScriptCall(RELEASE, ["lease"], ["token"])
        pool = connections.client.connection_pool
        with redis.Redis.from_url(redis_url) as other:
            for _ in range(10):
                await asyncio.gather(*(connections.client.ping() for _ in range(8)))
                assert other.client_kill_filter(_type="normal") >= 8
                # The loop must have had its turn to see that they are closed.
                idle = [*pool._available_connections, *pool._in_use_connections]
                await until(lambda: all(one._reader.at_eof() for one in idle))  # noqa: B023 - awaited
                assert await connections.run([call] * 4) == [0] * 4

    async def test_an_abandoned_call_does_not_answer_the_next(self, redis_url: str) -> None:
        """The late reply to a call that was given up never reaches another caller."""
        async with proxy_to(redis_url) as proxy, connect(Secret(proxy.url)) as connections:
            for n in range(5):
                proxy.delay_s = 5.0
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(connections.client.echo("abandoned"), 0.03)
                proxy.delay_s = 0.0
                assert await connections.client.echo(str(n)) == str(n).encode()

    async def test_an_abandoned_exchange_does_not_answer_the_next(self, redis_url: str) -> None:
        """Nor does it on the connection that is kept between calls."""
        async with proxy_to(redis_url) as proxy, connect(Secret(proxy.url)) as connections:
            assert await connections.run_one(ECHO, ["key"], ["first"]) == b"first"
            for n in range(5):
                proxy.delay_s = 5.0
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(connections.run_one(ECHO, ["key"], ["abandoned"]), 0.03)
                proxy.delay_s = 0.0
                assert await connections.run_one(ECHO, ["key"], [n]) == str(n).encode()
            pool = connections.client.connection_pool
            assert len(pool._in_use_connections) + len(pool._available_connections) == 1

    async def test_no_two_share_a_connection(self, connections: Connections) -> None:
        """One call after the other needs one connection; those side by side have one each."""
        pool = connections.client.connection_pool
        assert await connections.run_one(ECHO, ["key"], ["first"]) == b"first"
        opened = len(pool._in_use_connections) + len(pool._available_connections)
        for n in range(10):
            assert await connections.run_one(ECHO, ["key"], [n]) == str(n).encode()
        assert len(pool._in_use_connections) + len(pool._available_connections) == opened
        side_by_side = [connections.run_one(ECHO, ["key"], [n]) for n in range(10)]
        assert await asyncio.gather(*side_by_side) == [str(n).encode() for n in range(10)]
        assert len(pool._in_use_connections) == 1
        assert len(pool._available_connections) == 9

    async def test_a_refused_script_raises(self, connections: Connections) -> None:
        """`run_one` raises what `run` would return."""
        await connections.client.lpush("lease", 1)
        with pytest.raises(exceptions.ResponseError):
            await connections.run_one(RELEASE, ["lease"], ["token"])


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (exceptions.TimeoutError(), UnavailableReason.REDIS_SLOW),
        (TimeoutError(), UnavailableReason.REDIS_SLOW),
        (exceptions.ConnectionError(), UnavailableReason.REDIS_UNREACHABLE),
        (exceptions.BusyLoadingError(), UnavailableReason.REDIS_UNREACHABLE),
        (ConnectionResetError(), UnavailableReason.REDIS_UNREACHABLE),
        (NotReplicatedError(), UnavailableReason.NOT_DURABLE),
        (exceptions.ResponseError("NOREPLICAS Not enough good"), UnavailableReason.NOT_DURABLE),
        (exceptions.OutOfMemoryError(), UnavailableReason.REDIS_FULL),
        (exceptions.ResponseError("MISCONF"), UnavailableReason.REDIS_REFUSED),
        (exceptions.ReadOnlyError(), UnavailableReason.REDIS_REFUSED),
        (exceptions.ClusterDownError("CLUSTERDOWN"), UnavailableReason.REDIS_UNREACHABLE),
        (exceptions.MasterDownError("MASTERDOWN"), UnavailableReason.REDIS_REFUSED),
        (exceptions.AuthenticationError("WRONGPASS"), UnavailableReason.REDIS_UNAUTHORIZED),
        (exceptions.NoPermissionError("NOPERM"), UnavailableReason.REDIS_UNAUTHORIZED),
        (UnsafeConfigError(), UnavailableReason.NOT_DURABLE),
    ],
)
def test_every_failure_has_one_word(error: Exception, word: UnavailableReason) -> None:
    """What redis-py raises is called by one word of the closed list."""
    assert unavailable_reason(error) is word


class TestRefused:
    """A Redis that does not let us in is told from one that is not there, in every form of URL."""

    @pytest.fixture
    def guarded(self, tmp_path: Path) -> Iterator[Server]:
        """Yield a Cluster of one server that wants a password."""
        options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        with server(tmp_path / "redis", *options) as started, started.client() as client:
            command(client, "CLUSTER ADDSLOTSRANGE", 0, 16383)
            soon(lambda: command(client, "CLUSTER INFO")["cluster_state"] == "ok")
            client.config_set("requirepass", "right")
            yield started

    @pytest.mark.parametrize("form", ["redis://{}", "redis+cluster://{}"])
    @pytest.mark.parametrize("user", ["", ":wrong@", "nobody:wrong@"])
    async def test_by_redis(self, guarded: Server, form: str, user: str) -> None:
        """A wrong password, and none, are `redis_unauthorized`."""
        url = form.format(f"{user}127.0.0.1:{guarded.port}")
        async with connect(Secret(url)) as connections:
            for ask in (connections.client.ping, connections.blocking_client.ping):
                with pytest.raises(exceptions.RedisError) as refused:
                    await ask()
                assert unavailable_reason(refused.value) is UnavailableReason.REDIS_UNAUTHORIZED
            [reply] = await connections.run([ScriptCall(RELEASE, ["lease"], ["token"])])
            assert unavailable_reason(reply) is UnavailableReason.REDIS_UNAUTHORIZED

    async def test_by_a_sentinel(self, tmp_path: Path) -> None:
        """So are those that a Sentinel refuses."""
        with (
            server(tmp_path / "primary") as primary,
            sentinel(tmp_path / "sentinel", service="main", primary=primary) as watcher,
            watcher.client() as client,
        ):
            command(client, "ACL SETUSER", "default", "resetpass", ">right")
            url = f"redis+sentinel://127.0.0.1:{watcher.port}/main?sentinel_password=wrong"
            async with connect(Secret(url)) as connections:
                with pytest.raises(exceptions.RedisError) as refused:
                    await connections.client.ping()
        assert unavailable_reason(refused.value) is UnavailableReason.REDIS_UNAUTHORIZED

    async def test_within_a_script(self, guarded: Server) -> None:
        """So is a user who may run scripts, but not what one of them calls."""
        with redis.Redis(port=guarded.port, password="right") as client:
            rights = ("on", ">pass", "~*", "+eval", "+evalsha", "+get", "+cluster", "+info")
            client.execute_command("ACL", "SETUSER", "limited", *rights)
            client.set("lease", "token")
        async with connect(Secret(f"redis://limited:pass@127.0.0.1:{guarded.port}")) as connections:
            [reply] = await connections.run([ScriptCall(RELEASE, ["lease"], ["token"])])
        assert unavailable_reason(reply) is UnavailableReason.REDIS_UNAUTHORIZED

    async def test_a_user_whose_password_has_changed_is_told(self, guarded: Server) -> None:
        """What was let in and is not any more is refused by that word too."""
        url = f"redis://:right@127.0.0.1:{guarded.port}"
        async with connect(Secret(url)) as connections:
            call = ScriptCall(RELEASE, ["lease"], ["token"])
            assert await connections.run([call]) == [0]
            with redis.Redis(port=guarded.port, password="right") as client:
                client.config_set("requirepass", "changed")
                client.client_kill_filter(_type="normal", skipme=True)
                await until(lambda: _is_unauthorized(connections, call))


async def _is_unauthorized(connections: Connections, call: ScriptCall) -> bool:
    [reply] = await connections.run([call])
    return unavailable_reason(reply) is UnavailableReason.REDIS_UNAUTHORIZED


async def test_too_few_replicas_are_not_durable(
    connections: Connections, keys: Keys, make_settings: Callable[..., Settings]
) -> None:
    """A primary that refuses writes for want of replicas says `not_durable`."""
    inbox = Inbox(connections, keys, make_settings(admit_deadline_s=600))
    event = first_event("vs_1")
    failures = metrics.REDIS_ERRORS.labels(UnavailableReason.NOT_DURABLE)._value
    before = failures.get()
    await connections.client.config_set("min-replicas-to-write", 1)
    try:
        admission = asyncio.create_task(inbox.admit(event, make_change(event)))
        await until(lambda: failures.get() > before)
        push(600)
        with pytest.raises(Unavailable) as refused:
            await admission
    finally:
        await connections.client.config_set("min-replicas-to-write", 0)
    assert refused.value.reason is UnavailableReason.NOT_DURABLE


async def test_behind_sentinel_everything_works(
    tmp_path: Path, make_settings: Callable[..., Settings]
) -> None:
    """The primary is found by asking a Sentinel, and events are admitted there."""
    with (
        server(tmp_path / "primary") as primary,
        sentinel(tmp_path / "sentinel", service="main", primary=primary) as watcher,
    ):
        url = f"redis+sentinel://127.0.0.1:{watcher.port}/main/0"
        settings = make_settings(redis_url=Secret(url))
        keys = Keys("idv", 8)
        async with connect(settings.redis_url) as connections:
            await claim(connections, keys)
            await create_groups(connections, keys, settings.handlers)
            inbox = Inbox(connections, keys, settings)
            event = first_event("vs_1")
            assert (await inbox.admit(event, make_change(event))).outcome is Outcome.ADMITTED
            assert (await inbox.admit(event, make_change(event))).outcome is Outcome.DUPLICATE
            assert not connections.is_cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Server]]:
    """Yield three primaries that share the slots."""
    with ExitStack() as running:
        nodes = []
        for n in range(3):
            bus = free_port()
            options = ("--cluster-enabled", "yes", "--cluster-port", str(bus))
            node = running.enter_context(server(tmp_path / str(n), *options))
            nodes.append((node, bus, running.enter_context(node.client())))
        for n, (_, _, client) in enumerate(nodes):
            first, last = n * 16384 // 3, (n + 1) * 16384 // 3 - 1
            command(client, "CLUSTER ADDSLOTSRANGE", first, last)
            command(client, "CLUSTER SET-CONFIG-EPOCH", n + 1)
        for node, bus, _ in nodes[1:]:
            command(nodes[0][2], "CLUSTER MEET", "127.0.0.1", node.port, bus)
        soon(lambda: all(_is_whole(client) for _, _, client in nodes))
        yield [node for node, _, _ in nodes]


def command(client: redis.Redis, *words: str | int) -> Any:
    """Send words for which redis-py has no method."""
    return client.execute_command(*words)  # type: ignore[no-untyped-call]


def _is_whole(client: redis.Redis) -> bool:
    state = command(client, "CLUSTER INFO")["cluster_state"]
    return state == "ok" and len(command(client, "CLUSTER SLOTS")) == 3


async def test_a_cluster_that_is_silent_at_first_is_used_once_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting waits no longer than for one call; the clients find the primaries later."""
    monkeypatch.setattr("service.storage.clients.CALL_TIMEOUT_S", 0.5)
    with server(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as node:
        with node.client() as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        url = Secret(f"redis+cluster://127.0.0.1:{node.port}")
        async with contextlib.AsyncExitStack() as stack:
            with frozen(node.process.pid):
                connections = await stack.enter_async_context(connect(url))
            await until_answers(connections)
            await until(lambda: _takes_writes(connections))


async def _takes_writes(connections: Connections) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(await connections.client.set("key", "value"))
    return False


async def test_in_cluster_everything_works(
    cluster: list[Server], make_settings: Callable[..., Settings]
) -> None:
    """Events of all partitions are admitted across primaries, scripts flushed or not."""
    url = ",".join(f"127.0.0.1:{node.port}" for node in cluster)
    settings = make_settings(redis_url=Secret(f"redis+cluster://{url}"))
    keys = Keys("idv", 8)
    events = [first_event(f"vs_{n}") for n in range(40)]
    async with connect(settings.redis_url) as connections:
        assert connections.is_cluster
        await until_answers(connections)
        await claim(connections, keys)
        assert await create_groups(connections, keys, settings.handlers) == ["log"]
        inbox = Inbox(connections, keys, settings)

        async def admitted() -> set[Outcome]:
            answers = await asyncio.gather(*(inbox.admit(one, make_change(one)) for one in events))
            return {answer.outcome for answer in answers}

        assert await admitted() == {Outcome.ADMITTED}
        for node in cluster:
            with node.client() as client:
                client.script_flush()
        assert await admitted() == {Outcome.DUPLICATE}
        record = await session_record.read(connections, keys, "vs_7")
        assert record is not None
        assert (record.sequence, record.duplicates) == (1, 1)
        findings = await health.inspect(connections, settings)
        assert {"clock", "eviction", "persistence"} < {one.name for one in findings}
        homes = [connections.client.get_node_from_key(keys.transitions(n)).port for n in range(8)]
        assert len(set(homes)) > 1


async def test_a_slot_that_moves_to_a_node_without_a_name_is_found(cluster: list[Server]) -> None:
    """Of nodes that tell only their ports all are on one host, also those that a slot moves to."""
    for node in cluster:
        with node.client() as client:
            client.config_set("cluster-preferred-endpoint-type", "unknown-endpoint")
    url = Secret(f"redis+cluster://127.0.0.1:{cluster[0].port}")
    keys = [f"{{{n}}}:lease" for n in range(8)]
    async with connect(url) as connections:
        assert {node.host for node in connections.client.get_nodes()} == {"127.0.0.1"}
        calls = [ScriptCall(RELEASE, [key], ["token"]) for key in keys]
        assert await connections.run(calls) == [0] * 8
        for key in keys[:2]:
            _move(cluster, connections.client.keyslot(key))
        assert await connections.run(calls) == [0] * 8
        for key in keys[2:4]:
            _move(cluster, connections.client.keyslot(key))
        # redis-py's own way, which blocking reads go.
        for key in keys:
            assert await connections.client.execute_command("EXISTS", key) == 0
        assert {node.host for node in connections.client.get_nodes()} == {"127.0.0.1"}


def _move(nodes: list[Server], slot: int) -> None:
    """Give an empty slot to another primary."""
    with ExitStack() as opened:
        clients = [opened.enter_context(node.client()) for node in nodes]
        [home] = [one for one in clients if _holds(one, slot)]
        target = next(one for one in clients if one is not home)
        name = command(target, "CLUSTER MYID").decode()
        for one in (target, home, *clients):
            command(one, "CLUSTER SETSLOT", slot, "NODE", name)


def _holds(client: redis.Redis, slot: int) -> bool:
    """Say whether a node holds a slot itself: it then counts its keys instead of moving us on."""
    myself = command(client, "CLUSTER MYID").decode()
    for first, last, primary, *_ in command(client, "CLUSTER SLOTS"):
        if first <= slot <= last:
            return bool(primary[2].decode() == myself)
    return False


async def test_one_failing_primary_does_not_hold_up_the_others(
    cluster: list[Server], make_settings: Callable[..., Settings]
) -> None:
    """While one primary hangs, sessions that live on the others are admitted."""
    url = ",".join(f"127.0.0.1:{node.port}" for node in cluster)
    # Whoever waited for the hung primary would wait for its time-out, and be too late.
    deadline_s = PATIENCE_S * 2 / 3
    settings = make_settings(
        redis_url=Secret(f"redis+cluster://{url}"), admit_deadline_s=deadline_s
    )
    keys = Keys("idv", 8)
    async with connect(settings.redis_url) as connections:
        await claim(connections, keys)
        inbox = Inbox(connections, keys, settings)

        def home(session: str) -> int:
            return int(connections.client.get_node_from_key(keys.session(session)).port)

        async def outcome(event: Event) -> str:
            try:
                return str((await inbox.admit(event, make_change(event))).outcome)
            except Unavailable as error:
                return str(error)

        hung = next(node for node in cluster if node.port == home("vs_0"))
        events = [first_event(f"vs_{n}") for n in range(60)]
        healthy = [one for one in events if home(one.session.id) != hung.port]
        with hung.frozen():
            stuck = asyncio.create_task(outcome(first_event("vs_0")))
            others = await asyncio.gather(*(outcome(one) for one in healthy))
            assert set(others) == {"admitted"}
            assert not stuck.done()
        assert await stuck in ("admitted", "duplicate")
