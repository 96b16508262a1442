"""A Kafka broker with one topic, played by librdkafka (`mock_kafka`)."""
# ruff: noqa: E402 (the client may be missing)

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tests.support import programs
from tests.support.brokers import mock_kafka, process
from tests.support.brokers.broker import Received, Refused, WrongSettings, transition
from tests.support.servers import frozen

process.require_client("aiokafka", "kafka")

from aiokafka import AIOKafkaConsumer, TopicPartition

TOPIC = "verifications"


class KafkaBroker:
    """One running broker.

    `kill` and `start` close and open its port. The process continues, and keeps its records.
    """

    is_durable = True
    deduplicates = False

    def __init__(self, running: subprocess.Popen[str]) -> None:
        self._process = running
        self._from: dict[Any, int] = {}
        self.port = int(self._answer())
        self.order("topic", TOPIC)

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the settings of the handler."""
        user = credentials and f"{credentials}@"
        return {"KAFKA_URL": f"kafka://{user}127.0.0.1:{port or self.port}", "KAFKA_TOPIC": TOPIC}

    def undeliverable_messages(self) -> Iterable[Refused]:
        """Return a message that is too large."""
        huge = transition("huge", 1, metadata={"key": "x" * 1_100_000})
        return [Refused("message_too_large", self.environ(), huge)]

    def refusing_destinations(self) -> Iterable[Refused]:
        """Return a topic that does not exist."""
        return [Refused("no_such_topic", self._missing(), transition("a", 1))]

    @asynccontextmanager
    async def queue_removed(self) -> AsyncIterator[str]:
        """Do nothing: librdkafka's broker cannot delete a topic."""
        yield ""

    def wrong_settings(self) -> Iterable[WrongSettings]:
        """Return a topic that does not exist."""
        return [WrongSettings("KAFKA_TOPIC", self._missing())]

    async def empty(self) -> None:
        """Let reading begin behind the present records."""
        async with self._reader() as consumer:
            self._from = await consumer.end_offsets(consumer.assignment())

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

    async def records(self) -> list[Any]:
        """Return the records since `empty` as the client returns them."""
        found: list[Any] = []
        async with self._reader() as consumer:
            ends = await consumer.end_offsets(consumer.assignment())
            for partition, offset in self._from.items():
                consumer.seek(partition, offset)
            left = sum(ends.values()) - sum(self._from.values())
            while len(found) < left:
                batches = await consumer.getmany(timeout_ms=30_000)
                assert batches
                found += [record for batch in batches.values() for record in batch]
        return found

    def kill(self) -> None:
        """Close the broker's port."""
        self.order("down")

    def start(self) -> None:
        """Open it again."""
        self.order("up")

    def frozen(self) -> AbstractContextManager[None]:
        """Stop the process for the length of the block."""
        return frozen(self._process.pid)

    @contextmanager
    def advertising(self, port: int) -> Iterator[None]:
        """Let the broker name another port to its clients, so that they stay behind a proxy."""
        self.order("advertise", port)
        try:
            yield
        finally:
            self.order("advertise", self.port)

    def order(self, *words: object) -> None:
        """Have one order carried out (`mock_kafka.Cluster.obey`)."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        assert self._answer() == "0"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _missing(self) -> dict[str, str]:
        return {**self.environ(), "KAFKA_TOPIC": "missing"}

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Any]:
        consumer = AIOKafkaConsumer(bootstrap_servers=f"127.0.0.1:{self.port}")
        await consumer.start()
        try:
            consumer.assign([TopicPartition(TOPIC, n) for n in range(mock_kafka.PARTITIONS)])
            yield consumer
        finally:
            await consumer.stop()


@contextmanager
def run_broker(directory: Path) -> Iterator[KafkaBroker]:
    """Run a broker; it writes no files."""
    if mock_kafka.find_librdkafka() is None:
        programs.missing(mock_kafka.MISSING)
    with mock_kafka.running() as started:
        yield KafkaBroker(started)
