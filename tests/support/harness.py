"""What tests from outside share: signed events, raw connections, real processes.

Holds no test and no fixture; `conftest` has those.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from unittest import mock

import httpx2
import orjson
import pytest
import redis
import structlog.testing
from click.testing import CliRunner
from starlette.applications import Starlette

import service
from service.cli.main import main
from service.config import describe
from service.runtime.embedded_redis import EmbeddedServer, find_server
from service.secret import Secret
from service.server.listener import Listener
from service.stripe.signatures import sign
from service.telemetry import logs
from tests.support import roles
from tests.support.servers import PATIENCE_S

Found = TypeVar("Found")

PACKAGE = Path(service.__file__).parent
# Marks tests that take long, such as fail-overs under load.
takes_long = pytest.mark.skipif(
    not os.environ.get("TEST_LONG"), reason="takes long: set TEST_LONG=1, as .ci/run does"
)
DEADLINE_S = 2 * PATIENCE_S
# For a dozen processes that start at once on a busy machine.
PROCESS_DEADLINE_S = 3 * PATIENCE_S
NOW = int(time.time())
PREFIX = "identity.verification_session."
WEBHOOK = "/webhooks/stripe"
SECRET = Secret(b"whsec_tests")
# `python -m service` with longer timeouts for Redis, for busy machines.
PATIENT = f"""
from service.storage import clients
from service.cli import main
for name in ("CALL_TIMEOUT_S", "CONNECT_TIMEOUT_S", "POOL_WAIT_S"):
    setattr(clients, name, {PATIENCE_S})
main()
"""
SESSION_URL = "https://verify.stripe.com/start/test_x"


def event(
    word: str = "created",
    *,
    id: str = "evt_1",
    session: str = "vs_1",
    status: str = "requires_input",
    created: int | None = None,
    envelope: Mapping[str, Any] | None = None,
    **fields: Any,
) -> bytes:
    """Return the body of an event about a session, by default created at `NOW`."""
    return orjson.dumps(
        {
            "id": id,
            "object": "event",
            "type": word if "." in word else PREFIX + word,
            "created": NOW if created is None else created,
            "livemode": False,
            "data": {"object": {"id": session, "status": status, **fields}},
            **(envelope or {}),
        }
    )


def thin_event(
    word: str = "created",
    *,
    id: str = "evt_thin_1",
    session: str = "vs_1",
    created: int | None = None,
    **fields: Any,
) -> bytes:
    """Return the body of a thin event about a session, by default created at `NOW`."""
    at = datetime.fromtimestamp(NOW if created is None else created, UTC)
    return orjson.dumps(
        {
            "id": id,
            "object": "v2.core.event",
            "type": f"v1.{PREFIX}{word}",
            "created": f"{at:%Y-%m-%dT%H:%M:%S}.678Z",
            "livemode": False,
            "related_object": {
                "id": session,
                "type": "identity.verification_session",
                "url": f"/v1/identity/verification_sessions/{session}",
            },
            **fields,
        }
    )


def signed(body: bytes, secret: Secret[bytes] = SECRET, *, age_s: float = 0) -> dict[str, str]:
    """Return the headers that sign *body*."""
    return {"Stripe-Signature": sign(body, secret, int(time.time() - age_s))}


def request(
    body: bytes, headers: Mapping[str, str], *, path: str = WEBHOOK, close: bool = True
) -> bytes:
    """Return the bytes of a POST."""
    lines = {"Host": "tests", "Content-Length": str(len(body)), **headers}
    if close:
        lines["Connection"] = "close"
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


@asynccontextmanager
async def listening(app: Starlette, **changes: Any) -> AsyncIterator[Listener]:
    """Serve *app* on any free port."""
    defaults = {
        "max_connections": 1000,
        "receive_timeout_s": 10.0,
        "keep_alive_s": 60,
        "grace_s": 5.0,
    }
    listener = Listener(app, host="127.0.0.1", port=0, **{**defaults, **changes})
    serving = asyncio.create_task(listener.run())
    try:
        yield listener
    finally:
        listener.stop()
        await serving


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield a raw connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Read until the other side closes."""
    try:
        return await asyncio.wait_for(reader.read(), DEADLINE_S)
    except ConnectionError:
        return b""


async def talk(port: int, *pieces: bytes) -> bytes:
    """Send *pieces* and return the whole answer, until the connection is closed."""
    async with connected(port) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
        return await rest(reader)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read one response from a connection that stays open."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
    body = await reader.readexactly(int(fields[b"content-length"]))
    return int(head.split(b" ")[1]), body


async def eventually(ask: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Return what *ask* says once it is true."""
    ends = time.monotonic() + deadline_s
    while not (found := ask()):
        assert time.monotonic() < ends, "waited in vain"
        await asyncio.sleep(0.02)
    return found


def soon(ask: Callable[[], Found], deadline_s: float = DEADLINE_S) -> Found:
    """Return what *ask* says once it is true."""
    ends = time.monotonic() + deadline_s
    while not (found := ask()):
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.02)
    return found


def cost(call: Callable[[], object], *, times: int = 1) -> float:
    """Return the minimum CPU time of *call*, for comparison with that of another."""
    found = []
    for _ in range(7):
        began = time.thread_time()
        for _ in range(times):
            call()
        found.append(time.thread_time() - began)
    return min(found)


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


class Process:
    """One `python -m service …`, or another *program*, and its output.

    Attributes:
        started: The fields of its `process.started` line, once `ready` has seen it.
    """

    def __init__(
        self, *arguments: str, directory: Path, program: str = PATIENT, **settings: str
    ) -> None:
        start = ["-c", program] if program else ["-m", "service"]
        self._paths = [
            directory / f"{time.monotonic_ns()}-{arguments[0]}.{end}" for end in ("out", "err")
        ]
        out, err = (path.open("wb") for path in self._paths)
        with out, err:
            self.popen = subprocess.Popen(
                [sys.executable, *start, *arguments],
                cwd=directory,
                env=environment(**settings),
                stdin=subprocess.DEVNULL,
                stdout=self._stdout(out),
                stderr=err,
            )
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

        [self.started] = soon(ask, PROCESS_DEADLINE_S)
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


async def post_all(
    client: httpx2.AsyncClient, url: str, bodies: Iterable[bytes]
) -> list[httpx2.Response]:
    """Post all *bodies*, signed, concurrently."""
    return await asyncio.gather(
        *(client.post(url, content=body, headers=signed(body)) for body in bodies)
    )
