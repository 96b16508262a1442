"""Requests on a connection: uvicorn's protocol, read strictly and with bounds.

HTTP has one reading here, whether the process is idle, overloaded or draining: `framing` decides
what is a request at all. uvicorn builds the scope, runs the application and queues pipelined
requests. How a connection ends is `closing`'s business, what is answered `web`'s.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from .closing import ClosingProtocol, State
from .framing import (
    BUSY,
    MALFORMED,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_SMALL_CHUNKS,
    MIN_CHUNK_BYTES,
    SHED,
    TOO_LARGE,
    TOO_MANY_CHUNKS,
    CloseConnectionError,
    check_head,
    split_url,
    without_upgrade,
)
from .one_write import OneWriteCycle

# Each pipelined request waits for the responses before it, with all its headers in memory.
MAX_PIPELINED = 8
REPORT_EVERY_S = 1.0


class _Stage(Enum):
    """Which part of a request is parsed next."""

    START = auto()
    HEADERS = auto()
    BODY = auto()
    # The body of a request that will be answered 503: parsed like any other, and dropped.
    SHED_BODY = auto()


class GuardedProtocol(ClosingProtocol):
    """Reads HTTP strictly, with caps on headers, chunks and pipelined requests.

    httptools accepts headers of any size, and framing that other parsers read in another way.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._stage = _Stage.START
        self._bytes_since_body = 0
        self._body_bytes = 0
        self._chunks = 0
        self._head_without_upgrade: bytes | None = None
        self._next: RequestResponseCycle | None = None
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the task that runs the requests."""
        super().connection_made(transport)
        task = self.loop.create_task(self._run_requests())
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def connection_lost(self, exc: Exception | None) -> None:
        """End that task once the request that it runs is over."""
        super().connection_lost(exc)
        self._wake()

    def data_received(self, data: bytes) -> None:
        """Parse *data*, then wait for what is missing."""
        if self._state in (State.CLOSING, State.LINGERING):
            return
        self._bytes_since_body += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            ours = error.__context__
            final = ours.final_response if isinstance(ours, CloseConnectionError) else MALFORMED
            self._close_with(final)
            return
        if self._bytes_since_body > MAX_HEADER_BYTES:
            self._close_with(TOO_LARGE)
        elif self._state is not State.ANSWERING:
            self._wait()

    def _parse(self, data: bytes) -> None:
        """Parse; a head that offers an upgrade is parsed a second time, without the offer."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offered:
                data = (self._head_without_upgrade or b"") + data[offered.args[0] :]
                self._head_without_upgrade = None
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            else:
                return

    def _wait(self) -> None:
        """Enter the state that follows from what was received and answered."""
        if self._is_answering():
            self._enter(State.ANSWERING)
        elif self._stage is _Stage.START and self._bytes_since_body == 0:
            self._enter(State.IDLE)
        else:
            # Also after bytes that begin no request, such as empty lines.
            self._enter(State.RECEIVING)

    def on_message_begin(self) -> None:
        """Begin a further request."""
        super().on_message_begin()
        self._stage = _Stage.HEADERS

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, up to a number of them; unlike uvicorn, without whitespace around it."""
        if len(self.headers) == MAX_HEADERS:
            raise CloseConnectionError(TOO_LARGE)
        name, value = name.lower(), value.strip(b" \t")
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Refuse what is ambiguous or too much; shed it under overload; else run it."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise CloseConnectionError(MALFORMED)
        if self.parser.should_upgrade():
            method = self.parser.get_method()
            self._head_without_upgrade = without_upgrade(method, self.url, self.headers, version)
            return
        check_head(self.url, self.headers, version, received=self._bytes_since_body)
        url = split_url(self.url)
        self._body_bytes = self._chunks = 0
        if self._listener.is_overloaded() and self._may_be_shed(version):
            self._stage = _Stage.SHED_BODY
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise CloseConnectionError(BUSY)
        self.scope["method"] = self.parser.get_method().decode()
        self.scope["http_version"] = version
        self.scope["path"], self.scope["raw_path"], self.scope["query_string"] = url
        self._stage = _Stage.BODY
        self._begin(keep_alive=version != "1.0" and not self._listener.draining)
        # The request must not get trailers, which the parser reports as headers.
        self.headers = []

    def _begin(self, *, keep_alive: bool) -> None:
        """Run the request, or let it wait for those before it."""
        self.cycle = OneWriteCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=keep_alive and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        if self._is_free():
            self._run(self.cycle)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _may_be_shed(self, version: str) -> bool:
        """Say whether the request may be answered 503 without the application, once it is whole.

        Under overload this is most of the work, and it must cost far less than an event does. It
        is for a POST on a connection that stays open, has no other request to answer, and whose
        client reads its responses and does not wait for 100 Continue.
        """
        return (
            self.parser.get_method() == b"POST"
            and version != "1.0"
            and self.parser.should_keep_alive()
            and not self._listener.draining
            and not self.expect_100_continue
            and not self.flow.write_paused
            and self._is_free()
        )

    def _is_free(self) -> bool:
        """Say whether no request runs; those in the pipeline wait for one that does."""
        return self._running is None or self._running.response_complete

    def _run(self, cycle: RequestResponseCycle) -> None:
        self._running = self._next = cycle
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _run_requests(self) -> None:
        """Run the application for one request after the other, until the connection is lost.

        On Python 3.13 a task for each request would cost 5 % of the CPU of an event.
        """
        while cycle := await self._next_request():
            await cycle.run_asgi(self.app)

    async def _next_request(self) -> RequestResponseCycle | None:
        if self._next is None and not self.transport.is_closing():
            self._waiter = self.loop.create_future()
            await self._waiter
        cycle, self._next = self._next, None
        return cycle

    def on_body(self, body: bytes) -> None:
        """Keep a part of a body, or drop it; the bytes of headers are counted anew."""
        self._bytes_since_body = 0
        self._body_bytes += len(body)
        self._chunks += 1
        if self._chunks > MAX_SMALL_CHUNKS + self._body_bytes // MIN_CHUNK_BYTES:
            raise CloseConnectionError(TOO_MANY_CHUNKS)
        if self._stage is _Stage.BODY:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Hand the whole request to the application, or shed it."""
        if self._head_without_upgrade is not None:
            return
        is_shed = self._stage is _Stage.SHED_BODY
        self._stage = _Stage.START
        self._bytes_since_body = 0
        if is_shed:
            self._shed()
            return
        self._listener.requests_this_turn += 1
        if self._listener.requests_this_turn == 1:
            self.loop.call_soon(self._listener.end_turn)
        super().on_message_complete()
        if not self.cycle.response_complete:
            self._enter(State.ANSWERING)

    def _shed(self) -> None:
        """Answer a whole request without running the application."""
        if self._listener.draining:
            raise CloseConnectionError(BUSY)
        self.transport.write(SHED)
        self._listener.shed += 1
        if self._listener.shed == 1:
            self.loop.call_later(REPORT_EVERY_S, self._listener.report_shed)

    def on_response_complete(self) -> None:
        """Run the next request, if there is one; end once the last whole one is answered.

        uvicorn's method would start a keep-alive timer for each response: see `_enter`.
        """
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._run(self.pipeline.pop()[0])
        if self._state is not State.CLOSING:
            self._wait()
        elif not self._is_answering():
            self._send_final_response()

    def shutdown(self) -> None:
        """Close when idle; a request that has begun may finish."""
        if self._stage not in (_Stage.HEADERS, _Stage.SHED_BODY):
            super().shutdown()

    def _abort_request(self) -> None:
        # There may be many, and the connection may linger.
        self.headers = []
        if self._stage is not _Stage.BODY:
            return
        if self.cycle.response_started:
            self._final_response = b""
        if self.pipeline:
            self.pipeline.popleft()
        else:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
