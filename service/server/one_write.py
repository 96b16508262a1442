"""A whole response leaves in one write, head and body together.

uvicorn writes them one after the other. A process that is killed in between leaves half a
response, which a load balancer cannot retry on another receiver: the client has seen the head.

It does not know what is answered (`web`), nor when a connection ends (`closing`).
"""

from __future__ import annotations

from functools import lru_cache

from uvicorn._types import ASGISendEvent, HTTPResponseStartEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

# With one of these a response says itself where it ends, or that its connection does.
_FRAMING = frozenset({b"connection", b"transfer-encoding"})


class OneWriteCycle(RequestResponseCycle):
    """uvicorn's request and response, but that a whole response is one write."""

    _start: HTTPResponseStartEvent | None = None

    async def send(self, message: ASGISendEvent) -> None:
        """Hold the start of a response back until its body is here."""
        if self.waiting_for_100_continue and self.more_body:
            # Without 100 Continue the client may send its body or not. Where the next request
            # would begin is unknown, so there must be none.
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

    def _complete(self, response: bytes) -> None:
        """Do what uvicorn does for both messages, with one write."""
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(response)
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
    """Return a response's head; None if uvicorn has to write it, since its length is not plain.

    There are few heads, and they change once a second, with the date: made anew for each response
    they cost 1.7 % of the CPU of an event.
    """
    if (b"content-length", b"%d" % body_bytes) not in headers:
        return None
    lines = [STATUS_LINE[status]]
    for name, value in headers:
        if name in _FRAMING:
            return None
        lines.append(b"%b: %b\r\n" % (name, value))
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    return b"".join([*lines, b"\r\n"])
