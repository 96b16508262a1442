"""The `nats` handler: JetStream, each message acknowledged by the stream.

Needs the `nats` extra. The stream that listens to the subject is yours; none is created here.
"""
# ruff: noqa: RUF009 (each call in the body of the settings makes a dataclass field)

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from nats.aio.client import Client
from nats.errors import Error
from nats.js import JetStreamContext
from nats.js.errors import (
    APIError,
    NoStreamResponseError,
    NotFoundError,
)

from .. import environment
from ..errors import Undeliverable, Unreachable
from ..secret import Secret
from ..transitions import cloudevents
from ..transitions.transition import StatusTransition
from . import Handler
from .shared_connection import CONNECT_TIMEOUT_S, Link, RefusedError, silence, url

DEDUPLICATION_HEADER = "Nats-Msg-Id"
# https://github.com/nats-io/nats-server/blob/main/server/errors.json
MESSAGE_EXCEEDS_MAXIMUM = 10054


@dataclass(frozen=True, kw_only=True)
class NatsSettings:
    """What the `nats` handler needs."""

    nats_url: Secret[str] = environment.setting(
        Secret("nats://127.0.0.1:4222"),
        url("nats", "tls", many=True),
        "NATS servers, separated by commas; the credentials of the first are used for all",
    )
    nats_subject: str = environment.setting(
        "verifications",
        environment.matching(r"[!-)+-=?-~]{1,255}", "a subject without wildcards"),
        "NATS subject",
    )


class _Line(NamedTuple):
    """A connection, and JetStream over it."""

    client: Client
    stream: JetStreamContext


class _NoStreamError(Unreachable):
    """No stream listens to the subject."""

    def __init__(self) -> None:
        super().__init__("no_such_stream")


class Nats:
    """Publishes each transition and waits for the stream's acknowledgement."""

    def __init__(self, settings: NatsSettings) -> None:
        self._settings = settings
        self._link = Link(self._connect, lost=(Error, OSError), is_open=_is_open)

    async def __call__(self, transition: StatusTransition) -> None:
        """Publish; return when the stream has stored the message, or had it already."""
        message = cloudevents.message(transition)
        headers = {**message.headers, DEDUPLICATION_HEADER: message.deduplication_id}
        async with self._link.use() as line:
            # The client measures the body alone; for the headers the server would hang up.
            if len(message.body) + _size(headers) > line.client.max_payload:
                raise Undeliverable("message_too_large")
            try:
                await line.stream.publish(
                    self._settings.nats_subject, message.body, headers=headers
                )
            except NoStreamResponseError:
                await self._ask_for_stream(line)
                raise
            except APIError as error:
                if error.err_code == MESSAGE_EXCEEDS_MAXIMUM:
                    raise Undeliverable("message_too_large") from None
                # Full, sealed, without its leader: whatever else it says is the stream's state.
                raise Unreachable("stream_refused") from None

    async def check(self) -> None:
        """Connect, and ask which stream listens to the subject.

        Raises:
            ConfigError: The servers refuse the credentials, or no stream listens.
            ConnectionError: No server answers.
        """
        async with self._link.examine() as line:
            try:
                await self._ask_for_stream(line)
            except _NoStreamError:
                problem = "NATS_SUBJECT: no stream listens to it"
                raise RefusedError(problem, "no_such_stream") from None

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()

    async def _ask_for_stream(self, line: _Line) -> None:
        """Tell a subject without a stream from a stream that has no leader at the moment."""
        try:
            await line.stream.find_stream_name_by_subject(self._settings.nats_subject)
        except NotFoundError:
            raise _NoStreamError from None

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[_Line]:
        client = Client()
        line = _Line(client, client.jetstream())

        async def gone() -> None:
            # The client leaves those who wait for an acknowledgement waiting.
            self._link.drop(line)

        try:
            await client.connect(
                **_servers(self._settings.nats_url),
                allow_reconnect=False,
                # With which a server that cannot be reached is asked twice and then given up.
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=int(CONNECT_TIMEOUT_S) - 1,
                error_cb=_ignore,
                closed_cb=gone,
            )
            yield line
        except Error as error:
            if "authorization violation" in str(error).lower():
                raise RefusedError("NATS_URL: the servers refuse the credentials") from None
            raise
        finally:
            await client.close()


@asynccontextmanager
async def open(environ: Mapping[str, str]) -> AsyncIterator[Handler]:  # noqa: A001 - the protocol's word
    """Yield the handler; the connection is made on first use."""
    silence("nats")
    handler = Nats(environment.read(NatsSettings, environ))
    try:
        yield handler
    finally:
        await handler.close()


async def _ignore(error: Exception) -> None:
    """Keep the client from writing tracebacks; what matters is raised to whoever publishes."""


def _is_open(line: _Line) -> bool:
    return line.client.is_connected


def _size(headers: Mapping[str, str]) -> int:
    """Return the length of the headers as they travel: a version line, a line each, a blank one."""
    return len("NATS/1.0\r\n\r\n") + sum(len(f"{k}: {v}\r\n".encode()) for k, v in headers.items())


def _servers(urls: Secret[str]) -> dict[str, Any]:
    """Return the client's arguments that the URLs stand for."""
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
