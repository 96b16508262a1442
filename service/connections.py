"""Redis clients with explicit settings, and the calling of scripts over them.

The only module that builds a client. Which keys exist is in `layout`; what the scripts decide is
in `inbox` and `mailbox`. redis-py's defaults are avoided on purpose: they retry writes for up to
a minute and, with maintenance notifications, hand out connections that the server has closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)
from redis.maint_notifications import MaintNotificationsConfig

from .cluster import ClusterClient
from .errors import ConfigError, Shortage
from .exchange import Exchanger
from .secret import Secret

CALL_TIMEOUT_S = 1.0
CONNECT_TIMEOUT_S = 0.5
POOL_WAIT_S = 0.25
CALL_CONNECTIONS = 32
CLUSTER_RETRIES = 2
# A blocking read holds its connection, and there may be one for each of at most 256 partitions.
BLOCKING_CONNECTIONS = 256
BLOCK_S = 2.0
# A blocking read's connection must outlive the block, or every idle read becomes an error.
BLOCKING_READ_TIMEOUT_S = BLOCK_S + 3.0
REPLICA_WAIT_MS = 500

SENTINEL_PORT = 26379
REDIS_PORT = 6379

_URL_OPTIONS = {"host", "port", "path", "db", "username", "password", "connection_class"}
_SENTINEL_OPTIONS = {"sentinel_username", "sentinel_password"}
_FILE_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}

Argument = str | bytes | int | float


class Script:
    """A Lua script of this package, addressed by its content."""

    def __init__(self, name: str) -> None:
        self.source = files(__package__).joinpath("lua", f"{name}.lua").read_text()
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class ScriptCall(NamedTuple):
    """One call of a script; all its keys share one partition."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Argument]


class Connections:
    """The Redis clients of one process: one for short calls, one for blocking reads."""

    def __init__(self, calls: Any, blocking: Any, *, is_cluster: bool) -> None:
        self.client = calls
        self.blocking_client = blocking
        self.is_cluster = is_cluster
        self._exchanger = None if is_cluster else Exchanger(calls.connection_pool)

    async def run(self, calls: Sequence[ScriptCall], *, replicas: int = 0) -> list[Any]:
        """Run *calls* in one round trip where the server's topology allows it.

        Args:
            calls: Scripts with their keys and arguments.
            replicas: How many replicas must have what was written before this returns.

        Returns:
            One reply or one `RedisError` per call, in order. Whoever gets a connection error or
            a time-out does not know whether the call was executed.
        """
        replies = await self._send(calls, by_content=False, replicas=replicas)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            again = await self._send(
                [calls[i] for i in unknown], by_content=True, replicas=replicas
            )
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return replies

    async def run_one(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument],
        *,
        replicas: int = 0,
    ) -> Any:
        """Run one script and return its reply; *replicas* as for `run`.

        Raises:
            RedisError: The call failed, or nobody knows whether it did.
        """
        [reply] = await self.run([ScriptCall(script, keys, arguments)], replicas=replicas)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def _send(
        self, calls: Sequence[ScriptCall], *, by_content: bool, replicas: int
    ) -> list[Any]:
        try:
            if self._exchanger is None:
                return await asyncio.gather(
                    *(self._send_to_slot(call, by_content, replicas) for call in calls),
                    return_exceptions=True,
                )
            commands = [_command(call, by_content=by_content) for call in calls]
            replies = await self._exchanger.exchange([*commands, *_wait(replicas)])
            return _confirmed(replies, replicas)
        except (RedisError, OSError) as error:
            return [error] * len(calls)

    async def _send_to_slot(self, call: ScriptCall, by_content: bool, replicas: int) -> Any:  # noqa: FBT001
        commands = [_command(call, by_content=by_content), *_wait(replicas)]
        [reply] = _confirmed(await self.client.speak(call.keys[0], commands), replicas)
        return reply


class NotReplicatedError(RedisError):
    """Fewer replicas than asked for have confirmed a write in time."""


@asynccontextmanager
async def connect(url: Secret[str]) -> AsyncIterator[Connections]:
    """Yield the clients for *url*; connections are made on first use and closed at the end.

    Forms: `redis://`, `rediss://`, `unix://`, and with several `host:port` parted by commas
    `redis+sentinel://…/service/db` and `redis+cluster://…` (`rediss+…` for TLS). With TLS, options
    name files: `ssl_ca_certs`, and `ssl_certfile` and `ssl_keyfile` of our own certificate.

    Raises:
        ConfigError: The URL is not of these forms.
    """
    try:
        text = url.reveal()
        build = _FORMS.get(text.partition("://")[0].partition("+")[2], _standalone)
        calls = build(text, CALL_TIMEOUT_S, CALL_CONNECTIONS)
        blocking = build(text, BLOCKING_READ_TIMEOUT_S, BLOCKING_CONNECTIONS)
    except (ValueError, TypeError):
        raise ConfigError(["REDIS_URL: not a usable URL"]) from None
    is_cluster = build is _cluster
    try:
        if is_cluster:
            # Used before this, a cluster client under concurrency runs some calls twice. Where no
            # node answers now, the first call tries again.
            with contextlib.suppress(RedisError, OSError):
                await calls.initialize()
                await blocking.initialize()
        yield Connections(calls, blocking, is_cluster=is_cluster)
    finally:
        await _close(calls)
        await _close(blocking)


def shortage(error: BaseException) -> Shortage:
    """Return the word for what *error* of redis-py means to whoever waits."""
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return Shortage.REDIS_SLOW
    if isinstance(error.__context__, ssl.SSLError):
        return Shortage.REDIS_UNTRUSTED
    if isinstance(error, RedisConnectionError | OSError | ClusterDownError):
        return Shortage.REDIS_UNREACHABLE
    if isinstance(error, NotReplicatedError) or str(error).startswith("NOREPLICAS"):
        return Shortage.NOT_DURABLE
    if isinstance(error, OutOfMemoryError):
        return Shortage.REDIS_FULL
    return Shortage.REDIS_REFUSED


def _command(call: ScriptCall, *, by_content: bool) -> tuple[Argument, ...]:
    head = ("EVAL", call.script.source) if by_content else ("EVALSHA", call.script.sha)
    return (*head, len(call.keys), *call.keys, *call.arguments)


def _wait(replicas: int) -> list[tuple[Argument, ...]]:
    """Return what, sent behind writes on their connection, waits until *replicas* have them."""
    return [("WAIT", replicas, REPLICA_WAIT_MS)] if replicas else []


def _confirmed(replies: list[Any], replicas: int) -> list[Any]:
    """Return the replies before WAIT's, or what it means that too few have confirmed them."""
    if not replicas:
        return replies
    *replies, confirmed = replies
    if not isinstance(confirmed, Exception) and int(confirmed) >= replicas:
        return replies
    return [reply if isinstance(reply, Exception) else NotReplicatedError() for reply in replies]


def _settings(timeout_s: float) -> dict[str, Any]:
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "legacy_responses": True,
        # Not told its name and version, Redis need not let our users tell it.
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def _standalone(url: str, timeout_s: float, most: int) -> Redis:
    options = _options(url) | _settings(timeout_s)
    pool = BlockingConnectionPool(max_connections=most, timeout=POOL_WAIT_S, **options)
    return _checked(Redis.from_pool(pool))


def _sentinel(url: str, timeout_s: float, most: int) -> Redis:
    parts, hosts = _several(url)
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("no service")
    options = _shared_options(parts, also=_SENTINEL_OPTIONS)
    of_sentinels = {
        name.removeprefix("sentinel_"): value
        for name, value in options.items()
        if name.startswith(("sentinel_", "ssl"))
    }
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        _addresses(hosts, SENTINEL_PORT),
        sentinel_kwargs=of_sentinels | _settings(CONNECT_TIMEOUT_S),
        db=int(db or 0),
        max_connections=most,
        **{name: value for name, value in options.items() if name not in _SENTINEL_OPTIONS},
        **_settings(timeout_s),
    )
    return _checked(sentinel.master_for(service))


def _cluster(url: str, timeout_s: float, most: int) -> ClusterClient:
    parts, hosts = _several(url)
    settings = _settings(timeout_s) | {"retry": Retry(NoBackoff(), CLUSTER_RETRIES)}
    return ClusterClient(
        startup_nodes=[ClusterNode(*address) for address in _addresses(hosts, REDIS_PORT)],
        max_connections=most,
        **_shared_options(parts),
        **settings,
    )


_FORMS: dict[str, Callable[[str, float, int], Any]]
_FORMS = {"sentinel": _sentinel, "cluster": _cluster}


def _options(url: str, *, also: Collection[str] = ()) -> dict[str, Any]:
    """Return what a URL of redis-py's says, refusing options that would undo our settings."""
    options = dict(parse_url(url))
    for name in options:
        if name not in {*_URL_OPTIONS, *also} and not name.startswith("ssl_"):
            raise ValueError("unknown option")
    if "connection_class" in options:
        for name in sorted(_FILE_OPTIONS & options.keys()):
            if not Path(str(options[name])).is_file():
                raise ConfigError([f"REDIS_URL: {name} names no file"])
    return options


def _shared_options(parts: SplitResult, *, also: Collection[str] = ()) -> dict[str, Any]:
    """Return user, password and TLS options of a URL that names several hosts."""
    user, at, _ = parts.netloc.rpartition("@")
    scheme = parts.scheme.partition("+")[0]
    options = _options(f"{scheme}://{user}{at}?{parts.query}", also=also)
    if options.pop("connection_class", None):
        options["ssl"] = True
    return options


def _checked(client: Redis) -> Redis:
    """Make one connection object, without connecting, to see whether it takes its options."""
    pool = client.connection_pool
    pool.connection_class(**pool.connection_kwargs)
    return client


async def _close(client: Any) -> None:
    await client.aclose()
    sentinel = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    if sentinel is not None:
        await sentinel.aclose()


def _several(url: str) -> tuple[SplitResult, str]:
    """Take the hosts out of a URL that names several, which `urlsplit` need not understand."""
    found = re.fullmatch(r"([^:/]+://(?:[^/?#]*@)?)([^/?#]+)(.*)", url)
    if found is None:
        raise ValueError("no hosts")
    return urlsplit(f"{found[1]}hosts{found[3]}"), found[2]


def _addresses(hosts: str, default_port: int) -> list[tuple[str, int]]:
    """Return the addresses of hosts parted by commas."""
    single = [urlsplit(f"//{host}") for host in hosts.split(",")]
    return [(one.hostname or "127.0.0.1", one.port or default_port) for one in single]
