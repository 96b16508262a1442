"""Broker programs as processes on loopback, started and ended by process id."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from service.runtime.parent_death import bind_to_parent
from tests.support.programs import missing
from tests.support.servers import frozen
from tests.support.waiting import DEADLINE_S, wait_until

USER, PASSWORD = "identity", "correct/horse:battery@staple"
QUOTED_PASSWORD = quote(PASSWORD, safe="")

# A process ends with the thread that started it (PR_SET_PDEATHSIG), so this thread never ends.
_starting = ThreadPoolExecutor(1, thread_name_prefix="brokers")


def require_client(module: str, extra: str) -> None:
    """Skip the calling module if the client library of an extra is not installed."""
    if find_spec(module) is None:
        missing(f"{module} is not installed: pip install -e '.[{extra}]'")


class BrokerProcess:
    """A program that can be killed, frozen and started again on the same files.

    Args:
        command: The program and its arguments.
        directory: Where it works and writes its log.
        serves: Returns whether it accepts requests yet; may raise OSError instead.
        environ: Additional variables.
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
        """Start; return when it accepts requests."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._process = _starting.submit(self._started).result()
        try:
            wait_until(self._is_serving, DEADLINE_S)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE_S)
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


class ProcessBroker:
    """What a broker that is one process of its own does with it.

    Args:
        port: Where it listens.
        process: The process; it runs.
    """

    def __init__(self, port: int, process: BrokerProcess) -> None:
        self.port = port
        self._process = process

    def kill(self) -> None:
        """End the process."""
        self._process.kill()

    def start(self) -> None:
        """Start it again, on the same files."""
        self._process.start()

    def frozen(self) -> AbstractContextManager[None]:
        """Freeze it for the length of the block."""
        return self._process.frozen()


def answers(port: int, greeting: bytes, *, ask: bytes = b"") -> Callable[[], bool]:
    """Return a function: does the answer on *port* begin with *greeting*?"""

    def serves() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(ask)
            return connection.recv(64).startswith(greeting)

    return serves


@contextmanager
def running(*processes: BrokerProcess) -> Iterator[None]:
    """Run processes, started in order and ended in reverse."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in reversed(processes):
            process.kill()


def listens(port: int) -> Callable[[], bool]:
    """Return a function: does anything listen on *port*?"""

    def serves() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True

    return serves
