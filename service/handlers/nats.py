"""The `nats` handler: one JetStream message per transition, acknowledged by the stream.

Needs the `nats` extra. Creates no stream; one must exist that contains the subject.
"""
# ruff: noqa: RUF009 (each call in the body of the settings makes a dataclass field)

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from nats.aio.client import Client
from nats.errors import Error
from nats.js import JetStreamContext
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError
from nats.protocol.parser import PERMISSIONS_ERR

from .. import environment
from ..errors import Undeliverable, Unreachable
from ..secret import Secret
from ..transitions import cloudevents
from ..transitions.transition import StatusTransition
from . import Handler
from .shared_connection import (
    CONNECT_TIMEOUT_S,
    BrokerRefusedError,
    SharedConnection,
    broker_url,
    disable_loggers,
)

DEDUPLICATION_HEADER = "Nats-Msg-Id"
# https://github.com/nats-io/nats-server/blob/main/server/errors.json
MESSAGE_EXCEEDS_MAXIMUM = 10054


@dataclass(frozen=True, kw_only=True)
class NatsSettings:
    """Settings of the `nats` handler."""

    nats_url: Secret[str] = environment.setting(
        Secret("nats://127.0.0.1:4222"),
        broker_url("nats", "tls", many=True),
        "NATS servers, separated by commas; the credentials of the first are used for all",
    )
    nats_subject: str = environment.setting(
        "verifications",
        environment.matching(r"[!-)+-=?-~]{1,255}", "a subject without wildcards"),
        "NATS subject",
    )


class _Connection(NamedTuple):
    """A client, and its JetStream context."""

    client: Client
    jetstream: JetStreamContext


class Nats:
    """Publishes each transition and waits for the stream's acknowledgement."""

    def __init__(self, settings: NatsSettings) -> None:
        self._settings = settings
        self._shared = SharedConnection(self._connect, lost=(Error, OSError), is_open=_is_open)

    async def __call__(self, transition: StatusTransition) -> None:
        """Publish; return when the stream has the message, from this call or an earlier one."""
        message = cloudevents.message(transition)
        headers = {**message.headers, DEDUPLICATION_HEADER: message.deduplication_id}
        async with self._shared.acquire() as connection:
            # The client checks the size of the body only. If body and headers together are too
            # large, the server closes the connection.
            if len(message.body) + _size(headers) > connection.client.max_payload:
                raise Undeliverable("message_too_large")
            try:
                await connection.jetstream.publish(
                    self._settings.nats_subject, message.body, headers=headers
                )
            except NoStreamResponseError:
                await self._require_stream(connection)
                raise self._refused(connection, "stream_refused") from None
            except APIError as error:
                if error.err_code == MESSAGE_EXCEEDS_MAXIMUM:
                    raise Undeliverable("message_too_large") from None
                # The stream is full, sealed or without a leader: not the message's fault.
                raise Unreachable("stream_refused") from None

    async def check(self) -> None:
        """Connect, and ask which stream contains the subject.

        Raises:
            ConfigError: The servers refuse the credentials, or no stream contains the subject.
            ConnectionError: No server answers.
        """
        async with self._shared.acquire_for_check() as connection:
            await self._require_stream(connection)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._shared.close()

    async def _require_stream(self, connection: _Connection) -> None:
        """Ask which stream contains the subject; its leader may be missing.

        Raises:
            BrokerRefusedError: No stream contains it.
            Unreachable: JetStream is not enabled, or cannot say.
        """
        try:
            await connection.jetstream.find_stream_name_by_subject(self._settings.nats_subject)
        except NotFoundError:
            problem = "NATS_SUBJECT: no stream contains it"
            raise BrokerRefusedError(problem, "no_such_stream") from None
        except APIError:
            raise self._refused(connection, "jetstream_unavailable") from None

    def _refused(self, connection: _Connection, reason: str) -> Unreachable:
        """Return the error. The next call connects anew: another server may be able to answer."""
        self._shared.discard(connection, reason)
        return Unreachable(reason)

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[_Connection]:
        client = Client()
        connection = _Connection(client, client.jetstream())

        async def discard(error: Exception | None = None) -> None:
            # A lost client does not fail the calls that wait for an acknowledgement. It calls
            # `closed_cb`, or only `error_cb` if a reset connection still had data to send. What
            # the user may not publish or subscribe to is reported to `error_cb` only, too.
            if PERMISSIONS_ERR in str(error):
                self._shared.discard(connection, "access_refused")
            elif error is None or isinstance(error, OSError):
                self._shared.discard(connection)

        try:
            await client.connect(
                **_servers(self._settings.nats_url),
                allow_reconnect=False,
                # Gives a server up after the second failed attempt; 0 would mean never.
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=int(CONNECT_TIMEOUT_S) - 1,
                # Also keeps the client from printing tracebacks, which is the default.
                error_cb=discard,
                closed_cb=discard,
            )
            yield connection
        except Error as error:
            if "authorization violation" in str(error).lower():
                raise BrokerRefusedError("NATS_URL: the servers refuse the credentials") from None
            raise
        finally:
            await client.close()


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler; the connection is made on first use."""
    disable_loggers("nats")
    async with aclosing(Nats(environment.read(NatsSettings, environ))) as handler:
        yield handler


def _is_open(connection: _Connection) -> bool:
    return connection.client.is_connected


def _size(headers: Mapping[str, str]) -> int:
    """Return the encoded size of headers: a version line, a line each, an empty line."""
    return len("NATS/1.0\r\n\r\n") + sum(len(f"{k}: {v}\r\n".encode()) for k, v in headers.items())


def _servers(urls: Secret[str]) -> dict[str, Any]:
    """Return the URLs as arguments of the client."""
    parts = [urlsplit(one) for one in urls.reveal().split(",")]
    found: dict[str, Any] = {
        "servers": [f"{one.scheme}://{one.netloc.rpartition('@')[2]}" for one in parts]
    }
    user, password = parts[0].username, parts[0].password
    if user and password:
        found |= {"user": unquote(user), "password": unquote(password)}
    elif user:
        found["token"] = unquote(user)
    return found
