"""States of a Redis server, such as those in which it takes no writes, for the length of a block.

`changed_config` is for the server that all tests share; the others are for a test's own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

from service.storage.connections import Connections
from tests.support.servers import Server, free_port
from tests.support.waiting import wait_until


@asynccontextmanager
async def changed_config(connections: Connections, **options: str) -> AsyncIterator[None]:
    """Change settings of the server, written as in `maxmemory_policy`."""
    client = connections.client
    before: dict[str, str] = {}
    for name, value in options.items():
        before |= await client.config_get(name.replace("_", "-"))
        await client.config_set(name.replace("_", "-"), value)
    try:
        yield
    finally:
        for name, value in before.items():
            await client.config_set(name, value)


@contextmanager
def configured(server: Server, name: str, value: str) -> Iterator[None]:
    """Change one setting of the server."""
    with server.client() as client:
        [before] = client.config_get(name).values()
        client.config_set(name, value)
        yield
        client.config_set(name, before)


def full(server: Server) -> AbstractContextManager[None]:
    """Leave the server no memory."""
    return configured(server, "maxmemory", "1")


def lacking_replicas(server: Server) -> AbstractContextManager[None]:
    """Have the server require more replicas than there are."""
    return configured(server, "min-replicas-to-write", "1")


@contextmanager
def demoted(server: Server) -> Iterator[None]:
    """Make the server a replica of a primary that does not answer."""
    with server.client() as client:
        client.replicaof("127.0.0.1", str(free_port()))
        yield
        client.replicaof("NO", "ONE")


@contextmanager
def cut_off(server: Server) -> Iterator[None]:
    """Make the server such a replica, and one that does not answer reads either."""
    with configured(server, "replica-serve-stale-data", "no"), demoted(server):
        yield


@contextmanager
def unable_to_save(server: Server) -> Iterator[None]:
    """Make the server's last snapshot fail."""
    with configured(server, "save", "3600 1"), server.client() as client:
        in_the_way = Path(str(client.config_get("dir")["dir"])) / "dump.rdb"
        in_the_way.mkdir()
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        yield
        in_the_way.rmdir()
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")
