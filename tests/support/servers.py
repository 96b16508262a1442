"""Private servers on loopback TCP, for tests that one server on a socket does not suffice for.

Replicas, Sentinel and Cluster need ports; the plain tests use the server of `conftest`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import redis

from service.runtime import embedded_redis
from service.runtime.parent_death import bind_to_parent
from service.storage.connections import Connections
from service.storage.health import probe
from tests.support.waiting import PATIENCE_S, until, wait_until

START_DEADLINE_S = PATIENCE_S


class Server(NamedTuple):
    """A running server, and its administrator if it has users."""

    port: int
    process: subprocess.Popen[bytes]
    user: str | None = None

    @property
    def url(self) -> str:
        """Its address, without a user."""
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        """Return a plain client, as its administrator."""
        return redis.Redis(
            port=self.port, username=self.user, password=self.user, socket_timeout=PATIENCE_S
        )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop its process until the block is left, like a hung machine."""
        with frozen(self.process.pid):
            yield


_ports_given: set[int] = set()


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a process until the block is left."""
    os.kill(pid, signal.SIGSTOP)
    # A thread stops only when it next handles signals.
    wait_until(lambda: _is_stopped(pid))
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    """Say whether every thread of a process has stopped."""
    states = [
        path.read_text().rpartition(")")[2].split()[0]
        for path in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) <= {"T", "t"}


async def until_answers(connections: Connections) -> None:
    """Wait until Redis answers, even if it accepts no writes."""

    async def answers() -> bool:
        try:
            await probe(connections)
            if connections.is_cluster:
                await connections.blocking_client.initialize()
        except (redis.RedisError, OSError):
            return False
        return True

    await until(answers)


def binary() -> Path:
    """Return the server under test: the embedded one, or TEST_REDIS_SERVER."""
    chosen = os.environ.get("TEST_REDIS_SERVER", "")
    return embedded_redis.find_server({**os.environ, "REDIS_SERVER": chosen})


def free_port() -> int:
    """Return a port on which no process listens, below those that the system gives to clients.

    Each test process has its own range and returns no port twice, so that no other test takes the
    port before its server listens.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.randrange(10_000 + process % 16, 32_000, 16)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _ports_given:
                _ports_given.add(port)
                return port


@contextmanager
def server(
    directory: Path,
    *options: str,
    port: int | None = None,
    user: str | None = None,
    program: Path | None = None,
) -> Iterator[Server]:
    """Run a server on *directory* until the block is left.

    Args:
        directory: Where its files are.
        options: `--name value` pairs, maybe with the path of a configuration before them.
        port: Its port; by default any free one.
        user: Its administrator, whose name is also the password.
        program: The server, if not the one under test.
    """
    port = port or free_port()
    before = [option for option in options[:1] if not option.startswith("--")]
    ours = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", "")
    command = [str(program or binary()), *before, *ours, *options[len(before) :]]
    with running(command, port, directory, user) as started:
        yield started


@contextmanager
def sentinel(
    directory: Path, *settings: str, service: str, primary: Server, quorum: int = 1
) -> Iterator[Server]:
    """Run one Sentinel that watches *primary* as *service*.

    Args:
        directory: Where its files are.
        settings: Further lines of its configuration, about the service.
        service: What it calls the primary.
        primary: The primary.
        quorum: How many Sentinels must find the primary down.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    configuration = directory / "sentinel.conf"
    lines = (
        *(f"port {port}", "bind 127.0.0.1", f"dir {directory}"),
        f"sentinel monitor {service} 127.0.0.1 {primary.port} {quorum}",
        *settings,
    )
    configuration.write_text("\n".join([*lines, ""]))
    with running([str(binary()), str(configuration), "--sentinel"], port, directory) as started:
        yield started


@contextmanager
def running(
    command: list[str],
    port: int,
    directory: Path,
    user: str | None = None,
) -> Iterator[Server]:
    """Run *command*, a server on *port*, until the block is left."""
    directory.mkdir(parents=True, exist_ok=True)
    started = Server(port, _start_bound(command, directory), user)
    process = started.process
    try:
        _await_answer(started, directory)
        yield started
    finally:
        process.kill()
        process.wait(START_DEADLINE_S)


def _start_bound(command: list[str], directory: Path) -> subprocess.Popen[bytes]:
    """Start a server that ends with this process, even if that is killed."""
    with (directory / "server.log").open("wb") as log:
        return subprocess.Popen(bind_to_parent(command), stdout=log, stderr=subprocess.STDOUT)


def _await_answer(started: Server, directory: Path) -> None:
    def answers() -> bool:
        assert started.process.poll() is None, (directory / "server.log").read_text()
        return bool(client.ping())

    with started.client() as client:
        wait_until(answers, START_DEADLINE_S, ignoring=redis.RedisError)
