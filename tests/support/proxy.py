"""A proxy between a client and Redis that a test can break: at a chosen request, or all at once.

A fault waits for a request that holds a given text (`EVALSHA`, say), so that the handshake of a
new connection does not use it up. Relies on what every client here does: it waits for the reply
before it sends the next request on a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import Enum
from urllib.parse import urlsplit

from tests.support.waiting import until

_CHUNK_BYTES = 65536


class Fault(Enum):
    """What happens to a request."""

    LOSE_REQUEST = "the connection is reset before Redis sees it"
    LOSE_REPLY = "Redis executes it; its reply is swallowed and the connection reset"


class Proxy:
    """Passes bytes on, but for the faults a test has asked for.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        delay_s: How long each reply is held back.
        refusing: Whether new connections are reset.
        requests: How many pieces of requests have passed: at least one for each round trip.
        happened: The faults that have come true, in order.
    """

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._faults: deque[tuple[Fault, bytes]] = deque()
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.delay_s = 0.0
        self.refusing = False
        self.requests = 0
        self.happened: list[Fault] = []

    @property
    def url(self) -> str:
        """The address to give to the client in place of Redis's."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many ends of connections are open, two for each."""
        return len(self._open)

    def break_next(self, fault: Fault, *, at: bytes = b"EVALSHA", times: int = 1) -> None:
        """Let *fault* befall the next requests that hold the bytes *at*, once each."""
        self._faults.extend([(fault, at)] * times)

    def mend(self) -> None:
        """Forget the faults that have not come true yet."""
        self._faults.clear()

    def aim(self, target: str) -> None:
        """Carry new connections to another address."""
        self._target = urlsplit(target)

    def cut(self) -> None:
        """Reset every connection there is."""
        for writer in list(self._open):
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to its end."""
        if self.refusing:
            writer.transport.abort()
            return
        async with contextlib.AsyncExitStack() as closing:
            try:
                from_redis, to_redis = await self._dial()
            except OSError:
                # Redis does not listen, so the proxy must look as if it did not either.
                writer.transport.abort()
                return
            for end in (writer, to_redis):
                self._open.add(end)
                closing.callback(end.transport.abort)
                closing.callback(self._open.discard, end)
            losing = asyncio.Event()

            async def request(chunk: bytes) -> bool:
                self.requests += 1
                match self._fault_at(chunk):
                    case Fault.LOSE_REQUEST:
                        return False
                    case Fault.LOSE_REPLY:
                        losing.set()
                to_redis.write(chunk)
                return True

            async def reply(chunk: bytes) -> bool:
                await asyncio.sleep(self.delay_s)
                if not losing.is_set():
                    writer.write(chunk)
                return not losing.is_set()

            pumps = [
                asyncio.create_task(_pump(reader, request)),
                asyncio.create_task(_pump(from_redis, reply)),
            ]
            closing.callback(lambda: [pump.cancel() for pump in pumps])
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._target.scheme == "unix":
            return await asyncio.open_unix_connection(self._target.path)
        return await asyncio.open_connection(self._target.hostname, self._target.port)

    def _fault_at(self, chunk: bytes) -> Fault | None:
        if not self._faults or self._faults[0][1] not in chunk:
            return None
        fault, _ = self._faults.popleft()
        self.happened.append(fault)
        return fault


@asynccontextmanager
async def proxy_to(target: str) -> AsyncIterator[Proxy]:
    """Yield a proxy to *target*, a `redis://host:port` or `unix://path` URL."""
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        with contextlib.suppress(TimeoutError):
            await until(lambda: not proxy.connections)


async def _pump(source: asyncio.StreamReader, pass_on: Callable[[bytes], Awaitable[bool]]) -> None:
    """Carry bytes until either side ends or *pass_on* says that it is over."""
    with contextlib.suppress(OSError):
        while (chunk := await source.read(_CHUNK_BYTES)) and await pass_on(chunk):
            pass
