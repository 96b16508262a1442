"""RabbitMQ nodes with one exchange and one durable queue."""
# ruff: noqa: E402 (the client may be missing)

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from tests.support import programs
from tests.support.brokers import process
from tests.support.brokers.broker import Received, Refused, WrongSettings, transition
from tests.support.servers import free_port

process.require_client("aio_pika", "rabbitmq")

import aio_pika
from aio_pika.abc import AbstractConnection, AbstractQueue

EXCHANGE = "identity"
KEY = "verifications"
MAX_BYTES = 60_000


class RabbitmqBroker(process.ProcessBroker):
    """A node with one exchange and one durable queue."""

    is_durable = True
    deduplicates = False

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the settings of the handler."""
        credentials = credentials or f"{process.USER}:{process.QUOTED_PASSWORD}"
        return {
            "RABBITMQ_URL": f"amqp://{credentials}@127.0.0.1:{port or self.port}/",
            "RABBITMQ_EXCHANGE": EXCHANGE,
            "RABBITMQ_ROUTING_KEY": KEY,
        }

    def undeliverable_messages(self) -> Iterable[Refused]:
        """Return a message that is too large."""
        large = transition("large", 1, metadata={"x": "x" * MAX_BYTES})
        return [Refused("message_too_large", self.environ(), large)]

    def refusing_destinations(self) -> Iterable[Refused]:
        """Return routing keys without a queue, and an exchange that does not exist."""
        ours, one = self.environ(), transition("a", 1)
        default = {**ours, "RABBITMQ_EXCHANGE": ""}
        return [
            Refused("unroutable", {**ours, "RABBITMQ_ROUTING_KEY": "unbound"}, one),
            Refused("unroutable", {**default, "RABBITMQ_ROUTING_KEY": "unbound"}, one),
            Refused("no_such_exchange", {**ours, "RABBITMQ_EXCHANGE": "absent"}, one),
        ]

    def wrong_settings(self) -> Iterable[WrongSettings]:
        """Return wrong credentials, and names that do not exist."""
        ours = self.environ()
        default = {**ours, "RABBITMQ_EXCHANGE": "", "RABBITMQ_ROUTING_KEY": "absent"}
        elsewhere = {**ours, "RABBITMQ_URL": ours["RABBITMQ_URL"] + "elsewhere"}
        return [
            WrongSettings("RABBITMQ_URL", self.environ(credentials="identity:wrong")),
            WrongSettings("RABBITMQ_URL", elsewhere),
            WrongSettings("RABBITMQ_EXCHANGE", {**ours, "RABBITMQ_EXCHANGE": "absent"}),
            WrongSettings("RABBITMQ_ROUTING_KEY", default),
        ]

    @asynccontextmanager
    async def queue_removed(self) -> AsyncIterator[str]:
        """Delete the queue; its exchange stays."""
        async with self._queue() as queue:
            await queue.delete(if_unused=False, if_empty=False)
        yield "unroutable"
        # Not purged: a message may already be there.
        async with self._queue():
            pass

    async def empty(self) -> None:
        """Declare the exchange and the queue, and purge it."""
        async with self._queue() as queue:
            await queue.purge()

    async def received(self) -> list[Received]:
        """Return every message; unacknowledged, they go back to their places."""
        async with self._queue() as queue:
            found = []
            while (message := await queue.get(fail=False)) is not None:
                headers = {name: str(value) for name, value in message.headers.items()}
                assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
                assert message.content_type == headers["content-type"]
                assert message.type == headers["type"]
                found.append(Received(message.body, message.message_id, None, headers))
            return found

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
def run_broker(directory: Path) -> Iterator[RabbitmqBroker]:
    """Run a node."""
    port = free_port()
    epmd, node = rabbitmq_cluster(directory / "rabbitmq", [port])
    with process.running(epmd, node):
        yield RabbitmqBroker(port, node)


def rabbitmq_cluster(directory: Path, ports: Sequence[int]) -> list[process.BrokerProcess]:
    """Return an epmd and the nodes of a cluster, or one node.

    Without the epmd, a node would start one that outlives it.
    """
    release = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"))
    server = programs.program("rabbitmq-server", "rabbitmq-server", *map(str, release))
    epmd_port = free_port()
    directory.mkdir(parents=True)
    environ = {
        # The nodes share the cookie that the first one writes here.
        "HOME": str(directory),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(epmd_port),
    }
    program = str(programs.program("epmd", "erlang-base"))
    command = [program, "-address", "127.0.0.1", "-port", str(epmd_port)]
    epmd = process.BrokerProcess(command, directory / "epmd", process.listens(epmd_port), environ)
    peers = "".join(
        f"cluster_formation.classic_config.nodes.{n} = identity{port}@localhost\n"
        for n, port in enumerate(ports, 1)
    )
    settings = (
        f"max_message_size = {MAX_BYTES}\n"
        f"default_user = {process.USER}\ndefault_pass = {process.PASSWORD}\n"
        f"{peers if len(ports) > 1 else ''}"
    )
    return [epmd, *(_rabbitmq_node(directory, port, server, settings, environ) for port in ports)]


def _rabbitmq_node(
    above: Path, port: int, server: Path, settings: str, environ: Mapping[str, str]
) -> process.BrokerProcess:
    directory = above / str(port)
    directory.mkdir()
    # Unprivileged ports, no plugins, and no file outside *directory*.
    own = {
        "RABBITMQ_NODENAME": f"identity{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        "RABBITMQ_CONF_ENV_FILE": str(directory / "absent"),
        # Makes the script become the node, so that its process id is the one we know.
        "RABBITMQ_ALLOW_INPUT": "1",
        "RABBITMQ_SERVER_START_ARGS": "-noinput",
        # Two schedulers suffice, and start faster.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none",
    }
    (directory / "enabled_plugins").write_text("[].\n")
    (directory / "rabbitmq.conf").write_text(settings)
    # RabbitMQ answers any other protocol with the name of its own.
    serves = process.answers(port, b"AMQP", ask=b"hello...")
    return process.BrokerProcess([str(server)], directory, serves, {**environ, **own})
