"""A NATS server with JetStream streams."""
# ruff: noqa: E402 (the client may be missing)

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from service.transitions import cloudevents
from service.transitions.transition import StatusTransition
from tests.support import programs
from tests.support.brokers import process
from tests.support.brokers.broker import Received, Refused, WrongSettings, transition
from tests.support.servers import free_port

process.require_client("nats", "nats")

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, StreamConfig
from nats.js.errors import NotFoundError

SUBJECT = "identity.verifications"
LOOK_UP = "$JS.API.STREAM.NAMES"
# What each user may do. The second has the least permissions that the handler needs.
USERS = {
    process.USER: {"publish": [">"], "subscribe": [">"]},
    "publisher": {"publish": [SUBJECT, LOOK_UP], "subscribe": ["_INBOX.>"]},
    "mute": {"publish": [LOOK_UP], "subscribe": ["_INBOX.>"]},
    "deaf": {"publish": [SUBJECT, LOOK_UP], "subscribe": ["nothing"]},
}
NARROW = "identity.narrow"
FULL = "identity.full"
MAX_BYTES = 60_000
STREAMS = [
    StreamConfig(name="IDENTITY", subjects=[SUBJECT]),
    StreamConfig(name="NARROW", subjects=[NARROW], max_msg_size=4000),
    StreamConfig(name="FULL", subjects=[FULL], max_msgs=1, discard=DiscardPolicy.NEW),
]


def sized(total_bytes: int) -> StatusTransition:
    """Return a transition whose message has *total_bytes*, headers included."""
    message = cloudevents.message(transition("sized", 1, metadata={"x": ""}))
    headers = {**message.headers, "Nats-Msg-Id": message.id}
    lines = sum(len(name) + len(value) + len(": \r\n") for name, value in headers.items())
    rest = total_bytes - len(message.body) - lines - len("NATS/1.0\r\n\r\n")
    return transition("sized", 1, metadata={"x": "x" * rest})


class NatsBroker(process.ProcessBroker):
    """A server and three streams; the handler publishes to the first."""

    is_durable = True
    deduplicates = True

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the settings of the handler."""
        credentials = credentials or f"{process.USER}:{process.QUOTED_PASSWORD}"
        url = f"nats://{credentials}@127.0.0.1:{port or self.port}"
        return {"NATS_URL": url, "NATS_SUBJECT": SUBJECT}

    def environ_of(self, user: str) -> dict[str, str]:
        """Return the settings with one of USERS."""
        return self.environ(credentials=f"{user}:{process.QUOTED_PASSWORD}")

    def undeliverable_messages(self) -> Iterable[Refused]:
        """Return messages that are too large for the server or for a stream."""
        ours, narrow = self.environ(), {**self.environ(), "NATS_SUBJECT": NARROW}
        large = transition("large", 1, metadata={"x": "x" * MAX_BYTES})
        edge = sized(MAX_BYTES + 1)
        medium = transition("medium", 1, metadata={"x": "x" * 5000})
        return [
            Refused("message_too_large", ours, large),
            Refused("message_too_large", ours, edge),
            Refused("message_too_large", narrow, medium),
        ]

    def refusing_destinations(self) -> Iterable[Refused]:
        """Return a subject without a stream, and users who may not publish or not subscribe."""
        one = transition("a", 1)
        absent = {**self.environ(), "NATS_SUBJECT": "no.stream"}
        refused = [self.environ_of(name) for name in ("mute", "deaf")]
        return [
            Refused("no_such_stream", absent, one),
            *(Refused("access_refused", environ, one) for environ in refused),
        ]

    @asynccontextmanager
    async def queue_removed(self) -> AsyncIterator[str]:
        """Delete the streams."""
        async with self.stream() as stream:
            for config in STREAMS:
                await stream.delete_stream(str(config.name))
        yield "no_such_stream"
        await self.empty()

    def wrong_settings(self) -> Iterable[WrongSettings]:
        """Return wrong credentials and a subject without a stream."""
        return [
            WrongSettings("NATS_URL", self.environ(credentials="identity:wrong")),
            WrongSettings("NATS_SUBJECT", {**self.environ(), "NATS_SUBJECT": "no.stream"}),
        ]

    async def empty(self) -> None:
        """Make the streams anew: a purged stream would remember the ids."""
        async with self.stream() as stream:
            for config in STREAMS:
                with contextlib.suppress(NotFoundError):
                    await stream.delete_stream(str(config.name))
                await stream.add_stream(config)

    async def received(self) -> list[Received]:
        """Return every message of the stream."""
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

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[JetStreamContext]:
        """Yield a JetStream context on a new connection."""
        client = Client()
        # Not in the URL: the client does not decode percent signs there.
        await client.connect(
            f"nats://127.0.0.1:{self.port}",
            user=process.USER,
            password=process.PASSWORD,
            max_reconnect_attempts=3,
        )
        try:
            yield client.jetstream()
        finally:
            await client.close()


@contextmanager
def run_broker(directory: Path) -> Iterator[NatsBroker]:
    """Run a server with JetStream."""
    port = free_port()
    server = nats_server(directory / "nats", port)
    with process.running(server):
        yield NatsBroker(port, server)


def nats_server(directory: Path, port: int, *, has_jetstream: bool = True) -> process.BrokerProcess:
    """Return a NATS server, with JetStream unless a test wants none."""
    directory.mkdir(parents=True)
    settings = directory / "nats.conf"
    users = [
        {"user": name, "password": process.PASSWORD, "permissions": permissions}
        for name, permissions in USERS.items()
    ]
    settings.write_text(
        f"listen: 127.0.0.1:{port}\nmax_payload: {MAX_BYTES}\n"
        + f"jetstream {{ store_dir: {directory} }}\n" * has_jetstream
        + f"authorization {{ users: {json.dumps(users)} }}\n"
    )
    command = [str(programs.program("nats-server", "nats-server")), "-c", str(settings)]
    return process.BrokerProcess(command, directory, process.answers(port, b"INFO "))
