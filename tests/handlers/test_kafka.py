"""The laws of every queue for `kafka`, and what only Kafka has."""
# ruff: noqa: E402 (what may be missing is imported after the skip)

from __future__ import annotations

import asyncio
import shutil
import ssl
import struct
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from service.errors import ConfigError, Undeliverable
from service.handlers import Handler
from tests.handlers import brokers
from tests.handlers.contract import (
    BOUND_S,
    Load,
    Misconfigured,
    QueueLaws,
    Received,
    Refused,
    check,
    in_order,
    persist,
    transition,
)
from tests.handlers.mock_kafka import MISSING, MockKafka, library, mock_kafka
from tests.support import programs
from tests.support.proxy import Proxy

brokers.client_installed("aiokafka", "kafka")

from service.handlers import kafka
from service.transitions.cloudevents import message


class Broker(MockKafka):
    """What the laws ask of a broker."""

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the settings."""
        who = credentials and f"{credentials}@"
        return {
            "KAFKA_URL": f"kafka://{who}127.0.0.1:{port or self.port}",
            "KAFKA_TOPIC": self.topic,
        }

    def refused(self) -> Iterable[Refused]:
        """Return what is refused for good."""
        huge = transition("huge", 1, metadata={"key": "x" * 1_100_000})
        return [Refused("message_too_large", self.environ(), huge)]

    def refusing(self) -> Iterable[Refused]:
        """Return a topic that is not there."""
        missing = {**self.environ(), "KAFKA_TOPIC": "missing"}
        return [Refused("no_such_topic", missing, transition("a", 1))]

    @asynccontextmanager
    async def away(self) -> AsyncIterator[str]:
        """Do nothing: the stand-in cannot lose its topic."""
        yield ""

    def misconfigured(self) -> Iterable[Misconfigured]:
        """Return what a check finds."""
        return [Misconfigured("KAFKA_TOPIC", {**self.environ(), "KAFKA_TOPIC": "missing"})]

    async def received(self) -> list[Received]:
        """Return the records since `empty`."""
        return [
            Received(
                record.value,
                None,
                record.key.decode(),
                {name: value.decode() for name, value in record.headers},
            )
            for record in await self.records()
        ]


@contextmanager
def serving(directory: Path) -> Iterator[Broker]:
    """Run a broker until the block is left; it writes nothing."""
    if library() is None:
        programs.missing(MISSING)
    with mock_kafka() as process:
        yield Broker(process)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Run a broker for this module."""
    with serving(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


class TestKafka(QueueLaws):
    """A broker names the address to which its clients go on, so a proxy's is named by it."""

    opener = "service.handlers.kafka:open"

    @asynccontextmanager
    async def proxied(self, broker: Broker) -> AsyncIterator[tuple[Handler, Proxy]]:  # type: ignore[override]  # our own broker
        """Yield a handler that stays behind a proxy."""
        async with super().proxied(broker) as (handler, proxy):
            with broker.advertising(proxy.port):
                yield handler, proxy

    async def test_a_cut_connection_loses_nothing(self, broker: Broker) -> None:  # type: ignore[override]  # our own broker
        """As for every queue; but its client mends a cut by itself, so no call need fail."""
        async with self.proxied(broker) as (handler, proxy):
            load = Load(handler, 20, "c")
            async with load.running():
                for _ in range(6):
                    await load.more(60)
                    proxy.cut()
                proxy.refusing = True
                proxy.cut()
                await asyncio.sleep(0.3)
                proxy.refusing = False
                await load.more(60)

        await self._nothing_lost(broker, load.confirmed)

    async def test_a_record_lies_as_bytes_in_the_partition_of_its_key(self, broker: Broker) -> None:
        """Key and headers are bytes; a session has one partition, and many sessions have all."""
        async with self.opened(broker.environ()) as handler:
            sent = [transition(f"s{n}", sequence) for sequence in (1, 2) for n in range(40)]
            await asyncio.gather(*(handler(one) for one in sent))

        places = defaultdict(set)
        for record in await broker.records():
            places[record.key].add(record.partition)
            assert all(isinstance(value, bytes) for _, value in record.headers)
        assert set(places) == {f"vs_s{n}".encode() for n in range(40)}
        assert all(len(partitions) == 1 for partitions in places.values())
        assert set.union(*places.values()) == {0, 1, 2, 3}

    @pytest.mark.parametrize("code", [45, 47, 59, 31, 87])
    async def test_a_producer_in_doubt_is_replaced(self, broker: Broker, code: int) -> None:
        """Out of order, fenced, unknown or refused otherwise: not counted, and the next is new."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            broker.order("refuse", code)
            with pytest.raises(ConnectionError):
                await handler(transition("a", 2))
            for sequence in (2, 3, 4):
                await handler(transition("a", sequence))

        assert in_order(await broker.received()) == {"vs_a": [1, 2, 3, 4]}

    async def test_a_topic_that_is_not_ours_waits_for_the_operator(self, broker: Broker) -> None:
        """A broker that forbids writing buries nothing, and may change its mind."""
        async with self.opened(broker.environ()) as handler:
            broker.order("refuse", 29)
            with pytest.raises(ConnectionError, match=r"^access_refused$"):
                await handler(transition("a", 1))
            await handler(transition("a", 1))

        assert in_order(await broker.received()) == {"vs_a": [1]}

    @pytest.mark.parametrize("code", [10, 18])
    async def test_a_broker_may_find_a_message_too_large(self, broker: Broker, code: int) -> None:
        """The broker's own limit is final too, and does not spoil the producer's sequence."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            broker.order("refuse", code)
            with pytest.raises(Undeliverable, match=r"^message_too_large$"):
                await handler(transition("a", 2))
            await handler(transition("a", 3))

        assert in_order(await broker.received()) == {"vs_a": [1, 3]}

    async def test_what_the_client_tries_again_is_there_once(self, broker: Broker) -> None:
        """Passing refusals (no leader, too few replicas) are ridden out within one call."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            broker.order("refuse", 6, 19, 7)
            await handler(transition("a", 2))

        assert [one.body for one in await broker.received()] == [
            message(transition("a", n)).body for n in (1, 2)
        ]

    @pytest.mark.usefixtures("own_limits")
    async def test_what_was_given_up_does_not_arrive_later(self, broker: Broker) -> None:
        """A call that failed leaves nothing behind that overtakes or repeats what follows."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            broker.kill()
            try:
                with pytest.raises(ConnectionError):
                    await handler(transition("a", 2))
            finally:
                broker.start()
            await persist(handler, transition("a", 3))
            await asyncio.sleep(0.5)

        assert in_order(await broker.received()) == {"vs_a": [1, 3]}

    async def test_closing_does_not_wait_for_what_is_under_way(self, broker: Broker) -> None:
        """A request without an answer holds up closing no longer than a link may."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            with broker.frozen():
                call = asyncio.ensure_future(handler(transition("a", 2)))
                await asyncio.sleep(0.1)
                async with asyncio.timeout(BOUND_S):
                    await handler.aclose()  # type: ignore[attr-defined]
                with pytest.raises(ConnectionError):
                    await call
            await persist(handler, transition("a", 3))


@asynccontextmanager
async def refusing_credentials(code: int) -> AsyncIterator[int]:
    """Yield the port of a stand-in for a broker that ends the handshake with an error code."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (size,) = struct.unpack(">i", await reader.readexactly(4))
                request = await reader.readexactly(size)
                api, _, correlation = struct.unpack_from(">hhi", request)
                writer.write(_framed(correlation, _ANSWERS[api](code)))
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def _framed(correlation: int, answer: bytes) -> bytes:
    return struct.pack(">ii", len(answer) + 4, correlation) + answer


_ANSWERS: dict[int, Callable[[int], bytes]] = {
    18: lambda _: struct.pack(">hi", 0, 3) + struct.pack(">9h", 17, 0, 1, 18, 0, 0, 36, 0, 0),
    17: lambda _: struct.pack(">hih", 0, 1, 5) + b"PLAIN",
    36: lambda code: struct.pack(">hhi", code, -1, 0),
}


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_refused_credentials_wait_for_the_operator(mechanism: str) -> None:
    """Nothing is buried for credentials that brokers refuse; a check tells of them."""
    async with refusing_credentials(58) as port:
        environ = {
            "KAFKA_URL": f"kafka://someone:p%40ss@127.0.0.1:{port}",
            "KAFKA_SASL_MECHANISM": mechanism,
        }
        async with kafka.open(environ) as handler:
            for _ in range(2):
                with pytest.raises(ConnectionError):
                    await handler(transition("a", 1))
                with pytest.raises(ConfigError, match=r"^KAFKA_URL: the brokers refuse"):
                    await check(handler)


async def test_an_untrusted_certificate_waits_for_the_operator(tmp_path: Path) -> None:
    """Nothing is sent to brokers nobody vouches for, nor buried; a check tells of them."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl on PATH: apt-get install openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=tests", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, *subject]
    subprocess.run(command, check=True, capture_output=True)  # noqa: ASYNC221 - nobody else waits
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with kafka.open({"KAFKA_URL": f"kafkas://127.0.0.1:{port}"}) as handler:
            with pytest.raises(ConnectionError):
                await handler(transition("a", 1))
            with pytest.raises(ConfigError, match=r"^KAFKA_URL: .*certificate"):
                await check(handler)


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("KAFKA_URL", {"KAFKA_URL": "127.0.0.1:9092"}),
        ("KAFKA_URL", {"KAFKA_URL": "kafka://someone:can/ary@127.0.0.1:9092"}),
        ("KAFKA_URL", {"KAFKA_URL": "kafka://someone@127.0.0.1:canary"}),
        ("KAFKA_TOPIC", {"KAFKA_TOPIC": "canary/"}),
        ("KAFKA_SASL_MECHANISM", {"KAFKA_SASL_MECHANISM": "canary"}),
    ],
)
async def test_wrong_settings_are_told_by_name(name: str, environ: dict[str, str]) -> None:
    """Opening names the variable that is wrong, and never its value."""
    with pytest.raises(ConfigError, match=f"^{name}: ") as raised:
        async with kafka.open(environ):
            pass
    assert "can" not in str(raised.value)
