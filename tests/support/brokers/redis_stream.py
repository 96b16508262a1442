"""A Redis with a stream, which has every write on its disk before it answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import redis

from tests.support import servers
from tests.support.brokers import process
from tests.support.brokers.broker import Received, Refused, WrongSettings, transition

STREAM = "identity:verifications"
TEXT = "identity:text"


class RedisBroker(process.ProcessBroker):
    """A server that syncs every write before it answers."""

    is_durable = True
    deduplicates = True

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the settings of the handler."""
        credentials = credentials or f":{process.QUOTED_PASSWORD}"
        url = f"redis://{credentials}@127.0.0.1:{port or self.port}"
        return {"REDIS_STREAM_URL": url, "REDIS_STREAM_NAME": STREAM}

    def undeliverable_messages(self) -> Iterable[Refused]:
        """Return nothing: Redis accepts every message that our own Redis can hold."""
        return []

    def refusing_destinations(self) -> Iterable[Refused]:
        """Return a key of another type."""
        text = {**self.environ(), "REDIS_STREAM_NAME": TEXT}
        return [Refused("not_a_stream", text, transition("a", 1))]

    def wrong_settings(self) -> Iterable[WrongSettings]:
        """Return wrong credentials and a key of another type."""
        return [
            WrongSettings("REDIS_STREAM_URL", self.environ(credentials=":wrong")),
            WrongSettings("REDIS_STREAM_URL", self.environ(credentials="someone:wrong")),
            WrongSettings("REDIS_STREAM_NAME", {**self.environ(), "REDIS_STREAM_NAME": TEXT}),
        ]

    @asynccontextmanager
    async def queue_removed(self) -> AsyncIterator[str]:
        """Replace the stream by a string."""
        with self.client() as client:
            client.set(STREAM, "text")
        yield "not_a_stream"
        await self.empty()

    async def empty(self) -> None:
        """Flush everything, and set the key that is no stream."""
        with self.client() as client:
            client.flushall()
            client.set(TEXT, "text")

    async def received(self) -> list[Received]:
        """Return every entry of the stream."""
        with self.client() as client:
            found = []
            for _, fields in client.xrange(STREAM):
                headers = {name.decode(): value.decode() for name, value in fields.items()}
                headers.pop("body")
                found.append(Received(fields[b"body"], headers["id"], None, headers))
            return found

    def client(self) -> redis.Redis:
        """Return a plain client."""
        return redis.Redis(port=self.port, password=process.PASSWORD, socket_timeout=30)


@contextmanager
def run_broker(directory: Path) -> Iterator[RedisBroker]:
    """Run a server."""
    port = servers.free_port()
    own = ("--port", str(port), "--bind", "127.0.0.1", "--requirepass", process.PASSWORD)
    durable = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
    ask = f"AUTH {process.PASSWORD}\r\nPING\r\n".encode()
    server = process.BrokerProcess(
        [str(servers.binary()), *own, *durable],
        directory / "redis_stream",
        process.answers(port, b"+OK\r\n+PONG", ask=ask),
    )
    with process.running(server):
        yield RedisBroker(port, server)
