"""One SQS queue, played by moto in a process of its own; it keeps everything in memory.

moto's pins clash with those of the service's other packages, so it lives in an environment of
its own: TEST_MOTO_SERVER or PATH says where. https://docs.getmoto.org/en/latest/docs/server_mode.html
"""
# ruff: noqa: E402 (the client may be missing)

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tests.support import programs
from tests.support.brokers import process
from tests.support.brokers.broker import Received, Refused, WrongSettings, transition
from tests.support.servers import free_port

process.require_client("aiobotocore", "sqs")

from aiobotocore.session import get_session

KEY = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests"}
REGION = "eu-west-1"
ACCOUNT = "123456789012"

# Run by moto's own Python. The queue exists before the port is open, so that a waiting client finds
# both. Connections are kept alive. moto reads the clock for every message on the queue at every
# send, so it gets a cheaper clock.
_SERVE = """
import sys, time
from moto.server import DomainDispatcherApplication, create_backend_app
from moto.sqs import models
from werkzeug.serving import WSGIRequestHandler, run_simple

port, account, region, name = sys.argv[1:]
models.unix_time_millis = lambda: time.time() * 1000
WSGIRequestHandler.protocol_version = "HTTP/1.1"
fifo = {"FifoQueue": "true"} if name.endswith(".fifo") else {}
models.sqs_backends[account][region].create_queue(name, **fifo)
application = DomainDispatcherApplication(create_backend_app)
run_simple("127.0.0.1", int(port), application, threaded=True)
"""


class SqsBroker(process.ProcessBroker):
    """A running moto with one queue; a FIFO queue if its name ends in `.fifo`."""

    is_durable = False

    def __init__(self, port: int, moto: process.BrokerProcess, name: str) -> None:
        super().__init__(port, moto)
        self.deduplicates = name.endswith(".fifo")
        self._name = name
        self._taken: list[dict[str, Any]] = []

    def environ(self, port: int | None = None, *, credentials: str = "") -> dict[str, str]:
        """Return the settings of the handler."""
        return {
            "SQS_QUEUE_URL": self._url(port),
            "SQS_REGION": REGION,
            "SQS_ACCESS_KEY_ID": "tests",
            "SQS_SECRET_ACCESS_KEY": credentials.partition(":")[2] or "tests",
        }

    def undeliverable_messages(self) -> Iterable[Refused]:
        """Return a message that is too large."""
        huge = transition("huge", 1, metadata={"key": "x" * 1_100_000})
        return [Refused("message_too_large", self.environ(), huge)]

    def refusing_destinations(self) -> Iterable[Refused]:
        """Return a queue that does not exist."""
        return [Refused("no_such_queue", self._missing(), transition("a", 1))]

    @asynccontextmanager
    async def queue_removed(self) -> AsyncIterator[str]:
        """Delete the queue."""
        async with self._client() as client:
            await client.delete_queue(QueueUrl=self._url())
        yield "no_such_queue"
        async with self._client() as client:
            await client.create_queue(QueueName=self._name, Attributes=self._attributes())

    def wrong_settings(self) -> Iterable[WrongSettings]:
        """Return a queue that does not exist."""
        return [WrongSettings("SQS_QUEUE_URL", self._missing())]

    async def empty(self) -> None:
        """Make the queue anew, so that it forgets the deduplication ids too."""
        self._taken = []
        async with self._client() as client:
            await client.delete_queue(QueueUrl=self._url())
            await client.create_queue(QueueName=self._name, Attributes=self._attributes())

    async def received(self) -> list[Received]:
        """Return every message since `empty`."""
        async with self._client() as client:
            while found := (
                await client.receive_message(
                    QueueUrl=self._url(),
                    MaxNumberOfMessages=10,
                    MessageSystemAttributeNames=["All"],
                    MessageAttributeNames=["All"],
                )
            ).get("Messages"):
                self._taken += found
                await client.delete_message_batch(
                    QueueUrl=self._url(),
                    Entries=[
                        {"Id": str(n), "ReceiptHandle": one["ReceiptHandle"]}
                        for n, one in enumerate(found)
                    ],
                )
        return [
            Received(
                one["Body"].encode(),
                one["Attributes"].get("MessageDeduplicationId"),
                one["Attributes"].get("MessageGroupId"),
                {name: each["StringValue"] for name, each in one["MessageAttributes"].items()},
            )
            for one in self._taken
        ]

    def start(self) -> None:
        """Start moto again, with an empty queue."""
        self._taken = []
        super().start()

    def _url(self, port: int | None = None, name: str = "") -> str:
        return f"http://127.0.0.1:{port or self.port}/{ACCOUNT}/{name or self._name}"

    def _missing(self) -> dict[str, str]:
        return {**self.environ(), "SQS_QUEUE_URL": self._url(name="missing.fifo")}

    def _attributes(self) -> dict[str, str]:
        return {"FifoQueue": "true"} if self.deduplicates else {}

    def _client(self) -> Any:
        endpoint = f"http://127.0.0.1:{self.port}"
        return get_session().create_client("sqs", endpoint_url=endpoint, region_name=REGION, **KEY)


@contextmanager
def run_broker(directory: Path, name: str = "everything.fifo") -> Iterator[SqsBroker]:
    """Run one queue."""
    program = shutil.which(os.environ.get("TEST_MOTO_SERVER") or "moto_server")
    if program is None:
        programs.missing(
            "needs moto_server on PATH or in TEST_MOTO_SERVER: pip install moto[server]"
        )
    port = free_port()
    python = str(Path(program).resolve().with_name("python"))
    command = [python, "-c", _SERVE, str(port), ACCOUNT, REGION, name]
    moto = process.BrokerProcess(command, directory / "sqs", process.listens(port))
    with process.running(moto):
        yield SqsBroker(port, moto, name)
