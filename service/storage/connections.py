"""Redis clients with explicit settings, and the calling of scripts over them.

The only module that builds a client. Which keys exist is in `layout`; what the scripts decide is
in `inbox` and `mailbox`. redis-py's defaults are avoided on purpose: they retry writes for up to
a minute and, with maintenance notifications, hand out connections that the server has closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, NamedTuple

from redis.asyncio import BlockingConnectionPool, Connection, Redis, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)
from redis.maint_notifications import MaintNotificationsConfig

from ..errors import ConfigError, UnavailableReason
from ..secret import Secret
from ..telemetry.loop_lag import LOOP_LAG
from . import urls
from .cluster import ClusterClient
from .pipeline import NOTHING, Exchanger, Needs, NotKeptError, NotReplicatedError
from .redis_connection import MENDED, SentinelTcpConnection, SentinelTlsConnection, Term

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

_SENTINEL_OPTIONS = {"sentinel_username", "sentinel_password"}

Argument = str | bytes | int | float


class Script:
    """A Lua script of this package, addressed by its content."""

    def __init__(self, package: str, name: str) -> None:
        self.source = files(package).joinpath(name).read_text()
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class ScriptCall(NamedTuple):
    """One call of a script; all its keys share one partition."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Argument]


class Connections:
    """The Redis clients of one process: one for short calls, one for blocking reads."""

    def __init__(self, calls: Any, blocking: Any, term: Term, *, is_cluster: bool) -> None:
        self.client = calls
        self.blocking_client = blocking
        self.is_cluster = is_cluster
        self._term = term
        self._exchanger = None if is_cluster else Exchanger(calls.connection_pool)

    async def run(self, calls: Sequence[ScriptCall], *, needs: Needs = NOTHING) -> list[Any]:
        """Run *calls* in one round trip where the server's topology allows it.

        Args:
            calls: Scripts with their keys and arguments.
            needs: What must hold of what they write before this returns.

        Returns:
            One reply or one `RedisError` per call, in order. Whoever gets a connection error or
            a time-out does not know whether the call was executed.
        """
        replies = await self._send(calls, needs, by_content=False)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            again = await self._send([calls[i] for i in unknown], needs, by_content=True)
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return replies

    async def run_one(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument],
        *,
        needs: Needs = NOTHING,
    ) -> Any:
        """Run one script and return its reply; *needs* as for `run`.

        Raises:
            RedisError: The call failed, or nobody knows whether it did.
        """
        [reply] = await self.run([ScriptCall(script, keys, arguments)], needs=needs)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def replica_priorities(self) -> list[int]:
        """Return the `replica-priority` of each replica that Sentinel knows; none without Sentinel.

        Raises:
            RedisError: No Sentinel answers.
        """
        pool = getattr(self.client, "connection_pool", None)
        if not isinstance(pool, SentinelConnectionPool):
            return []
        [first, *_] = pool.sentinel_manager.sentinels
        known = await first.sentinel_slaves(pool.service_name)
        return [int(replica["slave-priority"]) for replica in known]

    def renew(self) -> None:
        """Have every connection made anew before its next use: what is known of it is not so."""
        self._term.end()

    async def _send(
        self, calls: Sequence[ScriptCall], needs: Needs, *, by_content: bool
    ) -> list[Any]:
        commands = [_command(call, by_content=by_content) for call in calls]
        try:
            if self._exchanger is not None:
                return await self._exchanger.exchange(commands, needs)
            keys = [call.keys[0] for call in calls]
            replies: list[Any] = await self.client.speak_all(
                [*zip(keys, commands, strict=True)], needs
            )
        except (RedisError, OSError) as error:
            return [error] * len(calls)
        return replies

    def place(self, key: str) -> str:
        """Return a name that is the same for all keys that one server holds."""
        return str(self.client.place(key)) if self.is_cluster else ""


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
        build = _FORMS.get(urls.topology(text), _standalone)
        term = Term(one_server=build is not _cluster)
        calls = build(text, term, CALL_TIMEOUT_S, CALL_CONNECTIONS)
        blocking = build(text, term, BLOCKING_READ_TIMEOUT_S, BLOCKING_CONNECTIONS)
    except (ValueError, TypeError):
        raise ConfigError(["REDIS_URL: not a usable URL"]) from None
    is_cluster = build is _cluster
    try:
        if is_cluster:
            # Used before this, a cluster client under concurrency runs some calls twice. Where no
            # node answers in time, the first call tries again.
            with contextlib.suppress(RedisError, OSError):
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await calls.initialize()
                    await blocking.initialize()
        yield Connections(calls, blocking, term, is_cluster=is_cluster)
    finally:
        await _close(calls)
        await _close(blocking)


def places(url: Secret[str]) -> str:
    """Return where *url* leads, as `host:port` or a path, for people to read; no user."""
    return urls.places(url.reveal())


def refusal(error: RedisError) -> str:
    """Return the word with which Redis itself has refused, such as `READONLY`, else nothing."""
    if not isinstance(error, ResponseError):
        return ""
    return error.status_code or str(error).partition(" ")[0]


def is_unauthorized(error: BaseException) -> bool:
    """Return whether Redis does not know the user, or does not let it do what was asked."""
    return isinstance(error, _UNAUTHORIZED) or any(text in str(error) for text in _SCRIPT_DENIED)


_UNAUTHORIZED = (AuthenticationError, AuthorizationError, NoPermissionError)
# What a script was not allowed to call, in the words of Redis 7.2 and Valkey, and of Redis 7.0.
_SCRIPT_DENIED = ("ACL failure in script", "The user executing the script can't run this command")

_SHORTAGES: tuple[tuple[tuple[type[BaseException], ...], UnavailableReason], ...]
_SHORTAGES = (
    ((RedisTimeoutError, TimeoutError), UnavailableReason.REDIS_SLOW),
    ((MasterDownError,), UnavailableReason.REDIS_REFUSED),
    ((RedisConnectionError, OSError, ClusterDownError), UnavailableReason.REDIS_UNREACHABLE),
    ((NotReplicatedError, NotKeptError), UnavailableReason.NOT_DURABLE),
    ((OutOfMemoryError,), UnavailableReason.REDIS_FULL),
)


def shortage(error: BaseException) -> UnavailableReason:
    """Return the word for what *error* of redis-py means to whoever waits."""
    # redis-py tells some of what goes wrong while connecting as a lost connection.
    for each in (error, error.__context__):
        if isinstance(each, ssl.SSLError):
            return UnavailableReason.REDIS_UNTRUSTED
        if each is not None and is_unauthorized(each):
            return UnavailableReason.REDIS_UNAUTHORIZED
    if str(error).startswith("NOREPLICAS"):
        return UnavailableReason.NOT_DURABLE
    for kinds, word in _SHORTAGES:
        if isinstance(error, kinds):
            # While we stood still ourselves, a time-out says nothing about Redis.
            is_ours = word is UnavailableReason.REDIS_SLOW and LOOP_LAG.was_blocked()
            return UnavailableReason.EVENT_LOOP_BLOCKED if is_ours else word
    return UnavailableReason.REDIS_REFUSED


def _command(call: ScriptCall, *, by_content: bool) -> tuple[Argument, ...]:
    head = ("EVAL", call.script.source) if by_content else ("EVALSHA", call.script.sha)
    return (*head, len(call.keys), *call.keys, *call.arguments)


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


def _standalone(url: str, term: Term, timeout_s: float, most: int) -> Redis:
    options = urls.options(url) | _settings(timeout_s)
    options["connection_class"] = MENDED[options.get("connection_class", Connection)]
    pool = BlockingConnectionPool(max_connections=most, timeout=POOL_WAIT_S, term=term, **options)
    return _checked(Redis.from_pool(pool))


def _sentinel(url: str, term: Term, timeout_s: float, most: int) -> Redis:
    parts, hosts = urls.several(url)
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
        max_connections=most,
        connection_class=SentinelTlsConnection if "ssl" in options else SentinelTcpConnection,
        term=term,
        **{name: value for name, value in options.items() if name not in _SENTINEL_OPTIONS},
        **_settings(timeout_s),
    )
    return _checked(sentinel.master_for(service))


class _Sentinel(Sentinel):
    """Asks Sentinels where the primary is, and tells why none of them says so."""

    async def discover_master(self, service_name: str) -> Any:
        """Return the primary's address."""
        try:
            return await super().discover_master(service_name)
        except MasterNotFoundError as error:
            not_found = error
        # redis-py has passed over what they refused with, like a wrong password.
        for sentinel in self.sentinels:
            await sentinel.ping()
        raise not_found


def _cluster(url: str, term: Term, timeout_s: float, most: int) -> ClusterClient:
    parts, hosts = urls.several(url)
    settings = _settings(timeout_s) | {"retry": Retry(NoBackoff(), CLUSTER_RETRIES)}
    return ClusterClient(
        [ClusterNode(*address) for address in urls.addresses(hosts, urls.REDIS_PORT)],
        term,
        max_connections=most,
        **urls.shared_options(parts),
        **settings,
    )


_FORMS: dict[str, Callable[[str, Term, float, int], Any]]
_FORMS = {"sentinel": _sentinel, "cluster": _cluster}


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
