"""Requests on a connection: uvicorn's protocol with what it leaves open closed.

There is one reading of HTTP, whatever state the process is in. What may be a request is decided in
`framing`, one request is run by `cycle`, a connection ends as in `closing`; what is answered is
`web`'s business, listening and stopping are `server`'s.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn._types import ASGI3Application, ASGIVersions, HTTPScope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from .closing import ClosingProtocol
from .cycle import Cycle
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
    RefusedError,
    examine,
    without_upgrade,
)

# Each request that waits for the answers before it is held with all its headers.
MAX_PIPELINED = 8
REPORT_EVERY_S = 1.0

_ASGI: ASGIVersions = {"version": "3.0", "spec_version": "2.3"}


class _Stage(Enum):
    """How much of a request has come."""

    NOTHING = auto()
    HEADERS = auto()
    BODY = auto()
    # The body of a request that will be answered 503: parsed like any other, and dropped.
    SHED_BODY = auto()


@lru_cache(maxsize=64)
def _target(url: bytes) -> tuple[str, bytes, bytes]:
    """Return a request target's path, as meant and as sent, and its query; nearly all are one."""
    found = httptools.parse_url(url)
    return unquote(found.path.decode("ascii")), found.path, found.query or b""


class GuardedProtocol(ClosingProtocol):
    """Reads HTTP strictly, with caps on headers, chunks and pipelined requests.

    httptools takes headers of any size and framing that others may read otherwise.
    """

    cycle: Cycle

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._stage = _Stage.NOTHING
        self._bytes_since_body = 0
        self._body_bytes = 0
        self._chunks = 0
        self._head_without_upgrade: bytes | None = None

    def data_received(self, data: bytes) -> None:
        """Parse, counting what is no body, and leave no connection without a clock."""
        if self._farewell is not None:
            return
        self._idle_since = None
        self._bytes_since_body += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            refused = error.__context__
            self._part(refused.farewell if isinstance(refused, RefusedError) else MALFORMED)
            return
        if self._bytes_since_body > MAX_HEADER_BYTES:
            self._part(TOO_LARGE)
        elif self._deadline is None and self._is_awaited():
            self._arm(self._terms.receive_timeout_s)

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

    def on_message_begin(self) -> None:
        """Begin a further request; most come whole in one piece and need no clock at all."""
        self.url = b""
        self.headers = []
        self._stage = _Stage.HEADERS

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; called more often than anything else here."""
        if len(self.headers) == MAX_HEADERS:
            raise RefusedError(TOO_LARGE)
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        """Refuse what is too large, too much or ambiguous; while draining, be the last."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise RefusedError(MALFORMED)
        method = self.parser.get_method()
        if self.parser.should_upgrade():
            self._head_without_upgrade = without_upgrade(method, self.url, self.headers, version)
            return
        is_expecting = examine(self.url, self.headers, version, self._bytes_since_body)
        scope = self._scope(method, version)
        may_stay = version != "1.0" and self.parser.should_keep_alive() and not self._terms.draining
        self._body_bytes = self._chunks = 0
        if method == b"POST" and may_stay and not is_expecting and self._is_overloaded():
            self._stage = _Stage.SHED_BODY
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise RefusedError(BUSY)
        is_next = self._is_idle()
        self.cycle = self._cycle(scope, is_expecting=is_expecting, may_stay=may_stay)
        # What comes after a body and claims to be headers is kept from the request.
        self.headers = []
        self._stage = _Stage.BODY
        if is_next:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _is_overloaded(self) -> bool:
        """Say whether the next request is answered 503 here, as soon as it is whole.

        That is most of what is done under overload: it must cost far less than an event does. A
        client that does not read these answers is given no more of them.
        """
        return self._terms.is_busy() and self._is_idle() and not self.flow.write_paused

    def _scope(self, method: bytes, version: str) -> HTTPScope:
        path, raw_path, query = _target(self.url)
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": method.decode(),
            "scheme": self.scheme or "http",
            "root_path": "",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers,
            "client": self.client,
            "server": self.server,
        }

    def _cycle(self, scope: HTTPScope, *, is_expecting: bool, may_stay: bool) -> Cycle:
        """Return what runs the application for the request whose headers have come."""
        return Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=is_expecting,
            keep_alive=may_stay,
            on_response=self.on_response_complete,
        )

    def on_body(self, body: bytes) -> None:
        """Keep a part of a body, or drop it; the bytes of headers are counted anew."""
        self._bytes_since_body = 0
        self._body_bytes += len(body)
        self._chunks += 1
        if self._chunks > MAX_SMALL_CHUNKS + self._body_bytes // MIN_CHUNK_BYTES:
            raise RefusedError(TOO_MANY_CHUNKS)
        if self._stage is _Stage.BODY and not self.cycle.response_complete:
            self.cycle.take(body)

    def on_message_complete(self) -> None:
        """Stop the clock: the request is whole."""
        if self._head_without_upgrade is not None:
            return
        is_shed = self._stage is _Stage.SHED_BODY
        self._disarm()
        self._stage = _Stage.NOTHING
        self._bytes_since_body = 0
        if is_shed:
            self._shed()
            return
        self._terms.come += 1
        if self._terms.come == 1:
            self.loop.call_soon(self._terms.end_turn)
        super().on_message_complete()

    def _shed(self) -> None:
        """Answer a whole request without running the application."""
        if self._terms.draining:
            raise RefusedError(BUSY)
        self._rest()
        self.transport.write(SHED)
        self._terms.shed += 1
        if self._terms.shed == 1:
            self.loop.call_later(REPORT_EVERY_S, self._terms.report)

    def on_response_complete(self) -> None:
        """Go on with the next request, or leave once the last that was whole is answered."""
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            else:
                self._rest()
        if self._farewell is not None and not self._is_in_hand():
            self._leave()

    def shutdown(self) -> None:
        """Close when idle; what has begun may finish."""
        if self._stage not in (_Stage.HEADERS, _Stage.SHED_BODY):
            super().shutdown()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _is_awaited(self) -> bool:
        """Say whether a request has begun, or bytes that begin none stopped the idle clock."""
        is_between = self._stage is _Stage.NOTHING
        return not is_between or (self._idle_since is None and self._is_idle())

    def _forsake(self) -> None:
        """Take back the request whose body is not waited for any more."""
        # They may be many, and the connection may linger.
        self.headers = []
        if self._stage is not _Stage.BODY:
            return
        if self.cycle.response_started and self._farewell is not None:
            self._farewell = self._farewell._replace(answer=b"")
        if self.pipeline:
            self.pipeline.popleft()
        else:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
