"""What must hold whatever a client sends: `python -m tests.fuzz http`.

The service runs in a thread, on asyncio's own event loop, so that the CPU time of each callback can
be measured.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
from asyncio.events import Handle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import orjson

from service.config import LogFormat, LogLevel, Settings
from service.runtime import process
from service.runtime.embedded_redis import EmbeddedServer, find_server
from service.secret import Secret
from service.server.listener import Listener
from service.storage.connections import connect
from service.telemetry import logs
from tests.support.apps import serving
from tests.support.harness import SECRET, event, request, signed
from tests.support.mutating_client import (
    ANSWER,
    ANSWER_DEADLINE_S,
    MAX_BODY_BYTES,
    UNANSWERED,
    Attempt,
    Mutations,
    send_attempt,
)
from tests.support.waiting import until

MAX_CALLBACK_S = 0.05
SIDE_BY_SIDE = 16
RECEIVE_TIMEOUT_S = 0.3

# What a good request is answered in each state of the process.
_ADMITTED, _UNAVAILABLE = b'{"outcome":"admitted"}', b'{"error":"unavailable"}'
STATES = {"idle": _ADMITTED, "overloaded": _UNAVAILABLE, "draining": _ADMITTED}


@dataclass
class Findings:
    """What a run has found.

    Attributes:
        requests: How many requests were sent.
        answers: The number of responses of each status; 0 is no response.
        worst_s: The longest CPU time of one callback of the event loop.
        worst: What was sent at that time.
        faults: Everything that must not happen.
    """

    requests: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    worst_s: float = 0.0
    worst: bytes = b""
    faults: list[str] = field(default_factory=list)


class Service:
    """The service in a thread, on an event loop whose callbacks are timed.

    Attributes:
        port: The port it listens on.
        log: Everything it has logged.
        sent: The request that was sent last.
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
        )
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="service")

    @contextmanager
    def running(self) -> Iterator[Service]:
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
        async with (
            connect(self._settings.redis_url) as connections,
            serving(
                connections, self._settings, self._state, receive_timeout_s=RECEIVE_TIMEOUT_S
            ) as listener,
        ):
            self.port, self._listener = listener.port, listener
            # As in production: else most of what a large body costs is a full collection.
            process._tune_garbage_collector(works=False)
            self._started.set()
            await self._stop.wait()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Measure the CPU time of every callback in the service's thread."""
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


async def attack(
    service: Service, mutations: Mutations, requests: int, findings: Findings, good: bytes
) -> None:
    """Send damaged requests, several at a time, and judge the responses.

    A good request at the end must be answered *good*.
    """
    slots = asyncio.Semaphore(SIDE_BY_SIDE)

    async def one() -> None:
        async with slots:
            attempt = mutations.next()
            sent = service.sent = b"".join(attempt.pieces)
            answer = await send_attempt(service.port, attempt)
            findings.requests += 1
            judge(answer, sent, findings)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(requests):
            tasks.create_task(one())
    body = event(id="evt_alive", session="vs_alive")
    answer = await send_attempt(service.port, Attempt([request(body, signed(body))], ends=False))
    if good not in answer:
        findings.faults.append(f"a good request was answered {answer!r:.200}")
    try:
        await until(lambda: not service.still_open(), ANSWER_DEADLINE_S)
    except TimeoutError:
        findings.faults.append(f"{service.still_open()} connections were never closed")


def judge(answer: bytes, sent: bytes, findings: Findings) -> None:
    """Count the responses, and note each that the service must not give."""
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
    """Attack a service in one state, with its own Redis, and return what was found."""
    findings = Findings()
    with (
        TemporaryDirectory(prefix="fuzz-") as directory,
        EmbeddedServer.start(find_server(os.environ), directory=Path(directory)) as redis,
    ):
        service = Service(Secret(redis.url), findings, state)
        with service.running():
            asyncio.run(attack(service, Mutations(seed), requests, findings, STATES[state]))
        findings.faults += service.faults_logged()
    return findings
