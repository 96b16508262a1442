"""redis-py's clients for one server, Sentinel and Cluster, with explicit settings.

The only module that builds a client; none connects before its first use. redis-py's defaults are
avoided on purpose: they retry writes for up to a minute and, with maintenance notifications, hand
out connections that the server has closed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis.asyncio import BlockingConnectionPool, Connection, Redis, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from . import urls
from .cluster import ClusterClient
from .redis_connection import (
    CONNECTION_CLASSES,
    Generation,
    SentinelTcpConnection,
    SentinelTlsConnection,
)

CONNECT_TIMEOUT_S = 0.5
POOL_WAIT_S = 0.25
CALL_TIMEOUT_S = 1.0
MAX_CALL_CONNECTIONS = 32
# A blocking read holds its connection, and there may be one for each of two streams of at most 256
# partitions.
MAX_BLOCKING_CONNECTIONS = 512
BLOCK_S = 2.0
# A blocking read's connection must outlive the block, or every idle read becomes an error.
BLOCKING_READ_TIMEOUT_S = BLOCK_S + 3.0
CLUSTER_RETRIES = 2

_SENTINEL_OPTIONS = {"sentinel_username", "sentinel_password"}

Client = Redis | ClusterClient


def for_calls(url: str, generation: Generation) -> Client:
    """Return a client for short calls.

    Args:
        url: One of the forms that `connections.connect` describes.
        generation: What the connections of all clients for this URL share.

    Raises:
        ConfigError: A file that the URL names does not exist.
        ValueError, TypeError, RedisError, RedisClusterException: The URL is not usable.
    """
    return _build(url, generation, CALL_TIMEOUT_S, MAX_CALL_CONNECTIONS)


def for_blocking_reads(url: str, generation: Generation) -> Client:
    """Return a client for blocking reads; arguments and errors as for `for_calls`."""
    return _build(url, generation, BLOCKING_READ_TIMEOUT_S, MAX_BLOCKING_CONNECTIONS)


def _build(url: str, generation: Generation, timeout_s: float, max_connections: int) -> Client:
    builders: dict[str, Callable[[str, Generation, float, int], Client]]
    builders = {"sentinel": _sentinel, "cluster": _cluster}
    builder = builders.get(urls.topology(url), _standalone)
    return builder(url, generation, timeout_s, max_connections)


async def close(client: Client) -> None:
    """Close a client's connections, and those to its Sentinels."""
    await client.aclose()
    if pool := _sentinel_pool(client):
        await pool.sentinel_manager.aclose()


async def replica_priorities(client: Client) -> list[int]:
    """Return the `replica-priority` of each replica that Sentinel knows; none without Sentinel.

    Raises:
        RedisError: No Sentinel answers.
    """
    pool = _sentinel_pool(client)
    if pool is None:
        return []
    [first, *_] = pool.sentinel_manager.sentinels
    known = await first.sentinel_slaves(pool.service_name)
    return [int(replica["slave-priority"]) for replica in known]


def _sentinel_pool(client: Client) -> SentinelConnectionPool | None:
    pool = getattr(client, "connection_pool", None)
    return pool if isinstance(pool, SentinelConnectionPool) else None


def _settings(timeout_s: float) -> dict[str, Any]:
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "legacy_responses": True,
        # Without CLIENT SETINFO, our users in Redis need no permission for it.
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def _standalone(url: str, generation: Generation, timeout_s: float, max_connections: int) -> Redis:
    options = urls.options(url) | _settings(timeout_s)
    options["connection_class"] = CONNECTION_CLASSES[options.get("connection_class", Connection)]
    pool = BlockingConnectionPool(
        max_connections=max_connections, timeout=POOL_WAIT_S, generation=generation, **options
    )
    _check(pool)
    return Redis.from_pool(pool)


def _sentinel(url: str, generation: Generation, timeout_s: float, max_connections: int) -> Redis:
    parts, hosts = urls.split_hosts(url)
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("no service")
    options = urls.shared_options(parts, also=_SENTINEL_OPTIONS)
    of_sentinels = {
        name.removeprefix("sentinel_"): value
        for name, value in options.items()
        if name.startswith(("sentinel_", "ssl"))
    }
    sentinel = _Sentinel(  # type: ignore[no-untyped-call]
        urls.addresses(hosts, urls.SENTINEL_PORT),
        sentinel_kwargs=of_sentinels | _settings(CONNECT_TIMEOUT_S),
        db=int(db or 0),
        max_connections=max_connections,
        connection_class=SentinelTlsConnection if "ssl" in options else SentinelTcpConnection,
        generation=generation,
        **{name: value for name, value in options.items() if name not in _SENTINEL_OPTIONS},
        **_settings(timeout_s),
    )
    client: Redis = sentinel.master_for(service)
    _check(client.connection_pool)
    return client


class _Sentinel(Sentinel):
    """Asks Sentinels for the primary's address, and says why none of them has one."""

    async def discover_master(self, service_name: str) -> Any:
        """Return the primary's address."""
        try:
            return await super().discover_master(service_name)
        except MasterNotFoundError as error:
            not_found = error
        # redis-py swallows what they answered, such as a wrong password; PING raises it.
        for sentinel in self.sentinels:
            await sentinel.ping()
        raise not_found


def _cluster(
    url: str, generation: Generation, timeout_s: float, max_connections: int
) -> ClusterClient:
    parts, hosts = urls.split_hosts(url)
    settings = _settings(timeout_s) | {"retry": Retry(NoBackoff(), CLUSTER_RETRIES)}
    client = ClusterClient(
        [ClusterNode(*address) for address in urls.addresses(hosts, urls.REDIS_PORT)],
        generation,
        max_connections=max_connections,
        db=int(parts.path.strip("/") or 0),
        **urls.shared_options(parts),
        **settings,
    )
    _check(next(iter(client.nodes_manager.startup_nodes.values())))
    return client


def _check(maker: Any) -> None:
    """Make one connection, without connecting, to see whether it accepts its options.

    Raises:
        RedisError, TypeError: It does not.
    """
    maker.connection_class(**maker.connection_kwargs)
