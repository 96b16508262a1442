"""A client that sends damaged HTTP to a real listener, and what must hold whatever it sends.

The service runs in a thread of its own, on asyncio's loop in Python, so that every callback can be
timed by the processor time it took. Holds no test; `fuzz` is the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import threading
import time
from asyncio.events import Handle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import orjson

from service.config import LogFormat, LogLevel, Settings
from service.delivery.consumer_groups import create_groups
from service.runtime import process
from service.runtime.embedded_redis import EmbeddedServer, find_server
from service.secret import Secret
from service.server.listener import Listener
from service.storage.connections import connect
from service.storage.layout import Keys
from service.telemetry import logs
from tests.support.apps import webhook_app
from tests.support.harness import SECRET, event, listening, request, signed

MAX_CALLBACK_S = 0.05
SIDE_BY_SIDE = 16
RECEIVE_TIMEOUT_S = 0.3
ANSWER_DEADLINE_S = 20.0
MAX_BODY_BYTES = 262_144

ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{0,40})")
UNANSWERED = b"neither answered nor closed"
# What a good request hears in each state of the process.
STATES = {
    "idle": b'{"outcome":"admitted"}',
    "overloaded": b'{"error":"unavailable"}',
    "draining": b'{"outcome":"admitted"}',
}
_UNAVAILABLE = b'{"error":"unavailable"}'

HOSTILE = [
    *(b"\r\n", b"\n", b"\r", b"\0", b"\xff", b" ", b"\t", b":", b",", b";", b"\r\n\r\n", b"%00"),
    *(b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"),
    *(b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\nConnection: Upgrade\r\n", b"HTTP/2.0"),
    *(b"Stripe-Signature: t=1,v1=" + b"0" * 64 + b"\r\n", b"t=", b"v1=", b"A" * 4000),
    *(b"ffffffffffffffff\r\n", b"5;x=y\r\nhello\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *(b"/webhooks/stripe/", b"/webhooks/stripe/../x", b"//", b"http://x/livez", b"*", b"?a=b#c"),
    *(
        b"X-Request-Id: a\r\n",
        b"traceparent: 00-0-0-0\r\n",
        b"Host: \r\n",
        b"Cookie: " + b"a=b;" * 500,
    ),
]
# As much work as a body of the largest size can make.
LARGE = [
    event(metadata={f"key{n}": "x" for n in range(15_000)}),
    event(last_verification_report={"id": "vr_1", "document": {"files": ["file_1"] * 25_000}}),
    event(unknown=[{}] * 80_000),
    event(unknown={f"{n}": n for n in range(20_000)}),
    event(client_reference_id="\u0001" * 40_000),
    event(client_reference_id="\U0001f600" * 60_000),
]


@dataclass
class Findings:
    """What a run has seen.

    Attributes:
        answers: How many answers there were of each status; 0 is silence.
        worst_s: The most processor time one callback of the event loop took.
        worst: What was sent when it did.
        faults: Everything that must not be.
    """

    requests: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    worst_s: float = 0.0
    worst: bytes = b""
    faults: list[str] = field(default_factory=list)


class Attempt(NamedTuple):
    """One request, however damaged.

    Attributes:
        pieces: What is sent, in as many writes.
        ends: Whether it is said that nothing more will come.
    """

    pieces: list[bytes]
    ends: bool


class Mutations:
    """Makes damaged requests of right ones, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._number = 0

    def next(self) -> Attempt:
        """Return the next request."""
        found = bytearray(self._right())
        for _ in range(self._random.choice([0, 1, 1, 2, 3, 8])):
            self._damage(found)
        ends = self._random.random() < 0.2
        return Attempt(self._cut(bytes(found[: 4 * MAX_BODY_BYTES])), ends)

    def _right(self) -> bytes:
        self._number += 1
        body = event(id=f"evt_{self._number}", session=f"vs_{self._number % 50}")
        chosen = self._random.randrange(10)
        if chosen == 0:
            return b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * self._random.choice([1, 1, 2, 40])
        if chosen == 1:
            body = orjson.dumps({"type": "x" * self._random.choice([1, MAX_BODY_BYTES])})
        if chosen == 2:
            body = self._random.randbytes(self._random.choice([0, 1, 300, MAX_BODY_BYTES + 1]))
        if chosen == 3:
            body = b"[" * self._random.choice([500, MAX_BODY_BYTES])
        if chosen == 6:
            body = self._random.choice(LARGE)
        if chosen == 7:
            damaged = bytearray(body)
            self._damage(damaged)
            body = bytes(damaged)
        headers = signed(body) if self._random.random() < 0.8 else {}
        if chosen == 4:
            return self._chunked(body, headers)
        return request(body, headers, close=self._random.random() < 0.5) * (1 + (chosen == 5))

    def _chunked(self, body: bytes, headers: dict[str, str]) -> bytes:
        size = self._random.choice([1, 7, 1000])
        chunks = [body[i : i + size] for i in range(0, len(body), size)]
        head = request(b"", {**headers, "Transfer-Encoding": "chunked"})
        head = head.replace(b"Content-Length: 0\r\n", b"")
        return head + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in chunks) + b"0\r\n\r\n"

    def _damage(self, found: bytearray) -> None:
        at = self._random.randrange(len(found) + 1)
        # Half of it where it hurts: in the line and the headers.
        at = at if self._random.random() < 0.5 else min(at, self._random.randrange(300))
        length = self._random.choice([1, 1, 2, 8, 64])
        match self._random.randrange(6):
            case 0:
                found[at:at] = self._random.choice(HOSTILE)
            case 1:
                found[at : at + length] = self._random.choice(HOSTILE)
            case 2:
                del found[at : at + length]
            case 3:
                found[at : at + length] = self._random.randbytes(length)
            case 4:
                found[at:at] = found[at : at + length] * self._random.choice([1, 2, 300])
            case _:
                lines = bytes(found).split(b"\r\n")
                self._random.shuffle(lines)
                found[:] = b"\r\n".join(lines)

    def _cut(self, found: bytes) -> list[bytes]:
        """Cut a request into a few pieces, which may be as small as a byte."""
        cuts = sorted(
            self._random.randrange(len(found) + 1) for _ in range(self._random.choice([0, 0, 1, 5]))
        )
        return [found[a:b] for a, b in zip([0, *cuts], [*cuts, len(found)], strict=True)]


class Loop:
    """The service in a thread, on a loop whose callbacks are timed.

    Attributes:
        port: Where it listens.
        log: Everything it has logged.
    """

    def __init__(self, redis_url: Secret[str], findings: Findings, state: str) -> None:
        self.port = 0
        self.log = io.BytesIO()
        self.sent = b""
        self._findings = findings
        self._state = state
        self._listener: Listener | None = None
        self._settings = Settings(
            redis_url=redis_url,
            secrets={"": (SECRET,)},
            max_body_bytes=MAX_BODY_BYTES,
            max_in_flight=0 if state == "overloaded" else 512,
        )
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="service")

    @contextmanager
    def running(self) -> Iterator[Loop]:
        """Serve for the length of the block."""
        logs.configure(LogLevel.INFO, LogFormat.JSON, self.log)
        with self._timed():
            self._thread.start()
            assert self._started.wait(ANSWER_DEADLINE_S)
            try:
                yield self
            finally:
                self._loop.call_soon_threadsafe(self._stop.set)
                self._thread.join(ANSWER_DEADLINE_S)

    def faults_logged(self) -> list[str]:
        """Return the log lines that no request may cause."""
        logs.flush()
        lines = [orjson.loads(line) for line in self.log.getvalue().splitlines()]
        # Requests may be rejected or shed, and neither logs an exception.
        return [
            str(line)[:500]
            for line in lines
            if "exception" in line
            or (
                line["level"] in {"error", "critical"}
                and line["event"] not in {"event.unavailable", "requests.shed"}
            )
        ]

    def still_open(self) -> int:
        """Return how many connections the service has."""
        return len(self._listener._server.server_state.connections) if self._listener else 0

    def _run(self) -> None:
        self._loop.set_exception_handler(
            lambda _, context: self._findings.faults.append(f"loop: {context.get('message')}")
        )
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        settings = self._settings
        keys = Keys(settings.redis_prefix, settings.partitions)
        async with connect(settings.redis_url) as connections:
            await create_groups(connections, keys, settings.handlers)
            app, _ = webhook_app(connections, settings)
            async with listening(
                app,
                receive_timeout_s=RECEIVE_TIMEOUT_S,
                keep_alive_s=1,
                available_slots=app.available_slots,
            ) as listener:
                self.port, self._listener = listener.port, listener
                if self._state == "draining":
                    listener.drain()
                # As where it runs for real: a full collection is most of what a large body costs.
                process._tune_garbage_collector(works=False)
                self._started.set()
                await self._stop.wait()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Time every callback in the service's thread, by that thread's processor time."""
        plain: Callable[[Any], None] = Handle._run
        findings, thread = self._findings, self._thread

        def run(handle: Any) -> None:
            if threading.current_thread() is not thread or not self._started.is_set():
                plain(handle)
                return
            before = time.thread_time()
            plain(handle)
            took_s = time.thread_time() - before
            if took_s > findings.worst_s:
                findings.worst_s, findings.worst = took_s, self.sent
            if took_s > MAX_CALLBACK_S:
                findings.faults.append(f"{took_s * 1000:.0f} ms of event loop: {handle!r:.300}")

        with mock.patch.object(Handle, "_run", run):
            yield


async def torment(
    loop: Loop, mutations: Mutations, requests: int, findings: Findings, good: bytes
) -> None:
    """Send so many damaged requests, some side by side, and note what is wrong with the answers.

    A good one at the end should hear *good*.
    """
    slots = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one() -> None:
        async with slots:
            attempt = mutations.next()
            sent = loop.sent = b"".join(attempt.pieces)
            answer = await exchange(loop.port, attempt)
            findings.requests += 1
            judge(answer, sent, findings)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(requests):
            tasks.create_task(one())
    body = event(id="evt_alive", session="vs_alive")
    answer = await exchange(loop.port, Attempt([request(body, signed(body))], ends=False))
    if good not in answer:
        findings.faults.append(f"a good request was answered {answer!r:.200}")
    ends = time.monotonic() + ANSWER_DEADLINE_S
    while loop.still_open() and time.monotonic() < ends:  # noqa: ASYNC110 - another loop has them
        await asyncio.sleep(0.05)
    if loop.still_open():
        findings.faults.append(f"{loop.still_open()} connections were never closed")


async def exchange(port: int, attempt: Attempt) -> bytes:
    """Send a request and return what comes until the connection is closed, by whomever."""
    answer = b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(OSError):
            for piece in attempt.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if attempt.ends:
                writer.write_eof()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                while part := await reader.read(65536):
                    answer += part
    except TimeoutError:
        return UNANSWERED
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return answer


def judge(answer: bytes, sent: bytes, findings: Findings) -> None:
    """Note every answer, and each that is none of ours."""
    if answer == UNANSWERED:
        findings.faults.append(f"neither answered nor closed: {sent!r:.300}")
    found = ANSWER.findall(answer)
    if not found:
        findings.answers[0] += 1
        if answer:
            findings.faults.append(f"no HTTP: {answer!r:.200} to {sent!r:.300}")
    for status, body in found:
        findings.answers[int(status)] += 1
        if status.startswith(b"5") and not (status == b"503" and body.startswith(_UNAVAILABLE)):
            findings.faults.append(f"{status.decode()} to {sent!r:.300}")


def run(requests: int, seed: int, state: str) -> Findings:
    """Torment a service in one state, on a Redis of its own, and return what was found."""
    findings = Findings()
    with (
        TemporaryDirectory(prefix="fuzz-") as directory,
        EmbeddedServer.start(find_server(os.environ), directory=Path(directory)) as redis,
    ):
        loop = Loop(Secret(redis.url), findings, state)
        with loop.running():
            asyncio.run(torment(loop, Mutations(seed), requests, findings, STATES[state]))
        findings.faults += loop.faults_logged()
    return findings
