"""What a connection waits for, how long, and how it ends.

A connection is in one state at a time:

    state      waits for                        deadline               then
    RECEIVING  the rest of a request            RECEIVE_TIMEOUT_S      CLOSING, without a response
    ANSWERING  the application's response       none: it has its own   IDLE, or RECEIVING if the
                                                                       next request has begun
    IDLE       the next request                 KEEP_ALIVE_S           closed
    CLOSING    responses to whole requests      none                   final response, LINGERING
    LINGERING  the client to close              LINGER_S               closed

A new connection is in RECEIVING: its first request must come whole in that time.

Nothing is read any more in CLOSING and LINGERING. Whatever the state, a client has
RECEIVE_TIMEOUT_S to take a response that its socket has no room for; then it is cut off.

Above the limit of connections a new one evicts the one that has waited for its client longest.

How requests are parsed and run is `protocol`'s business.
"""

from __future__ import annotations

import asyncio
import math
from asyncio.events import TimerHandle
from enum import StrEnum, auto
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ..telemetry import metrics
from .framing import BUSY, IDLE, TOO_SLOW, FinalResponse
from .listener_state import ListenerState

# Closing a socket with unread input sends RST, which can destroy the final response before the
# client has read it. So linger first (lingering close), but not with any number of connections.
LINGER_S = 1.0
MAX_LINGERING = 64

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class State(StrEnum):
    """What a connection waits for; see the table above."""

    RECEIVING = auto()
    ANSWERING = auto()
    IDLE = auto()
    CLOSING = auto()
    LINGERING = auto()


class ClosingProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a deadline for everything that the client has to do.

    uvicorn waits without limit for a first byte, for the rest of a header or of a body, and for a
    client to read.
    """

    def __init__(self, *arguments: Any, listener_state: ListenerState, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._listener = listener_state
        self._state = State.IDLE
        self._since = 0.0
        self._deadlines_s = {
            State.RECEIVING: listener_state.receive_timeout_s,
            State.IDLE: self.timeout_keep_alive,
            State.LINGERING: LINGER_S,
        }
        self._timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._final_response = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, and evict a connection if there are too many."""
        super().connection_made(transport)
        # Writing pauses as soon as the socket does not take all of a response.
        transport.set_write_buffer_limits(high=0)
        self._enter(State.RECEIVING)
        if len(self.connections) > self._listener.max_connections:
            connections: set[Any] = self.connections
            min(connections, key=ClosingProtocol.waiting_since).evict()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._cancel_timer()
        self._cancel_write_timer()
        self._listener.lingering -= self._state is State.LINGERING
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give the client a deadline for taking its response."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._listener.receive_timeout_s, self._abort)

    def resume_writing(self) -> None:
        """Lift that deadline: the socket has taken the whole response."""
        super().resume_writing()
        self._cancel_write_timer()

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def waiting_since(self) -> float:
        """Return since when the connection waits for its client; infinity if it does not."""
        if self._write_timer is not None:
            return self._write_timer.when() - self._listener.receive_timeout_s
        return self._since if self._state in (State.RECEIVING, State.IDLE) else math.inf

    def evict(self) -> None:
        """End this connection in favor of another one."""
        if self._write_timer is not None:
            self._abort()
        else:
            # On an idle connection a response would be taken for that to the next request.
            self._close_with(IDLE if self._state is State.IDLE else BUSY)

    def _enter(self, state: State) -> None:
        """Enter *state*; its deadline counts from now on.

        A timer that ends no later than the deadline runs on, and is set anew when it ends: a
        connection that is used alternates between ANSWERING and IDLE, and needs no two timers for
        each request.
        """
        if self._state is state is State.RECEIVING:
            # The deadline is for the whole request: a byte now and then does not move it.
            return
        self._state = state
        self._since = self.loop.time()
        wait_s = self._deadlines_s.get(state)
        if wait_s is None:
            return
        if self._timer is not None and self._timer.when() > self._since + wait_s:
            self._cancel_timer()
        if self._timer is None:
            self._timer = self.loop.call_later(wait_s, self._on_timer)

    def _on_timer(self) -> None:
        """End a connection that has been in one state for too long."""
        self._timer = None
        if self._state not in self._deadlines_s:
            return
        left_s = self._since + self._deadlines_s[self._state] - self.loop.time()
        if left_s > 0:
            self._timer = self.loop.call_later(left_s, self._on_timer)
        elif self._state is State.RECEIVING:
            self._close_with(TOO_SLOW)
        else:
            self.transport.close()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_answering(self) -> bool:
        """Say whether a whole request waits for its response."""
        running = self._running
        if running is None:
            return False
        return bool(self.pipeline) or not (running.response_complete or running.more_body)

    def _close_with(self, final_response: FinalResponse) -> None:
        """Read no more; send *final_response* once the whole requests before are answered."""
        self._count(final_response)
        self._final_response = final_response.content
        self._enter(State.CLOSING)
        self._abort_request()
        if not self._is_answering():
            self._send_final_response()

    def _abort_request(self) -> None:
        """Abort the request that is not whole, if there is one."""

    def _send_final_response(self) -> None:
        self.connections.discard(self)
        if not self._final_response or self.transport.is_closing():
            self.transport.close()
            return
        self.transport.write(self._final_response)
        if self._listener.lingering >= MAX_LINGERING:
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._listener.lingering += 1
        self._enter(State.LINGERING)

    def _abort(self) -> None:
        """Cut off a client that does not read: no final response would reach it."""
        self._count(TOO_SLOW)
        self.connections.discard(self)
        self.transport.abort()

    def _count(self, final_response: FinalResponse) -> None:
        metrics.CONNECTIONS_REFUSED.labels(final_response.reason).inc()
        log.info("connection.refused", reason=final_response.reason)
