"""A Kafka broker of librdkafka's making, in a process of its own, and the orders it takes.

The nearest to Kafka that can be had offline, and not Kafka: it speaks the protocol, but keeps
records in memory, confirms at once and never looks at a producer's sequence numbers. What a
broker would say of those is said by order.
https://github.com/confluentinc/librdkafka/blob/master/src/rdkafka_mock.h

Run as a script, it obeys lines on its standard input and ends with it.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MISSING = "needs the broker within confluent-kafka: pip install confluent-kafka"
PRODUCE = 0
PARTITIONS = 4


class MockKafka:
    """One running broker with one topic, as the laws want it.

    `kill` and `start` take its port away and give it back: connections are reset and none are
    taken, while the process, and so what it holds, stays.

    Attributes:
        port: Where it listens.
        topic: Its topic.
    """

    keeps = True
    drops_repeats = False

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._from: dict[Any, int] = {}
        self.topic = "verifications"
        self.port = int(self._answer())
        self.order("topic", self.topic)

    def order(self, *words: object) -> None:
        """Have one order carried out."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        assert self._answer() == "0"

    def kill(self) -> None:
        """Take the broker off the network."""
        self.order("down")

    def start(self) -> None:
        """Bring it back."""
        self.order("up")

    def frozen(self) -> AbstractContextManager[None]:
        """Stop its process for the length of the block."""
        from tests.support.servers import frozen  # noqa: PLC0415 - as a script, this module knows no tests

        return frozen(self._process.pid)

    @contextmanager
    def advertising(self, port: int) -> Iterator[None]:
        """Let the broker call itself by another port, so that clients stay behind a proxy."""
        self.order("advertise", port)
        try:
            yield
        finally:
            self.order("advertise", self.port)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Any]:
        from aiokafka import AIOKafkaConsumer, TopicPartition  # noqa: PLC0415 - as above

        consumer = AIOKafkaConsumer(bootstrap_servers=f"127.0.0.1:{self.port}")
        await consumer.start()
        try:
            consumer.assign([TopicPartition(self.topic, n) for n in range(PARTITIONS)])
            yield consumer
        finally:
            await consumer.stop()

    async def empty(self) -> None:
        """Forget what is there: reading begins behind it from now on."""
        async with self._reader() as consumer:
            self._from = await consumer.end_offsets(consumer.assignment())

    async def records(self) -> list[Any]:
        """Return every record since, those of a partition in its order."""
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


@contextmanager
def mock_kafka() -> Iterator[subprocess.Popen[str]]:
    """Run this module as a script until the block is left."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def library() -> Path | None:
    """Return the librdkafka that the confluent-kafka wheel brings, if it is installed."""
    found = find_spec("confluent_kafka")
    if found is None or found.origin is None:
        return None
    beside = Path(found.origin).parents[1] / "confluent_kafka.libs"
    return next(iter(beside.glob("librdkafka*")), None)


class _Cluster:
    """A cluster of one broker, through librdkafka's C functions."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        problem = ctypes.create_string_buffer(512)
        conf = self._pointer("rd_kafka_conf_new")
        self._call("rd_kafka_conf_set", conf, b"log_level", b"0", problem, len(problem))
        producer = 0
        client = self._pointer("rd_kafka_new", producer, conf, problem, len(problem))
        self._cluster = self._pointer("rd_kafka_mock_cluster_new", client, 1)
        bootstraps = self._functions.rd_kafka_mock_cluster_bootstraps
        bootstraps.restype = ctypes.c_char_p
        self.port = int(bootstraps(self._cluster).rpartition(b":")[2])

    def obey(self, order: str, *words: str) -> int:
        """Carry out one order; 0 is success."""
        match order:
            case "topic":
                return self._mock("topic_create", words[0].encode(), PARTITIONS, 1)
            case "down":
                return self._mock("broker_set_down", 1)
            case "up":
                return self._mock("broker_set_up", 1)
            case "advertise":
                return self._mock("broker_set_host_port", 1, b"127.0.0.1", int(words[0]))
            case "refuse":
                codes = [int(word) for word in words]
                array = (ctypes.c_int * len(codes))(*codes)
                return self._mock("push_request_errors_array", PRODUCE, len(codes), array) or 0
        return 1

    def _mock(self, name: str, *arguments: Any) -> int:
        return self._call(f"rd_kafka_mock_{name}", self._cluster, *arguments)

    def _call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self._functions, name)(*arguments))

    def _pointer(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        function: Any = getattr(self._functions, name)
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(*arguments))


def main(lines: Iterable[str]) -> None:
    """Say the port, then obey line by line, each answered by its result."""
    path = library()
    assert path is not None, MISSING
    cluster = _Cluster(path)
    print(cluster.port, flush=True)  # noqa: T201 - the script's answer
    for line in lines:
        print(cluster.obey(*line.split()), flush=True)  # noqa: T201 - as above


if __name__ == "__main__":
    main(sys.stdin)
