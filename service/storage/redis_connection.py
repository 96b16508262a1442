"""redis-py's connections, amended: none is used again once its server is no longer the primary.

A primary that was demoted behind one address (a managed endpoint, a Kubernetes Service, a TCP
balancer) keeps its connections open and answers on them. To redis-py its READONLY is a reply like
any other, so that nothing would ever lead away from it. So connections have a *generation*, which
all clients of one process for one REDIS_URL share:

    READONLY, MASTERDOWN                   the next generation begins
    a new connection finds another server  the next generation begins (not in Cluster)
    NOPERM                                 this connection alone is replaced: it is about its user

A connection of an earlier generation is replaced before its next use, also those of other callers
and those that only read. redis-py itself closes a connection on LOADING, NOAUTH and WRONGPASS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection
from redis.exceptions import (
    AskError,
    MasterDownError,
    NoPermissionError,
    ReadOnlyError,
    ResponseError,
)


class Generation:
    """The connections made since the primary last changed, as far as any of them has noticed.

    Args:
        one_server: Whether the connections all lead to one server, and not to those of a Cluster.
    """

    def __init__(self, *, one_server: bool) -> None:
        self.number = 0
        self._one_server = one_server
        self._run_id: bytes | None = None

    def start_next(self) -> None:
        """Have every connection made so far replaced before its next use."""
        self.number += 1

    def join(self, run_id: bytes) -> int:
        """Note which server a new connection has found; return the number of its generation."""
        if self._one_server and self._run_id not in (None, run_id):
            self.start_next()
        self._run_id = run_id
        return self.number


class _GenerationalConnection(AbstractConnection):
    """What the connections below share.

    Args:
        generation: What all connections of one process for one REDIS_URL share.
        options: redis-py's.

    Attributes:
        verified_needs: The `Needs` that this server's settings have been seen to meet, if any.
        expected_replicas: How many replicas were connected when it was last asked; 1 before.
    """

    def __init__(self, *, generation: Generation, **options: Any) -> None:
        super().__init__(**options)
        self._generation = generation
        self._generation_number = generation.number
        self.verified_needs: object = None
        self.expected_replicas = 1

    def should_reconnect(self) -> bool:
        """Return whether the connection must be replaced before it is used again."""
        is_stale = self.is_connected and self._generation_number != self._generation.number
        return is_stale or bool(super().should_reconnect())  # type: ignore[no-untyped-call]

    async def connect(self) -> None:
        """Connect, unless there is a connection that may be used."""
        if self.should_reconnect():
            await self.disconnect(nowait=True)
        if not self.is_connected:
            await super().connect()  # type: ignore[no-untyped-call]

    async def on_connect_check_health(self, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - redis-py's
        """Set up a new connection: forget the server before it, and ask which one this is."""
        self._generation_number = self._generation.number
        self.verified_needs = None
        self.expected_replicas = 1
        await super().on_connect_check_health(check_health)
        await self.send_command("INFO", "server", check_health=False)
        try:
            found = re.search(rb"run_id:(\w+)", await self.read_response())
        except ResponseError:
            # Busy, or a user without permission: then only READONLY shows another primary.
            return
        if found:
            self._generation_number = self._generation.join(found[1])

    async def _send_packed_command(self, command: Iterable[bytes]) -> None:
        # A task that finds a Cluster's nodes anew closes connections which others are about to use.
        # What redis-py then raises is no error of a connection.
        writer = self._writer
        if writer is None or writer.is_closing():
            raise ConnectionResetError("closed by another task")
        writer.writelines(command)
        await writer.drain()

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        """Read one reply; it decides whether the connection may be used again."""
        try:
            # Not super(): Sentinel's connections turn READONLY into a lost connection.
            return await AbstractConnection.read_response(self, *arguments, **options)
        except (ReadOnlyError, MasterDownError):
            if self._generation_number == self._generation.number:
                self._generation.start_next()
            raise
        except NoPermissionError:
            self.mark_for_reconnect()  # type: ignore[no-untyped-call]
            raise
        except AskError as error:
            # MOVED is a subclass. Without a host it means the host that was asked.
            if not error.host:
                error.host = getattr(self, "host", "")
                error.node_addr = (error.host, error.port)
            raise


class TcpConnection(_GenerationalConnection, Connection):
    """A connection over TCP."""


class TlsConnection(_GenerationalConnection, SSLConnection):
    """A connection over TLS."""


class SocketConnection(_GenerationalConnection, UnixDomainSocketConnection):
    """A connection over a Unix socket."""


class SentinelTcpConnection(_GenerationalConnection, SentinelManagedConnection):
    """A connection over TCP, to the server that the Sentinels call the primary."""


class SentinelTlsConnection(_GenerationalConnection, SentinelManagedSSLConnection):
    """A connection over TLS, to the server that the Sentinels call the primary."""


# Ours, by redis-py's class that a URL asks for.
CONNECTION_CLASSES: dict[Any, Any] = {
    Connection: TcpConnection,
    SSLConnection: TlsConnection,
    UnixDomainSocketConnection: SocketConnection,
}
