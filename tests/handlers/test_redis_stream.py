"""The `redis_stream` handler against a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from service.errors import ConfigError, Unreachable
from service.handlers import loading, redis_stream
from service.transitions.cloudevents import message
from tests.handlers.contract import QueueContract, check, sequences_of
from tests.support import roles, servers
from tests.support.brokers.broker import transition
from tests.support.brokers.redis_stream import RedisBroker, run_broker


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisBroker]:
    """Run a broker for this module."""
    with run_broker(tmp_path_factory.mktemp("redis_stream")) as broker:
        yield broker


@pytest.mark.xdist_group("redis_stream")
class TestRedisStream(QueueContract):
    """The contract of every queue, and the cases of Redis Streams."""

    opener = "service.handlers.redis_stream:open"

    async def test_a_full_redis_is_waited_for(self, broker: RedisBroker) -> None:
        """A Redis that is full or a replica is an unreachable queue, and the reason says which."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            with broker.client() as client:
                for reason, wrong, right in (
                    ("redis_full", "CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
                    ("redis_refused", "REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
                ):
                    client.execute_command(*wrong.split())
                    try:
                        with pytest.raises(Unreachable, match=f"^{reason}$"):
                            await handler(transition("a", 2))
                    finally:
                        client.execute_command(*right.split())
            await handler(transition("a", 2))

        assert sequences_of(await broker.received()) == {"vs_a": [1, 2]}

    async def test_a_repeat_after_the_window_is_appended(self, broker: RedisBroker) -> None:
        """A guard expires after REDIS_STREAM_DEDUP_WINDOW_S; then a repeat is appended again."""
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

    async def test_the_stream_is_trimmed(self, broker: RedisBroker) -> None:
        """REDIS_STREAM_MAX_ENTRIES bounds the stream approximately; the oldest entries go."""
        environ = {**broker.environ(), "REDIS_STREAM_MAX_ENTRIES": "100"}
        async with self.opened(environ) as handler:
            for n in range(10):
                await asyncio.gather(*(handler(transition(f"s{n}{m}", 1)) for m in range(50)))

        received = await broker.received()
        assert 100 <= len(received) <= 300
        assert received[-1].body == message(transition("s949", 1)).body

    async def test_a_forbidden_stream_is_waited_for(self, broker: RedisBroker) -> None:
        """A Redis user without the permission to append makes the queue unreachable."""
        with broker.client() as client:
            client.execute_command(
                "ACL", "SETUSER", "reader", "on", ">pass", "~*", "+@read", "+eval", "+evalsha"
            )
        async with self.opened(broker.environ(credentials="reader:pass")) as handler:
            with pytest.raises(Unreachable, match=r"^access_refused$"):
                await handler(transition("a", 1))

    async def test_a_cluster_that_is_down_is_unreachable(self, broker: RedisBroker) -> None:
        """The handler opens without the cluster; calls and checks raise ConnectionError."""
        environ = broker.environ(servers.free_port())
        environ["REDIS_STREAM_URL"] = environ["REDIS_STREAM_URL"].replace(
            "redis:", "redis+cluster:"
        )
        async with self.opened(environ) as handler:
            with pytest.raises(ConnectionError):
                await check(handler)
            with pytest.raises(ConnectionError):
                await handler(transition("a", 1))

    async def test_an_unknown_option_of_the_url_is_reported(self, broker: RedisBroker) -> None:
        """A URL with an unknown option is a problem of REDIS_STREAM_URL."""
        environ = broker.environ()
        environ["REDIS_STREAM_URL"] += "?retries=3"
        async with self.opened(environ) as handler:
            with pytest.raises(ConfigError, match=r"^REDIS_STREAM_URL: "):
                await check(handler)


async def test_the_shipped_user_may_only_append(tmp_path: Path) -> None:
    """The `stream` user of deploy/redis can check and append, and read nothing."""
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
