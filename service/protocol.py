"""One connection: uvicorn's protocol with what it leaves open closed.

Deadlines, caps, who gives way to whom, and when a connection ends. What may be a request is
decided in `framing`, one request is run by `cycle`; what is answered to it is `web`'s business,
listening and stopping are `server`'s.
"""

from __future__ import annotations

import asyncio
import math
from asyncio.events import TimerHandle
from enum import Enum, auto
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import httptools
import structlog
from uvicorn._types import ASGI3Application, ASGIVersions
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from . import metrics
from .cycle import Cycle
from .framing import (
    BUSY,
    IDLE,
    MALFORMED,
    MOST_HEADER_BYTES,
    NOT_NOW,
    TOO_LARGE,
    TOO_SLOW,
    Farewell,
    RefusedError,
    examine,
    is_whole_post,
)
from .terms import Terms

# Whoever sends more before our first answer would make us hold much for little.
MOST_PIPELINED = 32
# Closed over unread bytes, a connection may lose the answer that was written last: some get time.
LINGER_S = 1.0
MOST_LINGERING = 64
TOLD_EVERY_S = 1.0

_ASGI: ASGIVersions = {"version": "3.0", "spec_version": "2.3"}

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class _Stage(Enum):
    """How much of a request has come."""

    NOTHING = auto()
    HEADERS = auto()
    BODY = auto()


@lru_cache(maxsize=64)
def _target(url: bytes) -> tuple[str, bytes, bytes]:
    """Return a request target's path, as meant and as sent, and its query; nearly all are one."""
    found = httptools.parse_url(url)
    return unquote(found.path.decode("ascii")), found.path, found.query or b""


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a deadline for receiving a request, caps, and answers of our own.

    uvicorn waits for ever for a first byte, for the rest of a header or of a body, and httptools
    takes headers of any size and framing that others may read otherwise. The deadline runs from
    the connection or from a request's first byte to its last.
    """

    cycle: Cycle

    def __init__(self, *arguments: Any, terms: Terms, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._terms = terms
        self._deadline: TimerHandle | None = None
        self._stage = _Stage.NOTHING
        self._bytes_since_body = 0
        self._running: RequestResponseCycle | None = None
        self._idle_since: float | None = None
        self._farewell: Farewell | None = None
        self._is_lingering = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: the first request must come whole in time."""
        super().connection_made(transport)
        self._arm(self._terms.receive_timeout_s)
        if len(self.connections) > self._terms.most_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._disarm()
        self._unset_keepalive_if_required()
        self._terms.lingering -= self._is_lingering
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, counting what is no body, and leave no connection without a clock."""
        if self._farewell is not None:
            return
        if self._terms.is_busy() and self._is_whole_post(data):
            self._turn_away()
            return
        self._idle_since = None
        self._bytes_since_body += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            refused = error.__context__
            self._part(refused.farewell if isinstance(refused, RefusedError) else MALFORMED)
            return
        if self._bytes_since_body > MOST_HEADER_BYTES:
            self._part(TOO_LARGE)
        elif self._deadline is None and self._is_awaited():
            self._arm(self._terms.receive_timeout_s)

    def _is_whole_post(self, data: bytes) -> bool:
        """Say whether *data* is one request, from its first byte to its last, and plainly so."""
        is_between_requests = self._stage is _Stage.NOTHING and self._is_idle()
        if not is_between_requests or self._terms.draining or self.flow.write_paused:
            return False
        return is_whole_post(data)

    def _turn_away(self) -> None:
        """Answer a request nobody has looked into.

        Under overload this is most of what is done: it must cost far less than an event.
        """
        self._disarm()
        self._rest()
        self.transport.write(NOT_NOW)
        self._terms.turned_away += 1
        if self._terms.turned_away == 1:
            self.loop.call_later(TOLD_EVERY_S, self._terms.tell)

    def on_message_begin(self) -> None:
        """Begin a further request; most come whole in one piece and need no clock at all."""
        self.url = b""
        self.headers = []
        self._stage = _Stage.HEADERS

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; called more often than anything else here."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Refuse what is too large, too much or ambiguous; while draining, be the last."""
        version = self.parser.get_http_version()
        # The parser leaves what follows a request for an upgrade to another protocol unread.
        if version not in ("1.0", "1.1") or self.parser.should_upgrade():
            raise RefusedError(MALFORMED)
        is_expecting = examine(self.url, self.headers, version, self._bytes_since_body)
        if len(self.pipeline) >= MOST_PIPELINED:
            raise RefusedError(BUSY)
        is_next = self._is_idle()
        self.cycle = self._begun(version, is_expecting=is_expecting)
        # What comes after a body and claims to be headers is kept from the request.
        self.headers = []
        self._stage = _Stage.BODY
        if is_next:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _begun(self, version: str, *, is_expecting: bool) -> Cycle:
        """Return what runs the application for the request whose headers have come."""
        path, raw_path, query = _target(self.url)
        may_stay = version != "1.0" and self.parser.should_keep_alive()
        return Cycle(
            scope={
                "type": "http",
                "asgi": _ASGI,
                "http_version": version,
                "method": self.parser.get_method().decode(),
                "scheme": self.scheme or "http",
                "root_path": "",
                "path": path,
                "raw_path": raw_path,
                "query_string": query,
                "headers": self.headers,
                "client": self.client,
                "server": self.server,
            },
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=is_expecting,
            keep_alive=may_stay and not self._terms.draining,
            on_response=self.on_response_complete,
        )

    def on_body(self, body: bytes) -> None:
        """Count anew: a body has a cap of its own."""
        self._bytes_since_body = 0
        if not self.cycle.response_complete:
            self.cycle.take(body)

    def on_message_complete(self) -> None:
        """Stop the clock: the request is whole."""
        self._disarm()
        self._stage = _Stage.NOTHING
        self._bytes_since_body = 0
        self._terms.come += 1
        if self._terms.come == 1:
            self.loop.call_soon(self._terms.end_turn)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or leave once the last that was whole is answered."""
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            else:
                self._rest()
        if self._farewell is not None and not self._is_in_hand():
            self._leave(self._farewell)

    def _rest(self) -> None:
        """Be idle from now on; the timer of an earlier rest runs on, and then finds a later one."""
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._rest_for(self.timeout_keep_alive)

    def _rest_for(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def timeout_keep_alive_handler(self) -> None:
        """Close what has been idle for long enough."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        idle_for_s = self.loop.time() - self._idle_since
        if idle_for_s < self.timeout_keep_alive:
            self._rest_for(self.timeout_keep_alive - idle_for_s)
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        """Close when idle; what has begun may finish."""
        if self._stage is not _Stage.HEADERS:
            super().shutdown()

    def _make_room(self) -> None:
        """Close the connection that has kept us waiting longest, which may be this one."""
        connections: set[Any] = self.connections
        min(connections, key=GuardedProtocol.waiting_since).give_way()

    def waiting_since(self) -> float:
        """Return since when nothing but the client is waited for; infinity while in hand."""
        if self._is_in_hand():
            return math.inf
        if self._deadline is not None:
            return self._deadline.when() - self._terms.receive_timeout_s
        return math.inf if self._idle_since is None else self._idle_since

    def give_way(self) -> None:
        """End this connection in favour of another, which may take its place at once."""
        # Unasked, an answer would be taken for that to the next request.
        self._part(BUSY if self._deadline is not None else IDLE)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _is_awaited(self) -> bool:
        """Say whether a request has begun, or bytes that begin none stopped the idle clock."""
        is_between = self._stage is _Stage.NOTHING
        return not is_between or (self._idle_since is None and self._is_idle())

    def _is_idle(self) -> bool:
        return self._running is None or self._running.response_complete

    def _is_in_hand(self) -> bool:
        """Say whether a whole request waits for its answer."""
        if self._running is None:
            return False
        return bool(self.pipeline) or not (
            self._running.response_complete or self._running.more_body
        )

    def _part(self, farewell: Farewell) -> None:
        """Read no more, and leave as soon as what was whole has been answered."""
        metrics.CONNECTIONS_REFUSED.labels(farewell.reason).inc()
        log.info("connection.refused", reason=farewell.reason)
        self._disarm()
        self._farewell = farewell
        if self._stage is _Stage.BODY:
            self._forsake()
        if not self._is_in_hand():
            self._leave(self._farewell)

    def _forsake(self) -> None:
        """Take back the request whose body is not waited for any more."""
        if self.cycle.response_started and self._farewell is not None:
            self._farewell = self._farewell._replace(answer=b"")
        if self.pipeline:
            self.pipeline.popleft()
        else:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _leave(self, farewell: Farewell) -> None:
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        if not farewell.answer or self.transport.is_closing():
            self.transport.close()
            return
        self.transport.write(farewell.answer)
        if self._terms.lingering >= MOST_LINGERING:
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._is_lingering = True
        self._terms.lingering += 1
        self._arm(LINGER_S)

    def _arm(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._farewell is None:
            self._part(TOO_SLOW)
        else:
            self.transport.close()
