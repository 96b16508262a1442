"""Connections: each is usable, and none is shared or answers another caller."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
import redis
from redis import exceptions

from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.scripts import Script, ScriptCall
from tests.support.proxy import proxy_to
from tests.support.waiting import until

RELEASE = Script("service.delivery", "lua/release.lua")


class _Echo(Script):
    """Replies with its argument."""

    def __init__(self) -> None:
        self.source = "#!lua\nreturn ARGV[1]"
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


ECHO = _Echo()


class TestPool:
    """Every connection that is handed out can be used, by one caller at a time."""

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
                # The loop needs a turn to see that they are closed.
                idle = [*pool._available_connections, *pool._in_use_connections]
                await until(lambda: all(one._reader.at_eof() for one in idle))  # noqa: B023 - awaited
                assert await connections.run([call] * 4) == [0] * 4

    @pytest.mark.parametrize("is_closed", [False, True])
    async def test_a_connection_that_another_task_closes_is_a_lost_one(
        self, connections: Connections, monkeypatch: pytest.MonkeyPatch, *, is_closed: bool
    ) -> None:
        """Finding a Cluster's nodes closes connections; a call on one gets a ConnectionError."""
        connection = await connections.client.connection_pool.get_connection()

        async def close_meanwhile() -> None:
            if is_closed:
                await connection.disconnect(nowait=True)
            else:
                connection._writer.close()

        monkeypatch.setattr(connection, "check_health", close_meanwhile)
        with pytest.raises(exceptions.ConnectionError):
            await connection.send_command("PING")

    async def test_an_abandoned_call_does_not_answer_the_next(self, redis_url: str) -> None:
        """The late reply to a call that was given up never reaches another caller."""
        async with proxy_to(redis_url) as proxy, connect(Secret(proxy.url)) as connections:
            for n in range(5):
                proxy.delay_s = 5.0
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(connections.client.echo("abandoned"), 0.03)
                proxy.delay_s = 0.0
                assert await connections.client.echo(str(n)) == str(n).encode()

    async def test_an_abandoned_script_does_not_answer_the_next(self, redis_url: str) -> None:
        """The same holds on the connection that is kept between scripts."""
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

    async def test_concurrent_calls_have_their_own_connections(
        self, connections: Connections
    ) -> None:
        """Calls one after the other need one connection; concurrent ones have one each."""
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

    async def test_a_failing_script_raises(self, connections: Connections) -> None:
        """`run_one` raises what `run` would return."""
        await connections.client.lpush("lease", 1)
        with pytest.raises(exceptions.ResponseError):
            await connections.run_one(RELEASE, ["lease"], ["token"])
