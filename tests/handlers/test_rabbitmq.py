"""The `rabbitmq` handler against a real node."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog.testing
from aiormq.abc import FieldTable

from service.errors import Unreachable
from service.handlers import rabbitmq
from service.transitions.cloudevents import message
from tests.handlers.contract import POLICY, QueueContract, check, sequences_of, steps
from tests.support.brokers import process
from tests.support.brokers.broker import transition
from tests.support.brokers.rabbitmq import RabbitmqBroker, rabbitmq_cluster, run_broker
from tests.support.depth import takes_long
from tests.support.dispatching import FakeConsumer, dispatching
from tests.support.servers import free_port
from tests.support.waiting import PATIENCE_S, until


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitmqBroker]:
    """Run a broker for this module."""
    with run_broker(tmp_path_factory.mktemp("rabbitmq")) as broker:
        yield broker


@pytest.mark.xdist_group("rabbitmq")
# aio-pika's finalizer of a connection makes this coroutine also where no loop runs: in a thread.
@pytest.mark.filterwarnings("ignore:coroutine 'Connection.close' was never awaited")
class TestRabbitmq(QueueContract):
    """The contract of every queue, and RabbitMQ's own cases."""

    opener = "service.handlers.rabbitmq:open"

    async def test_a_full_queue_is_waited_for(self, broker: RabbitmqBroker) -> None:
        """A full queue that rejects messages is an unreachable queue."""
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

    async def test_a_forbidden_exchange_is_waited_for(self, broker: RabbitmqBroker) -> None:
        """An exchange that refuses access is an unreachable queue, and no dead letter."""
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
    """A durable queue on a node that is down is unroutable, and waited for.

    Of two nodes, the handler is connected to the first, and the queue is on the second.
    """
    ports = [free_port(), free_port()]
    epmd, *nodes = rabbitmq_cluster(tmp_path / "pair", ports)
    consumer = FakeConsumer()
    with process.running(epmd, *nodes), structlog.testing.capture_logs() as lines:
        first, second = (
            RabbitmqBroker(port, node) for port, node in zip(ports, nodes, strict=True)
        )
        await second.empty()
        async with (
            rabbitmq.open(first.environ()) as handler,
            dispatching(consumer, handler, POLICY._replace(max_attempts=1)) as dispatcher,
        ):
            consumer.add(*steps("n", 20, [1]))
            await until(lambda: len(consumer.acked) == 20)
            await asyncio.to_thread(second.kill)
            consumer.add(*steps("n", 20, [2, 3]))
            await until(lambda: dispatcher._circuits.for_destination("").probes >= 3)
            await asyncio.to_thread(second.start)
            await until(lambda: len(consumer.acked) == 60, deadline_s=2 * PATIENCE_S)
        received = await second.received()

    assert consumer.dead_letters == []
    assert sequences_of(received) == {f"vs_n{n}": [1, 2, 3] for n in range(20)}
    assert "unroutable" in {one.get("reason") for one in lines}
