"""The laws of queues for `rabbitmq`, against a real node."""
# ruff: noqa: E402 (what may be missing is imported after the skip)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import structlog.testing

from service.delivery.dispatcher import Dispatcher
from service.delivery.retries import CircuitBreakers
from service.errors import Unreachable
from service.transitions.cloudevents import message
from tests.handlers import brokers
from tests.handlers.contract import (
    POLICY,
    Broker,
    Misconfigured,
    QueueLaws,
    Received,
    Refused,
    check,
    in_order,
    transition,
)
from tests.support.dispatching import FakeConsumer
from tests.support.harness import takes_long
from tests.support.servers import PATIENCE_S, free_port, until

brokers.client_installed("aio_pika", "rabbitmq")

import aio_pika
from aio_pika.abc import AbstractConnection, AbstractQueue
from aiormq.abc import FieldTable

from service.handlers import rabbitmq

EXCHANGE = "identity"
KEY = "verifications"
MAX_BYTES = 60_000


class RabbitmqBroker:
    """A node with one exchange and one durable queue."""

    keeps = True
    drops_repeats = False

    def __init__(self, port: int, process: brokers.Process) -> None:
        self.port = port
        self._process = process

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the environment of the handler."""
        credentials = credentials or f"{brokers.USER}:{brokers.QUOTED_PASSWORD}"
        return {
            "RABBITMQ_URL": f"amqp://{credentials}@127.0.0.1:{port or self.port}/",
            "RABBITMQ_EXCHANGE": EXCHANGE,
            "RABBITMQ_ROUTING_KEY": KEY,
        }

    def refused(self) -> Iterable[Refused]:
        """Return what the node will never take."""
        large = transition("large", 1, metadata={"x": "x" * MAX_BYTES})
        return [Refused("message_too_large", self.environ(), large)]

    def refusing(self) -> Iterable[Refused]:
        """Return where nothing is taken."""
        ours, one = self.environ(), transition("a", 1)
        default = {**ours, "RABBITMQ_EXCHANGE": ""}
        return [
            Refused("unroutable", {**ours, "RABBITMQ_ROUTING_KEY": "nobody"}, one),
            Refused("unroutable", {**default, "RABBITMQ_ROUTING_KEY": "nobody"}, one),
            Refused("no_such_exchange", {**ours, "RABBITMQ_EXCHANGE": "absent"}, one),
        ]

    def misconfigured(self) -> Iterable[Misconfigured]:
        """Return what a check must find."""
        ours = self.environ()
        default = {**ours, "RABBITMQ_EXCHANGE": "", "RABBITMQ_ROUTING_KEY": "absent"}
        elsewhere = {**ours, "RABBITMQ_URL": ours["RABBITMQ_URL"] + "elsewhere"}
        return [
            Misconfigured("RABBITMQ_URL", self.environ(credentials="identity:wrong")),
            Misconfigured("RABBITMQ_URL", elsewhere),
            Misconfigured("RABBITMQ_EXCHANGE", {**ours, "RABBITMQ_EXCHANGE": "absent"}),
            Misconfigured("RABBITMQ_ROUTING_KEY", default),
        ]

    @asynccontextmanager
    async def away(self) -> AsyncIterator[str]:
        """Delete the queue; its exchange stays."""
        async with self._queue() as queue:
            await queue.delete(if_unused=False, if_empty=False)
        yield "unroutable"
        # Not purged: what is published as soon as it is there counts.
        async with self._queue():
            pass

    async def empty(self) -> None:
        """Declare the exchange and the queue, and purge it."""
        async with self._queue() as queue:
            await queue.purge()

    async def received(self) -> list[Received]:
        """Look at everything; what is not acknowledged goes back where it was."""
        async with self._queue() as queue:
            found = []
            while (message := await queue.get(fail=False)) is not None:
                headers = {name: str(value) for name, value in message.headers.items()}
                assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
                assert message.content_type == headers["content-type"]
                assert message.type == headers["type"]
                found.append(Received(message.body, message.message_id, None, headers))
            return found

    def kill(self) -> None:
        """End the node."""
        self._process.kill()

    def start(self) -> None:
        """Start the node again."""
        self._process.start()

    def frozen(self) -> AbstractContextManager[None]:
        """Freeze the node."""
        return self._process.frozen()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AbstractConnection]:
        """Yield a connection."""
        async with await aio_pika.connect(self.environ()["RABBITMQ_URL"]) as connection:
            yield connection

    @asynccontextmanager
    async def _queue(self) -> AsyncIterator[AbstractQueue]:
        async with self.connection() as connection:
            channel = await connection.channel()
            exchange = await channel.declare_exchange(EXCHANGE, "direct", durable=True)
            queue = await channel.declare_queue(KEY, durable=True)
            await queue.bind(exchange, KEY)
            yield queue


@contextmanager
def serving(directory: Path) -> Iterator[RabbitmqBroker]:
    """Run a node until the block is left."""
    port = free_port()
    epmd, node = brokers.rabbitmq(directory / "rabbitmq", port, most_bytes=MAX_BYTES)
    with brokers.running(epmd, node):
        yield RabbitmqBroker(port, node)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Run a node for this module."""
    with serving(tmp_path_factory.mktemp("rabbitmq")) as broker:
        yield broker


@pytest.mark.xdist_group("rabbitmq")
class TestRabbitmq(QueueLaws):
    """RabbitMQ keeps the laws."""

    opener = "service.handlers.rabbitmq:open"

    async def test_a_full_queue_is_waited_for(self, broker: RabbitmqBroker) -> None:
        """A queue that rejects is like one that is away: nothing is counted or lost."""
        full = {**broker.environ(), "RABBITMQ_EXCHANGE": "", "RABBITMQ_ROUTING_KEY": "full"}
        async with broker.connection() as connection:
            channel = await connection.channel()
            arguments: FieldTable = {"x-max-length": 1, "x-overflow": "reject-publish"}
            queue = await channel.declare_queue("full", durable=True, arguments=arguments)
            await queue.purge()
            async with self.opened(full) as handler:
                await check(handler)
                await handler(transition("a", 1))
                for _ in range(2):
                    with pytest.raises(Unreachable, match=r"^queue_refused$"):
                        await handler(transition("a", 2))
                await queue.purge()
                await handler(transition("a", 2))
            taken = await queue.get(no_ack=True)
            assert taken.body == message(transition("a", 2)).body

    async def test_what_is_not_allowed_is_waited_for(self, broker: RabbitmqBroker) -> None:
        """An exchange that takes nothing from us is the operator's matter, not a dead letter."""
        internal = {**broker.environ(), "RABBITMQ_EXCHANGE": "internal"}
        async with broker.connection() as connection:
            channel = await connection.channel()
            await channel.declare_exchange("internal", "direct", internal=True)
            async with self.opened(internal) as handler:
                with pytest.raises(Unreachable, match=r"^access_refused$"):
                    await handler(transition("a", 1))


@takes_long
@pytest.mark.xdist_group("rabbitmq")
async def test_a_queue_whose_node_restarts_loses_nothing(tmp_path: Path) -> None:
    """A durable queue is not there while its node is away; published to another, all is waited for.

    Two nodes, the queue on the second, the handler at the first.
    """
    ports = [free_port(), free_port()]
    epmd, *nodes = brokers.rabbitmq_cluster(tmp_path / "pair", ports, most_bytes=MAX_BYTES)
    consumer, circuits = FakeConsumer(), CircuitBreakers("queue", initial_delay_s=0.2)
    with brokers.running(epmd, *nodes), structlog.testing.capture_logs() as lines:
        first, second = (
            RabbitmqBroker(port, node) for port, node in zip(ports, nodes, strict=True)
        )
        await second.empty()
        async with rabbitmq.open(first.environ()) as handler:
            dispatcher = Dispatcher(
                "queue",
                handler,
                consumer,
                POLICY._replace(max_attempts=1),
                circuits=circuits,
                quarantine=asyncio.Lock(),
            )
            working = asyncio.create_task(dispatcher.run())
            consumer.add(*((f"n{n}", 1) for n in range(20)))
            await until(lambda: len(consumer.acked) == 20)
            await asyncio.to_thread(second.kill)
            consumer.add(*((f"n{n}", sequence) for sequence in (2, 3) for n in range(20)))
            await until(lambda: circuits.for_destination("").probes >= 3)
            await asyncio.to_thread(second.start)
            await until(lambda: len(consumer.acked) == 60, deadline_s=2 * PATIENCE_S)
            dispatcher.stop()
            await asyncio.wait_for(working, PATIENCE_S)
        received = await second.received()

    assert consumer.dead_letters == []
    assert in_order(received) == {f"vs_n{n}": [1, 2, 3] for n in range(20)}
    assert "unroutable" in {one.get("reason") for one in lines}
