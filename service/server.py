"""Listening: uvicorn with what it leaves open closed, and the stopping of it.

What is answered is `web`'s business; when to stop is decided by whoever awaits `Listener.run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from asyncio.events import TimerHandle
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ConfigError

MOST_HEADER_BYTES = 32 * 1024
BACKLOG = 2048


class _RefusedError(Exception):
    """Raised into the parser, it makes uvicorn answer 400 and close."""


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a deadline for receiving a request and a cap on its headers.

    uvicorn waits for ever for a first byte, for the rest of a header or of a body, and httptools
    takes headers of any size and transfer codings that nobody here decodes. The deadline runs
    from the connection or from a request's first byte to its last.
    """

    def __init__(self, *arguments: Any, receive_timeout_s: float, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._receive_timeout_s = receive_timeout_s
        self._deadline: TimerHandle | None = None
        self._header_bytes: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: the first request must come whole in time."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what is added to incomplete headers, and leave no connection without a clock."""
        if self._header_bytes is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes is not None and self._header_bytes > MOST_HEADER_BYTES:
            self.transport.close()
        elif self._deadline is None and self.timeout_keep_alive_task is None and self._is_idle():
            # Bytes that begin no request, such as empty lines, have stopped the keep-alive clock.
            self._arm()

    def on_message_begin(self) -> None:
        """Start the clock anew for a further request on the connection."""
        super().on_message_begin()
        self._header_bytes = 0
        if self._deadline is None:
            self._arm()

    def on_headers_complete(self) -> None:
        """Refuse what came in one piece and is too large, and codings other than chunked."""
        self._header_bytes = None
        size = len(self.url)
        for name, value in self.headers:
            size += len(name) + len(value)
            if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
                raise _RefusedError
        if size > MOST_HEADER_BYTES:
            raise _RefusedError
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the clock: the request is whole."""
        self._disarm()
        super().on_message_complete()

    def _is_idle(self) -> bool:
        cycle: Any = self.cycle  # None before the first request, whatever the annotation says
        return cycle is None or bool(cycle.response_complete)

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self._receive_timeout_s, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self.transport.close()


class Listener:
    """One application listening on one address.

    Raises:
        ConfigError: The address cannot be had.
    """

    def __init__(
        self,
        app: Starlette,
        *,
        host: str,
        port: int,
        receive_timeout_s: float,
        keep_alive_s: int,
        grace_s: float,
    ) -> None:
        self._socket = _bound(host, port)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=partial(GuardedProtocol, receive_timeout_s=receive_timeout_s),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=keep_alive_s,
                timeout_graceful_shutdown=math.ceil(grace_s),
            )
        )

    @property
    def port(self) -> int:
        """The port listened on, chosen by the system where 0 was asked for."""
        return int(self._socket.getsockname()[1])

    async def run(self) -> None:
        """Serve until told to stop, then let what is in hand finish."""
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Close the listening socket and finish what is in hand."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's server without its own ideas about signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle off only where the protocol is named.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, UnicodeError):
        listening.close()
        problem = f"HOST, PORT or ADMIN_PORT: cannot listen on port {port} of that host"
        raise ConfigError([problem]) from None
    listening.listen(BACKLOG)
    return listening
