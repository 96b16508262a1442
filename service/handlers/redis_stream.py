"""The `redis_stream` handler: XADD to a stream of any Redis or Valkey, the ledger's or another.

A guard key beside the stream makes a repeat harmless for as long as the guard lives. In Cluster
both share the stream's slot.
"""
# ruff: noqa: RUF009 (each call in the body of the settings makes a dataclass field)

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
    TryAgainError,
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
from .shared_connection import Link, RefusedError

MAX_PER_BATCH = 128

_APPEND = Script(__package__, "append_once.lua")
# Redis cannot take anything from anybody at the moment: a replica, full, or without a majority.
_PASSING = (OutOfMemoryError, ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError)
_REFUSED = (AuthenticationError, NoPermissionError)


@dataclass(frozen=True, kw_only=True)
class RedisStreamSettings:
    """What the `redis_stream` handler needs."""

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


class _Line(NamedTuple):
    """The clients, and what gathers appends for one round trip."""

    connections: Connections
    appends: Batcher[ScriptCall, Any]


class RedisStream:
    """Appends each transition once."""

    def __init__(self, settings: RedisStreamSettings) -> None:
        self._settings = settings
        lost = (RedisConnectionError, RedisTimeoutError, RedisClusterException, *_PASSING, OSError)
        self._link = Link(self._connect, lost=lost)

    async def __call__(self, transition: StatusTransition) -> None:
        """Append the message, unless its guard says that it is there."""
        call = self._append(cloudevents.message(transition))
        async with self._link.use() as line:
            try:
                await line.appends.submit(call)
            except _PASSING:
                raise
            except ResponseError as error:
                raise _refused(error) from None

    async def check(self) -> None:
        """Ask whether the key can be a stream of ours.

        Raises:
            ConfigError: It holds something else, or Redis refuses the credentials.
            ConnectionError: Redis does not answer.
        """
        async with self._link.examine() as line:
            try:
                kind = await line.connections.client.type(self._settings.redis_stream_name)
            except _REFUSED:
                raise RefusedError("REDIS_STREAM_URL: Redis refuses the credentials") from None
        if kind not in (b"none", b"stream"):
            raise ConfigError(["REDIS_STREAM_NAME: the key holds something else"])

    async def close(self) -> None:
        """Close the connections."""
        await self._link.close()

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
    async def _connect(self) -> AsyncIterator[_Line]:
        try:
            async with connect(self._settings.redis_stream_url) as connections:

                async def flush(calls: list[ScriptCall]) -> Sequence[Any]:
                    return await connections.run(calls)

                appends = Batcher(flush, max_items=MAX_PER_BATCH)
                try:
                    yield _Line(connections, appends)
                finally:
                    # A connection that is made after its pool was closed, nobody closes.
                    await appends.close()
        except ConfigError:
            raise RefusedError("REDIS_STREAM_URL: not a usable URL") from None


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler; connections are made on first use."""
    handler = RedisStream(environment.read(RedisStreamSettings, environ))
    try:
        yield handler
    finally:
        await handler.close()


def _refused(error: ResponseError) -> Exception:
    """Tell what Redis has against everybody from what may be this one call's."""
    if is_unauthorized(error):
        return Unreachable("access_refused")
    word = error_word(error)
    if word == "WRONGTYPE":
        return Unreachable("not_a_stream")
    # As MISCONF, BUSY, LOADING or NOREPLICAS; what begins with ERR may be about our arguments.
    return RuntimeError(type(error).__name__) if word == "ERR" else Unreachable("redis_refused")
