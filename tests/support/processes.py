"""Processes of the service: started, watched and stopped; and commands run in this process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from unittest import mock

import orjson
import pytest
import redis
import structlog.testing
from click.testing import CliRunner

import service
from service.cli.main import main
from service.config import describe
from service.runtime.embedded_redis import EmbeddedServer, find_server
from service.telemetry import logs
from tests.support import roles
from tests.support.harness import SECRET, WEBHOOK
from tests.support.prefork import Forked, forking
from tests.support.waiting import PATIENCE_S, wait_until

PACKAGE = Path(service.__file__).parent
# For a dozen processes that start at once on a busy machine.
PROCESS_DEADLINE_S = 3 * PATIENCE_S
# `python -m service` with longer timeouts for Redis, for busy machines. Imports take a sixth less
# time without the garbage collector, and a hundred tests start a process.
PATIENT = f"""
import gc
gc.disable()
from service.monitoring import overview
from service.storage import clients
from service.cli import main
gc.enable()
for name in ("CALL_TIMEOUT_S", "CONNECT_TIMEOUT_S", "POOL_WAIT_S"):
    setattr(clients, name, {PATIENCE_S})
overview.COLLECT_TIMEOUT_S = {PATIENCE_S}
main()
"""


def environment(**settings: str) -> dict[str, str]:
    """Return this process's environment with no settings but *settings*."""
    names = {row.name for row in describe()}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.removesuffix("_FILE") not in names and not name.startswith("STRIPE_")
    }
    # Processes run the same code as the tests, whatever the current folder.
    path = os.pathsep.join(filter(None, [settings.pop("PYTHONPATH", ""), str(PACKAGE.parent)]))
    return {**kept, "COLUMNS": "200", "PYTHONPATH": path, **settings}


StartedProcess = subprocess.Popen[bytes] | Forked


def _start(
    program: str, arguments: Sequence[str], settings: Mapping[str, str], **place: Any
) -> StartedProcess:
    environ = environment(**settings)
    if program and forking.allows(settings):
        return forking.start(program, arguments, environ=environ, **place)
    start = ["-c", program] if program else ["-m", "service"]
    command = [sys.executable, *start, *arguments]
    return subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, **place)


class Process:
    """One `python -m service …`, or another *program*, and its output.

    Attributes:
        started: The fields of its `process.started` line, once `ready` has seen it.
    """

    def __init__(
        self, *arguments: str, directory: Path, program: str = PATIENT, **settings: str
    ) -> None:
        self._paths = [
            directory / f"{time.monotonic_ns()}-{arguments[0]}.{end}" for end in ("out", "err")
        ]
        out, err = (path.open("wb") for path in self._paths)
        with out, err:
            place = {"cwd": directory, "stdout": self._stdout(out), "stderr": err.fileno()}
            self.popen = _start(program, arguments, settings, **place)
        self.started: dict[str, Any] = {}

    def _stdout(self, out: BinaryIO) -> int:
        """Return where standard output goes; *out* must have it all in the end."""
        return out.fileno()

    @property
    def out(self) -> bytes:
        """Standard output so far."""
        return self._paths[0].read_bytes()

    @property
    def err(self) -> bytes:
        """Standard error so far."""
        return self._paths[1].read_bytes()

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return its JSON log lines so far, or those of one event."""
        whole = self.out.rpartition(b"\n")[0]
        found = [orjson.loads(line) for line in whole.split(b"\n") if line.startswith(b"{")]
        return [line for line in found if event in (None, line["event"])]

    def ready(self) -> Process:
        """Wait until it listens."""

        def ask() -> list[dict[str, Any]]:
            assert self.popen.poll() is None, (self.out, self.err)
            return self.lines("process.started")

        [self.started] = wait_until(ask, PROCESS_DEADLINE_S)
        return self

    @property
    def port(self) -> int:
        """Its port for webhooks."""
        return int(self.started["port"])

    @property
    def admin(self) -> str:
        """The address of its admin port."""
        return f"http://127.0.0.1:{self.started['admin_port']}"

    @property
    def url(self) -> str:
        """The address of its webhook endpoint."""
        return f"http://127.0.0.1:{self.port}{WEBHOOK}"

    def wait(self, deadline_s: float = PROCESS_DEADLINE_S) -> int:
        """Return its exit code."""
        return self.popen.wait(deadline_s)

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.popen.terminate()
        return self.wait()

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


class Invoked(NamedTuple):
    """The result of a command: its exit code, its output, and its log lines."""

    code: int
    out: bytes
    err: bytes
    logged: list[MutableMapping[str, Any]]


class Processes:
    """Starts processes on one Redis, and ends them all."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self.directory = directory
        self._processes: list[Process] = []

    def start(self, *arguments: str, program: str = PATIENT, **settings: str) -> Process:
        """Start `python -m service *arguments*`, by default on free ports."""
        process = Process(
            *arguments,
            directory=self.directory,
            program=program,
            **{**self._defaults(arguments[0]), **settings},
        )
        self._processes.append(process)
        return process

    def _defaults(self, command: str) -> dict[str, str]:
        url = self.url
        if roles.are_wanted():
            user = roles.by_command(command)
            url = roles.as_user(url, user) if user else url
        return {
            "REDIS_URL": url,
            "STRIPE_WEBHOOK_SECRETS": SECRET.reveal().decode(),
            "HOST": "127.0.0.1",
            "PORT": "0",
            "ADMIN_PORT": "0",
            "DRAIN_S": "0",
            "ADMIT_DEADLINE_S": f"{PATIENCE_S:g}",
            "PYTHONPATH": str(self.directory),
        }

    def invoke(self, *arguments: str, answer: str = "", **settings: str) -> Invoked:
        """Run `python -m service *arguments*` within this process, which is faster.

        Logging is not reconfigured, since that would affect all later tests. *answer* is typed when
        the command asks.
        """
        environ = environment(**{**self._defaults(arguments[0]), **settings})
        with (
            # In the folder of the tests, `dev` may have left a secret.
            contextlib.chdir(self.directory),
            mock.patch.dict(os.environ, environ, clear=True),
            mock.patch.object(sys, "argv", ["service", *arguments]),
            mock.patch.object(logs, "configure"),
            structlog.testing.capture_logs() as logged,
            CliRunner().isolation(answer) as (out, err, _),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        return Invoked(int(ended.value.code or 0), out.getvalue(), err.getvalue(), logged)

    def run(self, *arguments: str, program: str = PATIENT, **settings: str) -> Process:
        """Start a command and wait for its end."""
        process = self.start(*arguments, program=program, **settings)
        process.wait()
        return process

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.end()


class Sandbox(Processes):
    """Processes with a Redis of their own."""

    def __init__(self, server: EmbeddedServer, directory: Path) -> None:
        super().__init__(server.url, directory)
        self.server = server


@contextmanager
def open_sandbox(directory: Path) -> Iterator[Sandbox]:
    """Yield a sandbox with a new Redis."""
    with (
        EmbeddedServer.start(find_server(os.environ), directory=directory / "redis") as server,
        contextlib.closing(Sandbox(server, directory)) as opened,
    ):
        if roles.are_wanted():
            with redis.Redis.from_url(server.url) as client:
                roles.grant(client)
        yield opened
