"""Listening, draining, stopping: uvicorn as a part of this process.

It does not know what a connection may do (`protocol`), what is answered (`web`), or when to stop:
`runtime` decides that.
"""

from __future__ import annotations

import contextlib
import math
import resource
import socket
from collections.abc import Callable, Iterator
from functools import partial

import structlog
import uvicorn
from starlette.types import ASGIApp

from ..errors import ConfigError
from .listener_state import ListenerState
from .protocol import GuardedProtocol

BACKLOG = 2048
# Of 1,000 clients that connect at once, the last waits a third as long as with one.
ACCEPTED_PER_TURN = 4
# What the kernel buffers of a connection in each direction, and so the most that one read returns.
# By default it buffers megabytes of what a client sends at once, or does not read.
SOCKET_BUFFER_BYTES = 64 * 1024
# Open files that are no connections of this listener: Redis, queues, the log, the admin port.
OTHER_FILES = 256

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Listener:
    """One application listening on one address.

    Args:
        app: The application.
        host: The address.
        port: The port; 0 lets the system choose.
        max_connections: How many connections may be open, if the limit on open files allows it.
        receive_timeout_s: Seconds a client has to send a whole request, and to take a response.
        keep_alive_s: Seconds a connection may be idle between requests.
        grace_s: Seconds that requests have to finish after `stop`.
        available_slots: Returns how many more requests the application can take.

    Raises:
        ConfigError: It is impossible to listen on the address.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        max_connections: int,
        receive_timeout_s: float,
        keep_alive_s: int,
        grace_s: float,
        available_slots: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._socket = _listening_socket(host, port, stalled_after_s=receive_timeout_s)
        self._state = ListenerState(
            receive_timeout_s=receive_timeout_s,
            max_connections=_affordable_connections(max_connections),
            available_slots=available_slots,
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                http=partial(GuardedProtocol, listener_state=self._state),  # type: ignore[arg-type]
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
        """The port listened on, chosen by the system if 0 was configured."""
        return int(self._socket.getsockname()[1])

    async def run(self) -> None:
        """Serve until `stop` is called, then let requests in flight finish."""
        # libuv accepts one connection of each socket in a loop turn, and under load a turn is long.
        more = [self._socket.dup() for _ in range(ACCEPTED_PER_TURN - 1)]
        await self._server.serve(sockets=[self._socket, *more])
        self._state.report_shed()

    def drain(self) -> None:
        """Answer each further request with `connection: close`."""
        self._state.draining = True

    def stop(self) -> None:
        """Close the listening socket and idle connections; finish requests in flight."""
        self.drain()
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _affordable_connections(connections: int) -> int:
    """Raise the limit on open files as needed; return how many of *connections* it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    affordable = min(connections, soft - min(OTHER_FILES, soft // 2))
    if affordable < connections:
        log.warning("connections.limited", most=affordable, open_files=soft)
    return affordable


def _listening_socket(host: str, port: int, *, stalled_after_s: float) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        ConfigError: It is impossible to listen on the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets whose protocol is named.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit these options.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # A client that does not acknowledge an answer in this time is cut off by the kernel.
        stalled_ms = math.ceil(stalled_after_s * 1000)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stalled_ms)
    try:
        listening.bind((host, port))
        # Two sockets may be bound to a port, and only one may listen.
        listening.listen(BACKLOG)
    except (OSError, UnicodeError):
        listening.close()
        problem = f"HOST, PORT or ADMIN_PORT: cannot listen on port {port} of that host"
        raise ConfigError([problem]) from None
    return listening
