"""librdkafka's mock of a Kafka broker, in a process of its own.

The nearest to Kafka that needs no JVM, and not Kafka: it speaks the protocol, but keeps records in
memory, confirms at once, and never checks a producer's sequence numbers. Errors are injected by
order. https://github.com/confluentinc/librdkafka/blob/master/src/rdkafka_mock.h

Run as a script, which imports nothing of ours, it obeys the lines of its standard input until
that ends.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MISSING = "needs the broker within confluent-kafka: pip install confluent-kafka"
PRODUCE = 0
PARTITIONS = 4


@contextmanager
def running() -> Iterator[subprocess.Popen[str]]:
    """Run this module as a script."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def find_librdkafka() -> Path | None:
    """Return the librdkafka that the confluent-kafka wheel brings, if it is installed."""
    found = find_spec("confluent_kafka")
    if found is None or found.origin is None:
        return None
    beside = Path(found.origin).parents[1] / "confluent_kafka.libs"
    return next(iter(beside.glob("librdkafka*")), None)


class Cluster:
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
    """Print the port, then obey each line and print its result."""
    path = find_librdkafka()
    assert path is not None, MISSING
    cluster = Cluster(path)
    print(cluster.port, flush=True)  # noqa: T201 - the script's result
    for line in lines:
        print(cluster.obey(*line.split()), flush=True)  # noqa: T201 - as above


if __name__ == "__main__":
    main(sys.stdin)
