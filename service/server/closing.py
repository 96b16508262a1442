"""When a connection ends, and how: its clocks, its place among others, and its last answer.

A clock runs whenever the connection waits for its client, and for nothing else:

    from the connection, or a request's first byte, to its last    RECEIVE_TIMEOUT_S
    while the socket does not take an answer                       RECEIVE_TIMEOUT_S
    between requests                                               KEEP_ALIVE_S

At the limit of connections, the one whose clock has run longest gives way to a new one. What a
request is, and what runs it, is `protocol`'s business.
"""

from __future__ import annotations

import asyncio
import math
from asyncio.events import TimerHandle
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ..telemetry import metrics
from .framing import BUSY, IDLE, TOO_SLOW, Farewell
from .listener_state import ListenerState

# Closed over unread bytes, a connection may lose the answer that was written last: some get time.
LINGER_S = 1.0
MAX_LINGERING = 64

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class ClosingProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a deadline for each of its client's turns.

    uvicorn waits for ever for a first byte, for the rest of a header or of a body, and for a client
    to read.
    """

    def __init__(self, *arguments: Any, terms: ListenerState, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._terms = terms
        self._deadline: TimerHandle | None = None
        self._blocked: TimerHandle | None = None
        self._idle_since: float | None = None
        self._running: RequestResponseCycle | None = None
        self._farewell: Farewell | None = None
        self._is_lingering = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: the first request must come whole in time."""
        super().connection_made(transport)
        # Writing pauses as soon as the socket does not take an answer: it is full of others.
        transport.set_write_buffer_limits(high=0)
        self._arm(self._terms.receive_timeout_s)
        if len(self.connections) > self._terms.most_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._disarm()
        self._unblock()
        self._unset_keepalive_if_required()
        self._terms.lingering -= self._is_lingering
        if self._running is not None:
            self._running.disconnected = True
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the clock of a client that does not take its answers."""
        super().pause_writing()
        self._blocked = self.loop.call_later(self._terms.receive_timeout_s, self._abort)

    def resume_writing(self) -> None:
        """Stop that clock: the socket has taken all there was."""
        super().resume_writing()
        self._unblock()

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

    def _make_room(self) -> None:
        """Close the connection that has kept us waiting longest, which may be this one."""
        connections: set[Any] = self.connections
        min(connections, key=ClosingProtocol.waiting_since).give_way()

    def waiting_since(self) -> float:
        """Return since when nothing but the client is waited for; infinity while in hand."""
        if self._blocked is not None:
            return self._blocked.when() - self._terms.receive_timeout_s
        if self._is_in_hand():
            return math.inf
        if self._deadline is not None:
            return self._deadline.when() - self._terms.receive_timeout_s
        return math.inf if self._idle_since is None else self._idle_since

    def give_way(self) -> None:
        """End this connection in favour of another, which may take its place at once."""
        if self._blocked is not None:
            self._abort()
        else:
            # Unasked, an answer would be taken for that to the next request.
            self._part(BUSY if self._deadline is not None else IDLE)

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
        self._refuse(farewell)
        self._forsake()
        if not self._is_in_hand():
            self._leave()

    def _refuse(self, farewell: Farewell) -> None:
        metrics.CONNECTIONS_REFUSED.labels(farewell.reason).inc()
        log.info("connection.refused", reason=farewell.reason)
        self._disarm()
        self._farewell = farewell

    def _forsake(self) -> None:
        """Take back the request that is not whole, if any."""

    def _leave(self) -> None:
        """Give the last answer, and time to read it."""
        answer = self._farewell.answer if self._farewell is not None else b""
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        if not answer or self.transport.is_closing():
            self.transport.close()
            return
        self.transport.write(answer)
        if self._terms.lingering >= MAX_LINGERING:
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._is_lingering = True
        self._terms.lingering += 1
        self._arm(LINGER_S)

    def _abort(self) -> None:
        """End a connection whose client does not read: no last answer would reach it."""
        self._refuse(TOO_SLOW)
        self.connections.discard(self)
        self.transport.abort()

    def _unblock(self) -> None:
        if self._blocked is not None:
            self._blocked.cancel()
            self._blocked = None

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
