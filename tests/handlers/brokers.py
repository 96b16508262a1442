"""Real brokers as plain processes on loopback, each with one queue, started and ended by id."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from service.runtime.parent_death import bind_to_parent
from tests.support.programs import missing, program
from tests.support.servers import free_port, frozen

T = TypeVar("T")

START_DEADLINE_S = 40.0
USER, PASSWORD = "identity", "correct/horse:battery@staple"
QUOTED_PASSWORD = quote(PASSWORD, safe="")

# What is started ends with the thread that started it, so this one lives as long as we do.
_starting = ThreadPoolExecutor(1, thread_name_prefix="brokers")


def lasting(start: Callable[[], T]) -> T:
    """Run *start* in a thread that outlives every test."""
    return _starting.submit(start).result()


def client_installed(module: str, extra: str) -> None:
    """Skip the calling module where the client library of an extra is missing."""
    if find_spec(module) is None:
        missing(f"{module} is not installed: pip install -e '.[{extra}]'")


class Process:
    """A program that can be killed, frozen and started again on the same files.

    Args:
        command: The program and its arguments.
        directory: Where it works and writes its log.
        serves: Says whether it serves by now; may raise OSError for no.
        environ: Variables besides our own.
    """

    def __init__(
        self,
        command: list[str],
        directory: Path,
        serves: Callable[[], bool],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self._directory = directory
        self._serves = serves
        self._environ = {**os.environ, **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start; return when it serves."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._process = lasting(self._started)
        deadline = time.monotonic() + START_DEADLINE_S
        while not self._is_serving():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError((self._directory / "output.log").read_text())
            time.sleep(0.02)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(START_DEADLINE_S)
            self._process = None

    def frozen(self) -> AbstractContextManager[None]:
        """Stop it for the length of the block."""
        assert self._process is not None
        return frozen(self._process.pid)

    def _started(self) -> subprocess.Popen[bytes]:
        with (self._directory / "output.log").open("ab") as log:
            return subprocess.Popen(
                bind_to_parent(self._command),
                cwd=self._directory,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _is_serving(self) -> bool:
        try:
            return self._serves()
        except OSError:
            return False


def answers(port: int, greeting: bytes, *, ask: bytes = b"") -> Callable[[], bool]:
    """Return a question whether what listens on *port* begins its answer with *greeting*."""

    def serves() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(ask)
            return connection.recv(64).startswith(greeting)

    return serves


@contextmanager
def running(*processes: Process) -> Iterator[None]:
    """Run processes in order until the block is left, and end them in reverse."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in reversed(processes):
            process.kill()


def nats(directory: Path, port: int, *, most_bytes: int) -> Process:
    """Return a NATS server with JetStream that takes messages up to *most_bytes*."""
    directory.mkdir(parents=True)
    settings = directory / "nats.conf"
    settings.write_text(
        f"listen: 127.0.0.1:{port}\nmax_payload: {most_bytes}\n"
        f"jetstream {{ store_dir: {directory} }}\n"
        f"authorization {{ user: {USER}, password: '{PASSWORD}' }}\n"
    )
    command = [str(program("nats-server", "nats-server")), "-c", str(settings)]
    return Process(command, directory, answers(port, b"INFO "))


def rabbitmq(directory: Path, port: int, *, most_bytes: int) -> tuple[Process, Process]:
    """Return a RabbitMQ node that takes messages up to *most_bytes*, after the epmd it needs.

    The node would start an epmd of its own, which nobody ends.
    """
    epmd, node = rabbitmq_cluster(directory, [port], most_bytes=most_bytes)
    return epmd, node


def rabbitmq_cluster(directory: Path, ports: Sequence[int], *, most_bytes: int) -> list[Process]:
    """Return an epmd, and after it the nodes of a cluster, which find each other by the first."""
    release = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"))
    server = program("rabbitmq-server", "rabbitmq-server", *map(str, release))
    epmd_port = free_port()
    directory.mkdir(parents=True)
    environ = {
        # The nodes share the cookie that the first leaves here.
        "HOME": str(directory),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(epmd_port),
    }
    mapper = [str(program("epmd", "erlang-base")), "-address", "127.0.0.1", "-port", str(epmd_port)]
    epmd = Process(mapper, directory / "epmd", _listens(epmd_port), environ)
    peers = "".join(
        f"cluster_formation.classic_config.nodes.{n} = identity{port}@localhost\n"
        for n, port in enumerate(ports, 1)
    )
    settings = (
        f"max_message_size = {most_bytes}\ndefault_user = {USER}\ndefault_pass = {PASSWORD}\n"
        f"{peers if len(ports) > 1 else ''}"
    )
    return [epmd, *(_rabbitmq_node(directory, port, server, settings, environ) for port in ports)]


def _rabbitmq_node(
    above: Path, port: int, server: Path, settings: str, environ: Mapping[str, str]
) -> Process:
    directory = above / str(port)
    directory.mkdir()
    # An unprivileged port of its own for every part; no plugins; nothing outside *directory*.
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
        # Makes the script become the node, whose id is then the one we know.
        "RABBITMQ_ALLOW_INPUT": "1",
        "RABBITMQ_SERVER_START_ARGS": "-noinput",
        # Two schedulers are plenty, and start faster.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none",
    }
    (directory / "enabled_plugins").write_text("[].\n")
    (directory / "rabbitmq.conf").write_text(settings)
    # Anything but its own protocol is answered with that protocol's name.
    serves = answers(port, b"AMQP", ask=b"hello...")
    return Process([str(server)], directory, serves, {**environ, **own})


def _listens(port: int) -> Callable[[], bool]:
    def serves() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True

    return serves
