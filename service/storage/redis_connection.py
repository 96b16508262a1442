"""redis-py's connections, mended: each is left once its server is the primary no more.

A primary that was demoted behind one address (a managed endpoint, a Kubernetes Service, a TCP
balancer) keeps its connections open and answers on them. To redis-py its READONLY is a reply like
any other, so nothing would ever lead away from it. Here such a reply ends a *term*, and so does a
connection that finds another server than those before it: every connection of an earlier term is
made anew before it is used again, also those of other callers and those that only read. A reply
that is about this one connection's user replaces that one only.

redis-py itself closes a connection that answers LOADING, NOAUTH or WRONGPASS.
"""

from __future__ import annotations

import re
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


class Term:
    """The time for which one server is the primary, as far as some connections have been told.

    Args:
        one_server: Whether the connections all lead to one server, and not to those of a Cluster.
    """

    def __init__(self, *, one_server: bool) -> None:
        self.number = 0
        self._one_server = one_server
        self._run_id: bytes | None = None

    def end(self) -> None:
        """Have every connection made so far replaced before its next use."""
        self.number += 1

    def meet(self, run_id: bytes) -> int:
        """Note which server a connection has found; return the number of its term."""
        if self._one_server and self._run_id not in (None, run_id):
            self.end()
        self._run_id = run_id
        return self.number


class _Mended(AbstractConnection):
    """What the connections below share.

    Args:
        term: What all connections of one process to one REDIS_URL share.
        options: redis-py's.

    Attributes:
        met: What this server has been seen to be configured for, as `exchange` needs it.
        replicas: How many replicas this server had when it was last asked; 1 before.
    """

    def __init__(self, *, term: Term, **options: Any) -> None:
        super().__init__(**options)
        self._term = term
        self._made_in = term.number
        self.met: object = None
        self.replicas = 1

    def should_reconnect(self) -> bool:
        """Say whether the connection must not be used again as it is."""
        is_stale = self.is_connected and self._made_in != self._term.number
        return is_stale or bool(super().should_reconnect())  # type: ignore[no-untyped-call]

    async def connect(self) -> None:
        """Connect, unless there is a connection that may be used."""
        if self.should_reconnect():
            await self.disconnect(nowait=True)
        if not self.is_connected:
            await super().connect()  # type: ignore[no-untyped-call]

    async def on_connect_check_health(self, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - redis-py's
        """Begin to speak: what was known of another server does not count."""
        self._made_in = self._term.number
        self.met = None
        self.replicas = 1
        await super().on_connect_check_health(check_health)
        await self.send_command("INFO", "server", check_health=False)
        try:
            found = re.search(rb"run_id:(\w+)", await self.read_response())
        except ResponseError:
            # Busy, or a user that may not ask: then only a reply tells of another primary.
            return
        if found:
            self._made_in = self._term.meet(found[1])

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        """Read one reply; it decides whether the connection is used again."""
        try:
            # Not that of Sentinel's connections, in which READONLY is a lost connection.
            return await AbstractConnection.read_response(self, *arguments, **options)
        except (ReadOnlyError, MasterDownError):
            if self._made_in == self._term.number:
                self._term.end()
            raise
        except NoPermissionError:
            self.mark_for_reconnect()  # type: ignore[no-untyped-call]
            raise
        except AskError as error:
            # MOVED is one too. Without a host it means: on the host that you have asked.
            if not error.host:
                error.host = getattr(self, "host", "")
                error.node_addr = (error.host, error.port)
            raise


class TcpConnection(_Mended, Connection):
    """One over TCP."""


class TlsConnection(_Mended, SSLConnection):
    """One over TLS."""


class SocketConnection(_Mended, UnixDomainSocketConnection):
    """One over a Unix socket."""


class SentinelTcpConnection(_Mended, SentinelManagedConnection):
    """One over TCP, to the server that the Sentinels call the primary."""


class SentinelTlsConnection(_Mended, SentinelManagedSSLConnection):
    """One over TLS, to the server that the Sentinels call the primary."""


MENDED: dict[Any, Any] = {
    Connection: TcpConnection,
    SSLConnection: TlsConnection,
    UnixDomainSocketConnection: SocketConnection,
}
