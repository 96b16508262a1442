"""One address behind which the primary changes, as at a managed endpoint or a TCP balancer.

The old primary becomes a replica of the new one and keeps every connection that it has; only new
connections reach the new primary.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.exceptions import ReadOnlyError, RedisError

from service.delivery.consumer_groups import create_groups
from service.delivery.stream_watcher import StreamWatcher
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.keys import Keys
from service.storage.scripts import Script, ScriptCall
from tests.support.proxy import Proxy, proxy_to
from tests.support.servers import Server
from tests.support.topologies import command
from tests.support.waiting import PATIENCE_S, until, wait_until

pytestmark = pytest.mark.timeout(200)

RELEASE = Script("service.delivery", "lua/release.lua")
CALL = ScriptCall(RELEASE, ["key"], ["token"])


def demote(pair: tuple[Server, Server]) -> None:
    """Make the replica the primary and the primary its replica; connections stay open."""
    old, new = pair
    command(new, "REPLICAOF", "NO", "ONE")
    command(old, "REPLICAOF", "127.0.0.1", new.port)


@asynccontextmanager
async def behind_one_address(
    pair: tuple[Server, Server],
) -> AsyncIterator[tuple[Proxy, Connections]]:
    """Yield a proxy to the first of *pair*, and clients that use it."""
    async with proxy_to(pair[0].url) as proxy, connect(Secret(proxy.url)) as connections:
        yield proxy, connections


async def test_one_readonly_replaces_every_connection(pair: tuple[Server, Server]) -> None:
    """READONLY on one of ten connections leads all of them to the new primary."""
    async with behind_one_address(pair) as (proxy, connections):
        client = connections.client
        await asyncio.gather(*(connections.run([CALL]) for _ in range(10)))
        demote(pair)
        proxy.aim(pair[1].url)
        [refused] = await connections.run([CALL])
        assert isinstance(refused, ReadOnlyError)
        await asyncio.gather(*(client.set("key", n) for n in range(10)))
        assert await asyncio.gather(*(connections.run([CALL]) for _ in range(10))) == [[0]] * 10


async def test_masterdown_replaces_the_connections_too(pair: tuple[Server, Server]) -> None:
    """A demoted server that answers MASTERDOWN is left as well."""
    old, new = pair
    async with behind_one_address(pair) as (proxy, connections):
        await connections.client.ping()
        command(old, "CONFIG", "SET", "replica-serve-stale-data", "no")
        command(new, "REPLICAOF", "NO", "ONE")
        command(old, "REPLICAOF", "127.0.0.1", 1)
        proxy.aim(new.url)
        [refused] = await connections.run([CALL])
        assert isinstance(refused, RedisError)
        assert await connections.run([CALL]) == [0]


@pytest.mark.parametrize("is_reset", [False, True], ids=["refused", "reset"])
async def test_a_blocking_read_reaches_the_new_primary(
    pair: tuple[Server, Server], is_reset: bool
) -> None:
    """A blocking read, which a replica never refuses, moves with the other connections.

    The old primary does not follow the new one, so that writes never arrive there. Other calls get
    READONLY, or their connections are reset and find the new primary.
    """
    old, new = pair
    keys = Keys("idv", 1)
    async with behind_one_address(pair) as (proxy, connections):
        await create_groups(connections, keys, ["log"])
        wait_until(lambda: command(new, "EXISTS", keys.transitions(0)))
        stream_watcher = StreamWatcher(connections)
        command(new, "REPLICAOF", "NO", "ONE")
        command(old, "REPLICAOF", "127.0.0.1", 1)
        # Blocked after the demotion: a read that blocked before would have been ended by it.
        waiting = asyncio.create_task(stream_watcher.wait_after({keys.transitions(0): "0"}))
        await until(lambda: _blocked(old) == 1)
        proxy.aim(new.url)
        command(new, "XADD", keys.transitions(0), "*", "field", "value")
        if is_reset:
            _reset_the_idle(old)
        else:
            [refused] = await connections.run([CALL])
            assert isinstance(refused, ReadOnlyError)
        await until(lambda: _answers(connections))
        async with asyncio.timeout(PATIENCE_S):
            await waiting
        await stream_watcher.close()


def _reset_the_idle(server: Server) -> None:
    with server.client() as client:
        own = client.client_id()
        for one in client.client_list(_type="normal"):
            if "b" not in one["flags"] and int(one["id"]) != own:
                client.client_kill_filter(_id=one["id"])


async def _answers(connections: Connections) -> bool:
    return await connections.run([CALL]) == [0]


def _blocked(server: Server) -> int:
    with server.client() as client:
        return int(client.info("clients")["blocked_clients"])


async def test_noperm_replaces_the_connection(redis_url: str) -> None:
    """After NOPERM the next call uses a new connection."""
    async with connect(Secret(redis_url)) as admin:
        await admin.client.execute_command(
            *("ACL", "SETUSER", "limited", "on", ">pass", "~*", "+@all", "-set")
        )
        limited = redis_url.replace("unix://", "unix://limited:pass@")
        async with connect(Secret(limited)) as connections:
            first = await connections.client.client_id()
            with pytest.raises(RedisError):
                await connections.client.set("key", "value")
            assert await connections.client.client_id() != first
        await admin.client.execute_command("ACL", "DELUSER", "limited")
