"""The laws of queues for `redis_stream`, against the server under test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import redis

from service.errors import ConfigError, Unreachable
from service.handlers import loading, redis_stream
from service.transitions.cloudevents import message
from tests.handlers import brokers
from tests.handlers.contract import (
    Broker,
    Misconfigured,
    QueueLaws,
    Received,
    Refused,
    check,
    in_order,
    transition,
)
from tests.support import roles, servers

STREAM = "identity:verifications"
TEXT = "identity:text"


class RedisBroker:
    """A server that has every write on its disk before it answers."""

    keeps = True
    drops_repeats = True

    def __init__(self, directory: Path) -> None:
        self.port = servers.free_port()
        self._directory = directory
        self._running = ExitStack()
        self._server: servers.Server | None = None

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the environment of the handler."""
        credentials = credentials or f":{brokers.QUOTED_PASSWORD}"
        url = f"redis://{credentials}@127.0.0.1:{port or self.port}"
        return {"REDIS_STREAM_URL": url, "REDIS_STREAM_NAME": STREAM}

    def refused(self) -> Iterable[Refused]:
        """Return nothing: no message that fits into ours is too much for Redis."""
        return []

    def refusing(self) -> Iterable[Refused]:
        """Return where nothing can be appended."""
        text = {**self.environ(), "REDIS_STREAM_NAME": TEXT}
        return [Refused("not_a_stream", text, transition("a", 1))]

    def misconfigured(self) -> Iterable[Misconfigured]:
        """Return what a check must find."""
        return [
            Misconfigured("REDIS_STREAM_URL", self.environ(credentials=":wrong")),
            Misconfigured("REDIS_STREAM_URL", self.environ(credentials="someone:wrong")),
            Misconfigured("REDIS_STREAM_NAME", {**self.environ(), "REDIS_STREAM_NAME": TEXT}),
        ]

    @asynccontextmanager
    async def away(self) -> AsyncIterator[str]:
        """Put a text where the stream was."""
        with self.client() as client:
            client.set(STREAM, "text")
        yield "not_a_stream"
        await self.empty()

    async def empty(self) -> None:
        """Flush everything, and put a text where a stream might be expected."""
        with self.client() as client:
            client.flushall()
            client.set(TEXT, "text")

    async def received(self) -> list[Received]:
        """Return what the stream holds."""
        with self.client() as client:
            found = []
            for _, fields in client.xrange(STREAM):
                headers = {name.decode(): value.decode() for name, value in fields.items()}
                headers.pop("body")
                found.append(Received(fields[b"body"], headers["id"], None, headers))
            return found

    def kill(self) -> None:
        """End the server."""
        self._running.close()

    def start(self) -> None:
        """Start the server, again on the same file."""
        brokers.lasting(self._start)

    def frozen(self) -> AbstractContextManager[None]:
        """Freeze the server."""
        assert self._server is not None
        return self._server.frozen()

    def client(self) -> redis.Redis:
        """Return a plain client."""
        return redis.Redis(port=self.port, password=brokers.PASSWORD, socket_timeout=30)

    def _start(self) -> None:
        durable = ("--appendonly", "yes", "--appendfsync", "always")
        running = servers.server(self._directory, *durable, port=self.port)
        self._server = self._running.enter_context(running)
        with self._server.client() as client:
            client.config_set("requirepass", brokers.PASSWORD)


@contextmanager
def serving(directory: Path) -> Iterator[RedisBroker]:
    """Run a server until the block is left."""
    broker = RedisBroker(directory / "redis_stream")
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Run a server for this module."""
    with serving(tmp_path_factory.mktemp("redis_stream")) as broker:
        yield broker


@pytest.mark.xdist_group("redis_stream")
class TestRedisStream(QueueLaws):
    """Redis Streams keep the laws."""

    opener = "service.handlers.redis_stream:open"

    async def test_a_full_redis_is_waited_for(self, broker: RedisBroker) -> None:
        """A Redis without room, or that is a replica, is away: nothing is counted or lost."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            with broker.client() as client:
                for wrong, right in (
                    (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
                    (
                        ("REPLICAOF", "127.0.0.1", str(servers.free_port())),
                        ("REPLICAOF", "NO", "ONE"),
                    ),
                ):
                    client.execute_command(*wrong)
                    try:
                        with pytest.raises(ConnectionError):
                            await handler(transition("a", 2))
                    finally:
                        client.execute_command(*right)
            await handler(transition("a", 2))

        assert in_order(await broker.received()) == {"vs_a": [1, 2]}

    async def test_a_guard_ends_when_it_is_told_to(self, broker: RedisBroker) -> None:
        """After REDIS_STREAM_DEDUP_WINDOW_S a repeat is appended again; before that, it is not."""
        environ = {**broker.environ(), "REDIS_STREAM_DEDUP_WINDOW_S": "1000"}
        async with self.opened(environ) as handler:
            await handler(transition("a", 1))
            with broker.client() as client:
                [guard] = client.scan_iter("*:guard:*")
                assert guard == b"{identity:verifications}:guard:evt_a_1"
                assert 900_000 < client.pttl(guard) <= 1_000_000
                client.delete(guard)
            await handler(transition("a", 1))

        assert len(await broker.received()) == 2

    async def test_a_stream_is_trimmed_where_told_to(self, broker: RedisBroker) -> None:
        """REDIS_STREAM_MAX_ENTRIES bounds the stream, roughly, from its old end."""
        environ = {**broker.environ(), "REDIS_STREAM_MAX_ENTRIES": "100"}
        async with self.opened(environ) as handler:
            for n in range(10):
                await asyncio.gather(*(handler(transition(f"s{n}{m}", 1)) for m in range(50)))

        received = await broker.received()
        assert 100 <= len(received) <= 300
        assert received[-1].body == message(transition("s949", 1)).body

    async def test_what_is_not_allowed_is_waited_for(self, broker: RedisBroker) -> None:
        """A user without the right to append is the operator's matter, not the message's."""
        with broker.client() as client:
            client.execute_command(
                "ACL", "SETUSER", "reader", "on", ">pass", "~*", "+@read", "+eval", "+evalsha"
            )
        async with self.opened(broker.environ(credentials="reader:pass")) as handler:
            with pytest.raises(Unreachable, match=r"^access_refused$"):
                await handler(transition("a", 1))

    async def test_a_cluster_that_is_away_is_unreachable(self, broker: RedisBroker) -> None:
        """The handler opens all the same, and can be called until the cluster is there."""
        environ = broker.environ(servers.free_port())
        environ["REDIS_STREAM_URL"] = environ["REDIS_STREAM_URL"].replace(
            "redis:", "redis+cluster:"
        )
        async with self.opened(environ) as handler:
            with pytest.raises(ConnectionError):
                await check(handler)
            with pytest.raises(ConnectionError):
                await handler(transition("a", 1))

    async def test_an_unusable_url_is_named(self, broker: RedisBroker) -> None:
        """A URL with an option that is none is told of by the handler's own variable."""
        environ = broker.environ()
        environ["REDIS_STREAM_URL"] += "?retries=3"
        async with self.opened(environ) as handler:
            with pytest.raises(ConfigError, match=r"^REDIS_STREAM_URL: "):
                await check(handler)


async def test_its_user_can_do_its_work_and_nothing_else(tmp_path: Path) -> None:
    """As the user of deploy/redis it checks its stream and appends each transition once."""
    acl = roles.write_acl(tmp_path / "users.acl")
    with servers.server(tmp_path, "--aclfile", str(acl), user="administrator") as running:
        url = roles.as_user(running.url, "stream")
        async with redis_stream.open({"REDIS_STREAM_URL": url}) as handler:
            await loading.check("redis_stream", handler)
            for _ in range(2):
                await handler(transition("a", 1))
        with running.client() as client, redis.Redis.from_url(url) as its_own:
            assert client.xlen("verifications") == 1
            for words in ("XRANGE verifications - +", "DEL verifications", "GET idv:layout"):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    its_own.execute_command(*words.split())
