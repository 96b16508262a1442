"""The laws of queues for `nats`, against a real server with JetStream."""
# ruff: noqa: E402 (what may be missing is imported after the skip)

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from service.errors import Unreachable
from service.transitions import cloudevents
from service.transitions.transition import StatusTransition
from tests.handlers import brokers
from tests.handlers.contract import Broker, Misconfigured, QueueLaws, Received, Refused, transition
from tests.support.servers import PATIENCE_S, free_port

brokers.client_installed("nats", "nats")

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, StreamConfig
from nats.js.errors import NoStreamResponseError, NotFoundError

from service.handlers.nats import _servers
from service.secret import Secret

SUBJECT = "identity.verifications"
NARROW = "identity.narrow"
FULL = "identity.full"
MAX_BYTES = 60_000
STREAMS = [
    StreamConfig(name="IDENTITY", subjects=[SUBJECT]),
    StreamConfig(name="NARROW", subjects=[NARROW], max_msg_size=4000),
    StreamConfig(name="FULL", subjects=[FULL], max_msgs=1, discard=DiscardPolicy.NEW),
]


def sized(total_bytes: int) -> StatusTransition:
    """Return a transition whose message has so many bytes, headers included."""
    message = cloudevents.message(transition("sized", 1, metadata={"x": ""}))
    headers = {**message.headers, "Nats-Msg-Id": message.id}
    lines = sum(len(name) + len(value) + len(": \r\n") for name, value in headers.items())
    rest = total_bytes - len(message.body) - lines - len("NATS/1.0\r\n\r\n")
    return transition("sized", 1, metadata={"x": "x" * rest})


class NatsBroker:
    """A server and one stream."""

    keeps = True
    drops_repeats = True

    def __init__(self, port: int, process: brokers.Process) -> None:
        self.port = port
        self._process = process

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the environment of the handler."""
        credentials = credentials or f"{brokers.USER}:{brokers.QUOTED_PASSWORD}"
        url = f"nats://{credentials}@127.0.0.1:{port or self.port}"
        return {"NATS_URL": url, "NATS_SUBJECT": SUBJECT}

    def refused(self) -> Iterable[Refused]:
        """Return what neither the server nor a stream will ever take."""
        ours, narrow = self.environ(), {**self.environ(), "NATS_SUBJECT": NARROW}
        large = transition("large", 1, metadata={"x": "x" * MAX_BYTES})
        edge = sized(MAX_BYTES + 1)
        medium = transition("medium", 1, metadata={"x": "x" * 5000})
        return [
            Refused("message_too_large", ours, large),
            Refused("message_too_large", ours, edge),
            Refused("message_too_large", narrow, medium),
        ]

    def refusing(self) -> Iterable[Refused]:
        """Return where nobody listens."""
        absent = {**self.environ(), "NATS_SUBJECT": "nobody.listens"}
        return [Refused("no_such_stream", absent, transition("a", 1))]

    @asynccontextmanager
    async def away(self) -> AsyncIterator[str]:
        """Delete the streams."""
        async with self.stream() as stream:
            for config in STREAMS:
                await stream.delete_stream(str(config.name))
        yield "no_such_stream"
        await self.empty()

    def misconfigured(self) -> Iterable[Misconfigured]:
        """Return what a check must find."""
        return [
            Misconfigured("NATS_URL", self.environ(credentials="identity:wrong")),
            Misconfigured("NATS_SUBJECT", {**self.environ(), "NATS_SUBJECT": "nobody.listens"}),
        ]

    async def empty(self) -> None:
        """Make the streams anew: emptied ones would remember the ids."""
        async with self.stream() as stream:
            for config in STREAMS:
                with contextlib.suppress(NotFoundError):
                    await stream.delete_stream(str(config.name))
                await stream.add_stream(config)

    async def received(self) -> list[Received]:
        """Return what the stream holds."""
        async with self.stream() as stream:
            state = (await stream.stream_info("IDENTITY")).state
            found = []
            for sequence in range(max(1, state.first_seq), state.last_seq + 1):
                message = await stream.get_msg("IDENTITY", sequence)
                headers = dict(message.headers or {})
                found.append(
                    Received(message.data or b"", headers.pop("Nats-Msg-Id"), None, headers)
                )
            return found

    def kill(self) -> None:
        """End the server."""
        self._process.kill()

    def start(self) -> None:
        """Start the server again."""
        self._process.start()

    def frozen(self) -> AbstractContextManager[None]:
        """Freeze the server."""
        return self._process.frozen()

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[JetStreamContext]:
        """Yield JetStream over a connection of its own."""
        client = Client()
        # The client takes what stands in a URL as it is, percent signs and all.
        await client.connect(
            f"nats://127.0.0.1:{self.port}",
            user=brokers.USER,
            password=brokers.PASSWORD,
            max_reconnect_attempts=3,
        )
        try:
            yield client.jetstream()
        finally:
            await client.close()


@contextmanager
def serving(directory: Path) -> Iterator[NatsBroker]:
    """Run a server with JetStream until the block is left."""
    port = free_port()
    process = brokers.nats(directory / "nats", port, most_bytes=MAX_BYTES)
    with brokers.running(process):
        yield NatsBroker(port, process)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Run a server for this module."""
    with serving(tmp_path_factory.mktemp("nats")) as broker:
        yield broker


@pytest.mark.xdist_group("nats")
class TestNats(QueueLaws):
    """NATS JetStream keeps the laws."""

    opener = "service.handlers.nats:open"

    async def test_the_largest_message_is_taken(self, broker: Broker) -> None:
        """What the server allows, headers included, is delivered to the last byte."""
        largest = sized(MAX_BYTES)
        async with self.opened(broker.environ()) as handler:
            await handler(largest)

        [received] = await broker.received()
        assert received.body == cloudevents.message(largest).body

    async def test_a_full_stream_is_waited_for(self, broker: Broker) -> None:
        """A stream that takes no more is like a queue that is away: nothing is counted or lost."""
        full = {**broker.environ(), "NATS_SUBJECT": FULL}
        async with self.opened(full) as handler:
            await handler(transition("a", 1))
            for _ in range(2):
                with pytest.raises(ConnectionError):
                    await handler(transition("a", 2))

    async def test_a_sealed_stream_is_waited_for(self, broker: NatsBroker) -> None:
        """What an operator may mend is no message's fault."""
        async with broker.stream() as stream:
            await stream.update_stream(dataclasses.replace(STREAMS[0], sealed=True))
        async with self.opened(broker.environ()) as handler:
            with pytest.raises(Unreachable, match=r"^stream_refused$"):
                await handler(transition("a", 1))

    async def test_a_stream_without_a_leader_is_waited_for(
        self, broker: NatsBroker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody answers, but the stream is known: that is a cluster's bad moment, no refusal."""

        async def publish(*_: object, **__: object) -> NoReturn:
            raise NoStreamResponseError

        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            monkeypatch.setattr(JetStreamContext, "publish", publish)
            with pytest.raises(ConnectionError):
                await handler(transition("a", 2))

    async def test_one_of_several_servers_is_enough(self, broker: Broker) -> None:
        """Servers that are away do not matter while one answers; the first's credentials do."""
        several = broker.environ(free_port())
        several["NATS_URL"] += f",nats://127.0.0.1:{broker.port},nats://127.0.0.1:{free_port()}"
        async with self.opened(several) as handler:
            await handler(transition("a", 1))

        assert len(await broker.received()) == 1

    async def test_a_lost_connection_is_noticed_at_once(self, broker: Broker) -> None:
        """Calls that wait for an acknowledgement are not left to their time limit."""
        async with self.proxied(broker) as (handler, proxy):
            await handler(transition("a", 1))
            proxy.delay_s = 10 * PATIENCE_S
            calls = [asyncio.ensure_future(handler(transition(f"b{n}", 1))) for n in range(5)]
            await asyncio.sleep(0.1)
            proxy.cut()
            async with asyncio.timeout(PATIENCE_S / 2):
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(outcome, ConnectionError) for outcome in outcomes)


@pytest.mark.parametrize(
    ("urls", "wanted"),
    [
        ("nats://h:1", {"servers": ["nats://h:1"]}),
        ("nats://to%2Fken@h:1", {"servers": ["nats://h:1"], "token": "to/ken"}),
        (
            "tls://a:b%40@h:1,tls://i:2",
            {"servers": ["tls://h:1", "tls://i:2"], "user": "a", "password": "b@"},
        ),
    ],
)
def test_credentials_are_taken_out_of_the_urls(urls: str, wanted: dict[str, object]) -> None:
    """The client receives addresses without credentials, and these as they were before quoting."""
    assert _servers(Secret(urls)) == wanted
