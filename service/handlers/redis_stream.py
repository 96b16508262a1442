"""The `redis_stream` handler: XADD to a stream of any Redis or Valkey, our own or another.

A guard key per message deduplicates: while it exists, a repeated message is not appended again. In
Cluster, guards are in the slot of the stream.
"""
# ruff: noqa: RUF009 (each call in the body of the settings makes a dataclass field)

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    OutOfMemoryError,
    RedisClusterException,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .. import environment
from ..errors import ConfigError, Unreachable
from ..secret import Secret
from ..storage.batching import Batcher
from ..storage.connections import Connections, connect
from ..storage.redis_errors import error_word, is_unauthorized
from ..storage.scripts import Script, ScriptCall
from ..transitions import cloudevents
from ..transitions.transition import StatusTransition
from . import Handler
from .shared_connection import BrokerRefusedError, SharedConnection

MAX_PER_BATCH = 128

_APPEND = Script(__package__, "append_once.lua")
_LOST = (RedisConnectionError, RedisTimeoutError, RedisClusterException, OSError)
_REFUSED = (AuthenticationError, NoPermissionError)


@dataclass(frozen=True, kw_only=True)
class RedisStreamSettings:
    """Settings of the `redis_stream` handler."""

    redis_stream_url: Secret[str] = environment.setting(
        Secret("redis://127.0.0.1:6379/0"),
        environment.secret(environment.REDIS_URL),
        "URL of the Redis that holds the stream",
    )
    redis_stream_name: str = environment.setting(
        "verifications",
        environment.matching(r"[!-z|~]{1,256}", "a key without braces"),
        "Key of the stream",
    )
    redis_stream_max_entries: int = environment.integer(
        0, 0, 10**12, "Entries to trim the stream to, approximately; 0 to never trim"
    )
    redis_stream_dedup_window_s: int = environment.integer(
        86_400, 1, 31_536_000, "Seconds during which a repeated message is not appended again"
    )


class _Connection(NamedTuple):
    """The clients, and the batcher that sends many appends in one round trip."""

    connections: Connections
    appends: Batcher[ScriptCall, Any]


class RedisStream:
    """Appends each transition once."""

    def __init__(self, settings: RedisStreamSettings) -> None:
        self._settings = settings
        self._shared = SharedConnection(self._connect, lost=_LOST)

    async def __call__(self, transition: StatusTransition) -> None:
        """Append the message, unless its guard exists."""
        call = self._append(cloudevents.message(transition))
        async with self._shared.acquire() as connection:
            try:
                await connection.appends.submit(call)
            except ResponseError as error:
                raise _refusal(error) from None

    async def check(self) -> None:
        """Ask whether the key is a stream or free.

        Raises:
            ConfigError: The key holds another type, or Redis refuses the credentials.
            ConnectionError: Redis does not answer.
        """
        async with self._shared.acquire_for_check() as connection:
            try:
                kind = await connection.connections.client.type(self._settings.redis_stream_name)
            except _REFUSED:
                raise BrokerRefusedError(
                    "REDIS_STREAM_URL: Redis refuses the credentials"
                ) from None
        if kind not in (b"none", b"stream"):
            raise ConfigError(["REDIS_STREAM_NAME: the key holds another type"])

    async def aclose(self) -> None:
        """Close the connections."""
        await self._shared.close()

    def _append(self, message: cloudevents.Message) -> ScriptCall:
        stream = self._settings.redis_stream_name
        guard = f"{{{stream}}}:guard:{message.deduplication_id}"
        limits = (
            self._settings.redis_stream_dedup_window_s,
            self._settings.redis_stream_max_entries,
        )
        fields = [part for pair in message.headers.items() for part in pair]
        return ScriptCall(_APPEND, [stream, guard], [*limits, *fields, "body", message.body])

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[_Connection]:
        try:
            url = self._settings.redis_stream_url
            async with connect(url, setting="REDIS_STREAM_URL") as connections:
                appends: Batcher[ScriptCall, Any] = Batcher(
                    connections.run, max_items=MAX_PER_BATCH
                )
                try:
                    yield _Connection(connections, appends)
                finally:
                    # Before the clients: a connection opened after they are closed would leak.
                    await appends.close()
        except ConfigError as error:
            raise BrokerRefusedError(str(error)) from None


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler; connections are made on first use."""
    async with aclosing(RedisStream(environment.read(RedisStreamSettings, environ))) as handler:
        yield handler


def _refusal(error: ResponseError) -> Exception:
    """Return `Unreachable` if Redis would refuse any message, else an error that counts."""
    if is_unauthorized(error):
        return Unreachable("access_refused")
    if isinstance(error, OutOfMemoryError):
        return Unreachable("redis_full")
    word = error_word(error)
    if word == "WRONGTYPE":
        return Unreachable("not_a_stream")
    # ERR may be about the arguments of this call; READONLY, MISCONF, BUSY and the like are not.
    return RuntimeError(type(error).__name__) if word == "ERR" else Unreachable("redis_refused")
