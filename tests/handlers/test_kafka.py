"""The `kafka` handler against librdkafka's mock broker."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import struct
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.delivery.dispatcher import Dispatcher
from service.errors import ConfigError, Undeliverable
from service.handlers import Handler, kafka
from service.transitions.cloudevents import message
from tests.handlers.contract import BOUND_S, QueueContract, check, deliver, sequences_of
from tests.support.brokers.broker import transition
from tests.support.brokers.kafka import KafkaBroker, run_broker
from tests.support.proxy import Proxy


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """Run a broker for this module."""
    with run_broker(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


class TestKafka(QueueContract):
    """The contract of every queue, and Kafka's own cases."""

    opener = "service.handlers.kafka:open"

    @asynccontextmanager
    async def proxied(self, broker: KafkaBroker) -> AsyncIterator[tuple[Handler, Proxy]]:  # type: ignore[override]  # our own broker
        """Yield a handler behind a proxy, whose port the broker names to its clients."""
        async with super().proxied(broker) as (handler, proxy):
            with broker.advertising(proxy.port):
                yield handler, proxy

    async def outage_noticed(self, dispatcher: Dispatcher) -> None:
        """Wait a little: the client reconnects by itself, so no call need fail."""
        await asyncio.sleep(0.3)

    async def test_a_session_has_one_partition(self, broker: KafkaBroker) -> None:
        """All records of a session are in one partition; many sessions use all partitions."""
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

    @pytest.mark.parametrize(
        ("code", "error", "reason"),
        [
            *((code, ConnectionError, "^connection_lost$") for code in (45, 47, 59, 31, 87)),
            (29, ConnectionError, "^access_refused$"),
            (10, Undeliverable, "^message_too_large$"),
            (18, Undeliverable, "^message_too_large$"),
        ],
    )
    async def test_a_refused_record_disturbs_no_other(
        self, broker: KafkaBroker, code: int, error: type[Exception], reason: str
    ) -> None:
        """The next calls deliver: after a refusal of its sequence number, with a new producer.

        Where the brokers forbid writing, the queue is unreachable until they allow it.
        """
        following = [3] if error is Undeliverable else [2, 3, 4]
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            broker.order("refuse", code)
            with pytest.raises(error, match=reason):
                await handler(transition("a", 2))
            for sequence in following:
                await handler(transition("a", sequence))

        assert sequences_of(await broker.received()) == {"vs_a": [1, *following]}

    async def test_a_retry_of_the_client_appends_once(self, broker: KafkaBroker) -> None:
        """The client itself repeats after passing refusals: no leader, too few replicas."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            broker.order("refuse", 6, 19, 7)
            await handler(transition("a", 2))

        assert [one.body for one in await broker.received()] == [
            message(transition("a", n)).body for n in (1, 2)
        ]

    @pytest.mark.usefixtures("own_limits")
    async def test_a_failed_call_does_not_arrive_later(self, broker: KafkaBroker) -> None:
        """A record whose call failed is not sent when the broker is back."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            broker.kill()
            try:
                with pytest.raises(ConnectionError):
                    await handler(transition("a", 2))
            finally:
                broker.start()
            await deliver(handler, transition("a", 3))
            await asyncio.sleep(0.5)

        assert sequences_of(await broker.received()) == {"vs_a": [1, 3]}

    async def test_closing_does_not_wait_for_an_answer(self, broker: KafkaBroker) -> None:
        """A request without an answer delays closing for a bounded time."""
        async with self.opened(broker.environ()) as handler:
            await handler(transition("a", 1))
            with broker.frozen():
                call = asyncio.ensure_future(handler(transition("a", 2)))
                await asyncio.sleep(0.1)
                async with asyncio.timeout(BOUND_S):
                    await handler.aclose()  # type: ignore[attr-defined]
                with pytest.raises(ConnectionError):
                    await call
            await deliver(handler, transition("a", 3))


@asynccontextmanager
async def refusing_credentials(code: int) -> AsyncIterator[int]:
    """Yield the port of a fake broker that ends the SASL handshake with an error code."""

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
async def test_refused_credentials_are_waited_for(mechanism: str) -> None:
    """Refused credentials make the queue unreachable; a check reports them."""
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


async def test_an_untrusted_certificate_is_waited_for(tmp_path: Path) -> None:
    """An untrusted certificate makes the queue unreachable; a check reports it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl on PATH: apt-get install openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=tests", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, *subject]
    subprocess.run(command, check=True, capture_output=True)  # noqa: ASYNC221 - no other task waits
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
async def test_wrong_settings_are_reported_by_name(name: str, environ: dict[str, str]) -> None:
    """Opening names the wrong variable, and does not show its value."""
    with pytest.raises(ConfigError, match=f"^{name}: ") as raised:
        async with kafka.open(environ):
            pass
    assert "can" not in str(raised.value)
