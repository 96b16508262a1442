"""One connection to a broker: made on first use, thrown away when it fails, closed at the end.

Knows no broker. Which errors mean that a connection is lost is said by the handler that owns it.
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

# Together below the usual time limit of a handler: a TimeoutError of the dispatcher's would count
# as a failed attempt, which an unreachable queue is not.
CONNECT_TIMEOUT_S = 3.0
PUBLISH_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0

Connection = TypeVar("Connection")


class RefusedError(Unreachable):
    """The broker is there, and what configuration says is wrong; trying again is not hopeless.

    Attributes:
        problem: What `check` tells, beginning with the variable's name; holds no value.
    """

    def __init__(self, problem: str, reason: str = "access_refused") -> None:
        super().__init__(reason)
        self.problem = problem


class Link(Generic[Connection]):
    """Holds at most one open connection.

    Args:
        connect: Opens a connection as a context; leaving it closes the connection. Both happen
            in one task, which is not that of any caller.
        lost: The client's errors that mean the connection, or the broker, is gone.
        is_open: Says whether a connection still looks good; asked before each use.
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
        self._current: _Life[Connection] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Connection]:
        """Yield the connection, opened if need be. Many may use it at once, each for a while.

        Raises:
            Unreachable: It could not be opened, was lost, or took longer than
                `PUBLISH_TIMEOUT_S`; the next use opens another.
        """
        life = self._alive()
        try:
            await asyncio.wait([life.opened])
            connection = life.connection()
            async with asyncio.timeout(PUBLISH_TIMEOUT_S) as limit:
                life.limits.add(limit)
                try:
                    yield connection
                finally:
                    life.limits.discard(limit)
        except Unreachable:
            raise
        except self._lost as error:
            self._end(life)
            slow = "timed_out" if isinstance(error, TimeoutError) else "connection_lost"
            raise Unreachable(unreachable_reason(error) or slow) from None

    @asynccontextmanager
    async def examine(self) -> AsyncIterator[Connection]:
        """Do as `use` does, for a check: what configuration got wrong is a `ConfigError`."""
        try:
            async with self.use() as connection:
                yield connection
        except RefusedError as error:
            raise ConfigError([error.problem]) from None

    def drop(self, connection: Connection) -> None:
        """Throw *connection* away, if it is still the one; its uses end in `Unreachable`."""
        if self._current is not None and self._current.is_of(connection):
            self._end(self._current)

    async def close(self) -> None:
        """Close the connection, if there is one, and wait for those thrown away."""
        if self._current is not None:
            self._end(self._current)
        await asyncio.gather(*self._tasks)

    def _alive(self) -> _Life[Connection]:
        life = self._current
        if life is not None and life.is_ready() and not self._is_open(life.opened.result()):
            self._end(life)
        if self._current is None:
            self._current = life = _Life()
            task = asyncio.create_task(self._live(life))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return life
        return self._current

    def _end(self, life: _Life[Connection]) -> None:
        if self._current is life:
            self._current = None
        life.end()

    async def _live(self, life: _Life[Connection]) -> None:
        """Open a connection for all who wait, and close it when it is over."""
        stack = AsyncExitStack()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                life.opened.set_result(await stack.enter_async_context(self._connect()))
            await life.over.wait()
        except Exception as error:  # noqa: BLE001 - whoever waits for the connection receives it
            life.opened.set_exception(error)
            self._end(life)
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await stack.aclose()


class _Life(Generic[Connection]):
    """One connection from opening to closing, and the time limits of all who are using it."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self.opened.add_done_callback(lambda opened: opened.cancelled() or opened.exception())
        self.over = asyncio.Event()
        self.limits: set[asyncio.Timeout] = set()

    def connection(self) -> Connection:
        """Return what was opened, unless meanwhile somebody else has lost it."""
        opened = self.opened.result()
        if self.over.is_set():
            raise Unreachable("connection_lost")
        return opened

    def is_ready(self) -> bool:
        return self.opened.done() and self.opened.exception() is None

    def is_of(self, connection: Connection) -> bool:
        return self.is_ready() and self.opened.result() is connection

    def end(self) -> None:
        """Let it be closed, and end every use now rather than at its own time limit."""
        self.over.set()
        for limit in self.limits:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())


def url(*schemes: str, many: bool = False) -> environment.Parser[Secret[str]]:
    """Return the kind of URLs with a host and one of *schemes*, or of several, by commas.

    What a client library would say of a wrong URL might quote the password in it.
    """
    expected = " or ".join(f"{scheme}://host:port" for scheme in schemes)

    def read(text: str) -> Secret[str]:
        for one in text.split(",") if many else [text]:
            parts = urlsplit(one)
            # Asking for the port raises ValueError where it is none.
            usable = parts.hostname and "," not in parts.hostname and parts.port != 0
            if parts.scheme not in schemes or not usable or not re.fullmatch(r"[!-~]+", one):
                raise ValueError(expected)
        return Secret(text)

    return environment.Parser(expected=expected, parse=read)


def silence(*loggers: str) -> None:
    """Keep client libraries from logging: what matters they raise, and lines may hold messages."""
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
