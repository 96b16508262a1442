"""One connection to a broker, shared by all calls of a handler.

The first call that needs a connection starts to open it, and every call waits for that one attempt.
When a call finds the connection lost, all calls that use it fail at once instead of at their own
time limits, and the next call opens a new one. Opening and closing happen in a task of their own,
so that a canceled call disturbs no other.

Knows no broker: the handler says how to connect, and which errors mean that a connection is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from .. import environment
from ..errors import ConfigError, Unreachable
from ..secret import Secret
from .failures import unreachable_reason

# Connecting and publishing together stay below the usual time limit of a handler: that one would
# count a failed attempt, and an unreachable broker must not.
CONNECT_TIMEOUT_S = 3.0
PUBLISH_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0

Connection = TypeVar("Connection")


class BrokerRefusedError(Unreachable):
    """The broker answers and refuses our configuration, which the operator can correct.

    Attributes:
        problem: For `check`: the variable's name and what is wrong, without any value.
    """

    def __init__(self, problem: str, reason: str = "access_refused") -> None:
        super().__init__(reason)
        self.problem = problem


class SharedConnection(Generic[Connection]):
    """Holds at most one open connection.

    Args:
        connect: Opens a connection as a context; leaving the context closes it.
        lost: The client's errors that mean that the connection or the broker is gone.
        is_open: Whether a connection still looks usable; asked before each use.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Connection]],
        *,
        lost: tuple[type[Exception], ...],
        is_open: Callable[[Connection], bool] = lambda _: True,
    ) -> None:
        self._connect = connect
        self._lost: tuple[type[Exception], ...] = (TimeoutError, *lost)
        self._is_open = is_open
        self._current: _Lifetime[Connection] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """Yield the connection for one call, opening it first if necessary.

        Raises:
            Unreachable: It could not be opened, was lost, or the call took longer than
                `PUBLISH_TIMEOUT_S`. The next call opens another one.
        """
        lifetime = self._current_lifetime()
        try:
            # Not awaited itself: a canceled call would cancel the future of all.
            await asyncio.wait([lifetime.opened])
            connection = lifetime.connection()
            async with asyncio.timeout(PUBLISH_TIMEOUT_S) as timeout:
                lifetime.timeouts.add(timeout)
                try:
                    yield connection
                finally:
                    lifetime.timeouts.discard(timeout)
        except Unreachable:
            raise
        except self._lost as error:
            default = "timed_out" if isinstance(error, TimeoutError) else "connection_lost"
            self._end(lifetime, unreachable_reason(error) or default)
            raise Unreachable(lifetime.reason) from None

    @asynccontextmanager
    async def acquire_for_check(self) -> AsyncIterator[Connection]:
        """Like `acquire`, but a refused configuration is a `ConfigError`."""
        try:
            async with self.acquire() as connection:
                yield connection
        except BrokerRefusedError as error:
            raise ConfigError([error.problem]) from None

    def discard(self, connection: Connection, reason: str = "connection_lost") -> None:
        """Close *connection* if it is the current one; calls that use it end in `Unreachable`."""
        if self._current is not None and self._current.is_of(connection):
            self._end(self._current, reason)

    async def close(self) -> None:
        """Close the current connection, and wait for those that are being closed."""
        if self._current is not None:
            self._end(self._current)
        await asyncio.gather(*self._tasks)

    def _current_lifetime(self) -> _Lifetime[Connection]:
        """Return the lifetime of a usable connection, or begin a new one."""
        lifetime = self._current
        if lifetime is not None and lifetime.is_open() and not self._is_open(lifetime.connection()):
            self._end(lifetime)
        if self._current is None:
            self._current = _Lifetime()
            task = asyncio.create_task(self._run(self._current))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self._current

    def _end(self, lifetime: _Lifetime[Connection], reason: str = "connection_lost") -> None:
        if self._current is lifetime:
            self._current = None
        lifetime.end(reason)

    async def _run(self, lifetime: _Lifetime[Connection]) -> None:
        """Open a connection, wait until its lifetime is over, and close it."""
        stack = AsyncExitStack()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                lifetime.opened.set_result(await stack.enter_async_context(self._connect()))
            await lifetime.over.wait()
        except Exception as error:  # noqa: BLE001 - the calls that wait for the connection raise it
            lifetime.opened.set_exception(error)
        finally:
            # Where it could not be opened, each call that waits knows why.
            self._end(lifetime, "")
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await stack.aclose()


class _Lifetime(Generic[Connection]):
    """One connection from opening to closing, and the timeouts of the calls that use it."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        # Retrieves the exception, in case that no call waits any more.
        self.opened.add_done_callback(lambda opened: opened.cancelled() or opened.exception())
        self.over = asyncio.Event()
        self.timeouts: set[asyncio.Timeout] = set()
        # Why it is over; empty if it could not be opened.
        self.reason = ""

    def connection(self) -> Connection:
        """Return the open connection, unless another call has meanwhile lost it."""
        connection = self.opened.result()
        if self.over.is_set():
            raise Unreachable(self.reason)
        return connection

    def is_open(self) -> bool:
        return self.opened.done() and self.opened.exception() is None and not self.over.is_set()

    def is_of(self, connection: Connection) -> bool:
        return self.is_open() and self.opened.result() is connection

    def end(self, reason: str) -> None:
        """Let the connection be closed, and make every call that uses it time out now.

        All of them fail for the reason that is given first.
        """
        self.reason = self.reason or reason
        self.over.set()
        for timeout in self.timeouts:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())


def broker_url(*schemes: str, many: bool = False) -> environment.Parser[Secret[str]]:
    """Return a parser of URLs with a host and one of *schemes*; of several, separated by commas.

    URLs are checked here because a client library's error might quote the password.
    """
    expected = " or ".join(f"{scheme}://host:port" for scheme in schemes)

    def parse(text: str) -> Secret[str]:
        for one in text.split(",") if many else [text]:
            parts = urlsplit(one)
            # Reading the port raises ValueError if it is no number.
            usable = parts.hostname and "," not in parts.hostname and parts.port != 0
            if parts.scheme not in schemes or not usable or not re.fullmatch(r"[!-~]+", one):
                raise ValueError(expected)
        return Secret(text)

    return environment.Parser(expected=expected, parse=parse)


def disable_loggers(*names: str) -> None:
    """Keep client libraries from logging: they raise what matters, and may log messages."""
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
