"""Processes of the service that are forked from one that has already imported it.

Starting Python and importing the service takes a third of a second of CPU time, and hundreds of
tests start processes. Started anew, as `python -m service`, are those with an empty program (every
command, in test_users), those of a chaos run, and those that tests of deploy/ start.

A forked process gets its folder, environment, output and arguments, runs its program as `python -c`
does, and ends as Python ends. It cannot see what Python or an import reads from the environment.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Variables with these prefixes are read before the service's own code runs.
READ_EARLY = ("PYTHON", "LD_", "LC_", "LANG", "PROMETHEUS", "prometheus", "OTEL")
ROOT = Path(__file__).parents[2]
_MAX_BYTES = 128 * 1024


class Forked:
    """A forked process, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, parent: Parent, pid: int) -> None:
        self.pid = pid
        self.returncode: int | Any = None
        self._parent = parent

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._parent.ask({"exit_code_of": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        if self.poll() is None:
            descriptor = os.pidfd_open(self.pid)
            waiting = select.poll()
            waiting.register(descriptor, select.POLLIN)
            ended = waiting.poll(None if timeout is None else timeout * 1000)
            os.close(descriptor)
            if not ended:
                raise subprocess.TimeoutExpired([], timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Parent:
    """A process that has imported the service, and forks; it ends with this one."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def ask(self, order: Mapping[str, Any], files: Sequence[int] = ()) -> Any:
        """Send an order with open files, and return the reply."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(order).encode()], files)
            return json.loads(self._socket.recv(_MAX_BYTES))

    def close(self) -> None:
        """End the parent."""
        self._socket.close()
        self._process.wait()


class Forking:
    """Whether processes are forked, and the parent of those that are."""

    def __init__(self) -> None:
        self._is_on = False
        self._parent: Parent | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Fork processes until the block is left."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            if self._parent is not None:
                self._parent.close()
                self._parent = None

    def allows(self, settings: Mapping[str, str]) -> bool:
        """Say whether a process with these variables may be forked."""
        names = settings.keys() - {"PYTHONPATH"}
        return self._is_on and not any(name.startswith(READ_EARLY) for name in names)

    def start(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environ: Mapping[str, str],
        stdout: int,
        stderr: int,
    ) -> Forked:
        """Fork a process that runs a program as `python -c` does."""
        if self._parent is None:
            self._parent = Parent()
        order = {
            "program": program,
            "arguments": arguments,
            "directory": str(cwd),
            "environ": environ,
        }
        return Forked(self._parent, self._parent.ask(order, (stdout, stderr)))


forking = Forking()


def _obey(orders: socket.socket) -> dict[str, Any] | None:
    """Carry out orders; return the order in a forked process, and None in the parent at its end."""
    while True:
        text, files, _, _ = socket.recv_fds(orders, _MAX_BYTES, 2)
        if not text:
            return None
        order: dict[str, Any] = json.loads(text)
        if pid := order.get("exit_code_of"):
            ended, status = os.waitpid(pid, os.WNOHANG)
            orders.send(json.dumps(os.waitstatus_to_exitcode(status) if ended else None).encode())
        elif child := os.fork():
            orders.send(str(child).encode())
            for file in files:
                os.close(file)
        else:
            for number, file in enumerate(files, 1):
                os.dup2(file, number)
                os.close(file)
            return order


def _become(order: Mapping[str, Any]) -> None:
    """Run a program in this process as if Python had been started with it."""
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["environ"])
    sys.argv[:] = ["-c", *order["arguments"]]
    sys.path[:1] = ["", *order["environ"].get("PYTHONPATH", "").split(os.pathsep)]
    # click reads from it what to call the program.
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(order["program"], "<string>", "exec"), vars(sys.modules["__main__"]))  # noqa: S102


if __name__ == "__main__":
    import service.cli  # noqa: F401

    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as _orders:
        _order = _obey(_orders)
    if _order is not None:
        _become(_order)
