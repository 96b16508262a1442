"""A whole response is one write, and whatever is written is what uvicorn would write."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.server.one_write import OneWriteCycle

DATE = (b"date", b"Thu, 01 Jan 1970 00:00:00 GMT")
LENGTH = (b"content-length", b"2")


class RecordingTransport(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it."""
        self.written.append(bytes(data))

    def close(self) -> None:
        """Count it."""
        self.closed += 1

    def is_closing(self) -> bool:
        """Say whether it was closed."""
        return bool(self.closed)


class RunningRequest:
    """One request, of ours or uvicorn's, on a transport of its own."""

    def __init__(
        self,
        method: str = "POST",
        *,
        keep_alive: bool = True,
        cycle: type[RequestResponseCycle] = OneWriteCycle,
    ) -> None:
        self.transport = RecordingTransport()
        self.completed = 0
        self.cycle = cycle(
            scope={"type": "http", "method": method},  # type: ignore[typeddict-item]
            transport=self.transport,
            flow=FlowControl(self.transport),
            logger=logging.getLogger("uvicorn.error"),
            access_logger=logging.getLogger("uvicorn.access"),
            access_log=False,
            default_headers=[DATE],
            message_event=asyncio.Event(),
            expect_100_continue=True,
            keep_alive=keep_alive,
            on_response=self._complete,
        )
        self.cycle.more_body = False

    def _complete(self) -> None:
        self.completed += 1

    async def send(self, messages: Sequence[Any]) -> tuple[bytes, int, int, str]:
        """Send *messages*; return what was written, and the end."""
        error = ""
        try:
            for message in messages:
                await self.cycle.send(message)
        except RuntimeError as raised:
            error = str(raised)
        return b"".join(self.transport.written), self.transport.closed, self.completed, error


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """Return the start of a response."""
    return {"type": "http.response.start", "status": status, "headers": [*headers]}


def body(content: bytes = b"ok", *, more: bool = False) -> dict[str, Any]:
    """Return a part of its body."""
    return {"type": "http.response.body", "body": content, "more_body": more}


WHOLE = {
    "with its length": [start(200, LENGTH), body()],
    "with another header": [start(200, LENGTH, (b"x-name", b"a b")), body()],
    "empty": [start(404, (b"content-length", b"0")), body(b"")],
    "nothing but a type": [start(200, LENGTH), {"type": "http.response.body", "body": b"ok"}],
}
OTHER = {
    "of no length": [start(), body()],
    "in parts": [start(200, LENGTH), body(b"o", more=True), body(b"k")],
    "chunked": [start(200, (b"transfer-encoding", b"chunked")), body()],
    "the last": [start(200, LENGTH, (b"connection", b"close")), body()],
    "without a body": [start(204), body(b"")],
    "too long": [start(200, (b"content-length", b"1")), body()],
    "too short": [start(200, (b"content-length", b"3")), body()],
    "nothing begun": [body()],
    "body sent twice": [start(200, LENGTH), body(), body()],
}


@pytest.mark.parametrize("messages", (WHOLE | OTHER).values(), ids=WHOLE | OTHER)
@pytest.mark.parametrize("method", ["POST", "HEAD"])
@pytest.mark.parametrize("keep_alive", [True, False])
async def test_what_is_written_is_what_uvicorn_writes(
    messages: Sequence[Any], method: str, keep_alive: bool
) -> None:
    """The same bytes, the same end, the same error."""
    ours = RunningRequest(method, keep_alive=keep_alive)
    uvicorns = RunningRequest(method, keep_alive=keep_alive, cycle=RequestResponseCycle)
    assert await ours.send(messages) == await uvicorns.send(messages)


@pytest.mark.parametrize("messages", WHOLE.values(), ids=WHOLE)
async def test_a_whole_response_is_one_write(messages: Sequence[Any]) -> None:
    """A process that is killed has sent the whole response or nothing of it."""
    request = RunningRequest()
    await request.send(messages[:1])
    assert request.transport.written == []
    request = RunningRequest()
    await request.send(messages)
    [_] = request.transport.written
    assert request.completed == 1


async def test_a_body_that_may_come_or_not_ends_the_connection() -> None:
    """A client that waits for 100 Continue and is refused may send its body or not: close."""
    request = RunningRequest()
    request.cycle.more_body = True
    written, closed, completed, _ = await request.send(WHOLE["with its length"])
    assert b"\r\nconnection: close\r\n" in written
    assert (closed, completed) == (1, 1)


async def test_a_client_that_disconnected_is_sent_nothing() -> None:
    """Nothing is written to a connection that is gone."""
    request = RunningRequest()
    request.cycle.disconnected = True
    assert await request.send(WHOLE["with its length"]) == (b"", 0, 0, "")


async def test_an_application_that_fails_before_the_body_answers_500() -> None:
    """The start that was held back is dropped: the 500 is all that is written."""

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send(start(200, LENGTH))
        raise ZeroDivisionError

    request = RunningRequest()
    await request.cycle.run_asgi(fails)
    written = b"".join(request.transport.written)
    assert written.startswith(b"HTTP/1.1 500 ")
    assert written.count(b"HTTP/1.1") == 1
