"""The `nats` handler against a real server with JetStream."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from nats.js import JetStreamContext
from nats.js.errors import NoStreamResponseError

from service.errors import Unreachable
from service.handlers.nats import _servers
from service.secret import Secret
from service.transitions import cloudevents
from tests.handlers.contract import QueueContract, check
from tests.support.brokers import process
from tests.support.brokers.broker import transition
from tests.support.brokers.nats import (
    FULL,
    MAX_BYTES,
    STREAMS,
    NatsBroker,
    nats_server,
    run_broker,
    sized,
)
from tests.support.servers import free_port
from tests.support.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsBroker]:
    """Run a broker for this module."""
    with run_broker(tmp_path_factory.mktemp("nats")) as broker:
        yield broker


@pytest.mark.xdist_group("nats")
class TestNats(QueueContract):
    """The contract of every queue, and JetStream's own cases."""

    opener = "service.handlers.nats:open"

    @pytest.fixture(autouse=True)
    async def _client_errors(self) -> AsyncIterator[None]:
        """Ignore errors in the client's own task: closing a reset connection with unsent data."""
        loop = asyncio.get_running_loop()
        report = loop.get_exception_handler()
        assert report is not None

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            is_flusher = "Client._flusher()" in repr(context.get("future"))
            # Since Python 3.12 a closed transport may raise a TypeError for what is written to it.
            errors = (ConnectionError, TypeError)
            if not (is_flusher and isinstance(context.get("exception"), errors)):
                report(loop, context)

        loop.set_exception_handler(handle)
        yield
        # The errors are reported when the client's tasks are collected.
        gc.collect()
        loop.set_exception_handler(report)

    async def test_the_largest_message_is_taken(self, broker: NatsBroker) -> None:
        """A message of exactly the server's limit, headers included, is delivered."""
        largest = sized(MAX_BYTES)
        async with self.opened(broker.environ()) as handler:
            await handler(largest)

        [received] = await broker.received()
        assert received.body == cloudevents.message(largest).body

    async def test_a_full_or_sealed_stream_is_waited_for(self, broker: NatsBroker) -> None:
        """A stream that accepts no message at present is an unreachable queue."""
        full = {**broker.environ(), "NATS_SUBJECT": FULL}
        async with self.opened(full) as handler:
            await handler(transition("a", 1))
            for _ in range(2):
                with pytest.raises(Unreachable, match=r"^stream_refused$"):
                    await handler(transition("a", 2))
        async with broker.stream() as stream:
            await stream.update_stream(dataclasses.replace(STREAMS[0], sealed=True))
        async with self.opened(broker.environ()) as handler:
            with pytest.raises(Unreachable, match=r"^stream_refused$"):
                await handler(transition("a", 1))

    async def test_a_stream_without_a_leader_is_waited_for(
        self, broker: NatsBroker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No response to publishing from a stream that exists means that it has no leader."""
        publish = mock.AsyncMock(side_effect=NoStreamResponseError)
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            monkeypatch.setattr(JetStreamContext, "publish", publish)
            with pytest.raises(Unreachable, match=r"^stream_refused$"):
                await handler(transition("a", 2))

    async def test_a_server_without_jetstream_is_waited_for(self, tmp_path: Path) -> None:
        """Calls and checks name what is missing."""
        port = free_port()
        server = nats_server(tmp_path / "plain", port, has_jetstream=False)
        with process.running(server):
            async with self.opened(NatsBroker(port, server).environ()) as handler:
                for call in (handler(transition("a", 1)), check(handler)):
                    with pytest.raises(Unreachable, match=r"^jetstream_unavailable$"):
                        await call

    async def test_one_of_several_servers_is_enough(self, broker: NatsBroker) -> None:
        """The handler connects to any server of the list, with the credentials of the first."""
        several = broker.environ(free_port())
        several["NATS_URL"] += f",nats://127.0.0.1:{broker.port},nats://127.0.0.1:{free_port()}"
        async with self.opened(several) as handler:
            await handler(transition("a", 1))

        assert len(await broker.received()) == 1

    async def test_the_least_permissions_suffice(self, broker: NatsBroker) -> None:
        """The permissions in the table of queues are enough to check and to publish."""
        async with self.opened(broker.environ_of("publisher")) as handler:
            await check(handler)
            await handler(transition("a", 1))

        assert len(await broker.received()) == 1

    async def test_a_lost_connection_is_noticed_at_once(self, broker: NatsBroker) -> None:
        """Calls that wait for an acknowledgement fail at once when the connection is lost."""
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
def test_urls_become_arguments_of_the_client(urls: str, wanted: dict[str, object]) -> None:
    """Addresses have no credentials; user, password and token are unquoted."""
    assert _servers(Secret(urls)) == wanted
