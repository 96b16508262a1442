"""One request and its answer, as uvicorn runs them: an answer leaves in one write.

In two, a receiver killed between them would leave half an answer, which no balancer can ask
anybody else for. Receiving requests is `protocol`'s business; what is answered, `web`'s.
"""

from __future__ import annotations

from functools import lru_cache

from uvicorn._types import ASGISendEvent, HTTPResponseStartEvent
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    RequestResponseCycle,
)

# These say where an answer ends, or whether its connection does.
_FRAMING = frozenset({b"connection", b"transfer-encoding"})


class Cycle(RequestResponseCycle):
    """uvicorn's cycle, which writes an answer whose whole body is known at once, head and all."""

    _start: HTTPResponseStartEvent | None = None

    def take(self, piece: bytes) -> None:
        """Keep a piece of the body; most bodies come in one, which is not copied."""
        if not self.body:
            self.body = piece  # type: ignore[assignment]
        else:
            if isinstance(self.body, bytes):
                self.body = bytearray(self.body)
            self.body += piece
        if len(self.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.message_event.set()

    async def send(self, message: ASGISendEvent) -> None:
        """Hold the start of an answer back until there is a body to send it with.

        A client that has not been told to send its body, and is answered, may send it or not:
        what comes next cannot be read in one way, so that answer is the connection's last.
        """
        if self.waiting_for_100_continue and self.more_body:
            self.keep_alive = False
        if message["type"] == "http.response.start" and not self.response_started:
            self._start = message
            return
        start, self._start = self._start, None
        if start is None or message["type"] != "http.response.body":
            await super().send(message)
            return
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        body = message.get("body", b"")
        head = None
        if not message.get("more_body", False) and self.scope["method"] != "HEAD":
            headers = (*self.default_headers, *start.get("headers", ()))
            head = _head(start["status"], headers, len(body), self.keep_alive)
        if head is None:
            await super().send(start)
            await super().send(message)
        elif not self.disconnected:
            self._complete(head + body)

    def _complete(self, answer: bytes) -> None:
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(answer)
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


@lru_cache(maxsize=256)
def _head(
    status: int,
    headers: tuple[tuple[bytes, bytes], ...],
    body_bytes: int,
    keep_alive: bool,  # noqa: FBT001 - part of the key
) -> bytes | None:
    """Return an answer's head; None when it says more of its framing than its body's size.

    What the headers are does not change, but for the date, once a second.
    """
    lines = [STATUS_LINE[status]]
    lengths = []
    for name, value in ((name.lower(), value) for name, value in headers):
        if name in _FRAMING or HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
            return None
        if name == b"content-length":
            lengths.append(value)
        lines.append(b"%b: %b\r\n" % (name, value))
    if lengths != [b"%d" % body_bytes]:
        return None
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    return b"".join([*lines, b"\r\n"])
