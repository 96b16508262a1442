"""SQS as moto plays it, in a process of its own; it keeps everything in memory.

moto's pins clash with those of the service's other packages, so it lives in an environment of
its own: TEST_MOTO_SERVER says where, or PATH does. https://docs.getmoto.org/en/latest/docs/server_mode.html
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from aiobotocore.session import get_session

from tests.support.servers import START_DEADLINE_S, free_port, frozen

MISSING = "needs moto_server on PATH or in TEST_MOTO_SERVER: pip install 'moto[server]'"
KEY = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests"}
REGION = "eu-west-1"
ACCOUNT = "123456789012"

# Run by moto's own Python: the queue is there before the port is, so that a client that is
# already waiting finds both. Connections are kept, and moto asks a cheaper clock: it asks it
# for every message on the queue at every message sent.
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


def moto_server() -> str | None:
    """Return the program."""
    return shutil.which(os.environ.get("TEST_MOTO_SERVER") or "moto_server")


class MotoQueue:
    """A running moto with one queue.

    Attributes:
        port: Where it listens.
    """

    keeps = False

    def __init__(self, program: str, name: str) -> None:
        self._program = program
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._taken: list[dict[str, Any]] = []
        self.port = free_port()

    @property
    def url(self) -> str:
        """The queue's."""
        return self.url_at(self.port)

    def url_at(self, port: int, name: str = "") -> str:
        """Return the URL of a queue seen through a port."""
        return f"http://127.0.0.1:{port}/{ACCOUNT}/{name or self._name}"

    def start(self) -> None:
        """Start it with an empty queue."""
        python = Path(self._program).resolve().with_name("python")
        self._taken = []
        self._process = subprocess.Popen(
            [python, "-c", _SERVE, str(self.port), ACCOUNT, REGION, self._name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert self._process.poll() is None
                time.sleep(0.02)
            else:
                return
        raise AssertionError("moto does not answer")

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def frozen(self) -> AbstractContextManager[None]:
        """Stop its process for the length of the block."""
        assert self._process is not None
        return frozen(self._process.pid)

    def _client(self) -> Any:
        endpoint = f"http://127.0.0.1:{self.port}"
        return get_session().create_client("sqs", endpoint_url=endpoint, region_name=REGION, **KEY)

    async def empty(self) -> None:
        """Take everything off the queue, what it knows of repeats included."""
        self._taken = []
        fifo = {"FifoQueue": "true"} if self._name.endswith(".fifo") else {}
        async with self._client() as client:
            await client.delete_queue(QueueUrl=self.url)
            await client.create_queue(QueueName=self._name, Attributes=fifo)

    async def messages(self) -> list[dict[str, Any]]:
        """Return every message since `empty`, as received."""
        async with self._client() as client:
            while found := (
                await client.receive_message(
                    QueueUrl=self.url,
                    MaxNumberOfMessages=10,
                    MessageSystemAttributeNames=["All"],
                    MessageAttributeNames=["All"],
                )
            ).get("Messages"):
                self._taken += found
                await client.delete_message_batch(
                    QueueUrl=self.url,
                    Entries=[
                        {"Id": str(n), "ReceiptHandle": one["ReceiptHandle"]}
                        for n, one in enumerate(found)
                    ],
                )
        return self._taken


@contextmanager
def moto_queue(queue: MotoQueue) -> Iterator[None]:
    """Run it until the block is left."""
    queue.start()
    try:
        yield
    finally:
        queue.kill()
