"""Laws of an answer: in one write where it can be, and always the bytes that uvicorn would send."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.server.cycle import Cycle

Headers = list[tuple[bytes, bytes]]
DATE = (b"date", b"Thu, 01 Jan 1970 00:00:00 GMT")
LENGTH = (b"content-length", b"2")


class Wire(asyncio.Transport):
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


class Answering:
    """A cycle of *kind* on a wire of its own."""

    def __init__(
        self, kind: type[RequestResponseCycle], method: str = "POST", *, keep_alive: bool = True
    ) -> None:
        self.wire = Wire()
        self.completed = 0
        self.cycle = kind(
            scope={"type": "http", "method": method},  # type: ignore[typeddict-item]
            transport=self.wire,
            flow=FlowControl(self.wire),
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

    async def say(self, messages: Sequence[Any]) -> tuple[bytes, int, int, str]:
        """Send *messages*; return what went out, and how it ended."""
        error = ""
        try:
            for message in messages:
                await self.cycle.send(message)
        except RuntimeError as raised:
            error = str(raised)
        return b"".join(self.wire.written), self.wire.closed, self.completed, error


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """Return the start of an answer."""
    return {"type": "http.response.start", "status": status, "headers": [*headers]}


def body(content: bytes = b"ok", *, more: bool = False) -> dict[str, Any]:
    """Return a part of its body."""
    return {"type": "http.response.body", "body": content, "more_body": more}


WHOLE = {
    "with its length": [start(200, LENGTH), body()],
    "named otherwise": [start(200, (b"Content-Length", b"2"), (b"X-Name", b"a b")), body()],
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
    "two lengths": [start(200, LENGTH, LENGTH), body()],
    "two lines in one": [start(200, LENGTH, (b"x", b"a\r\nb: c")), body()],
    "an odd name": [start(200, LENGTH, (b"x y", b"a")), body()],
    "nothing begun": [body()],
    "said twice": [start(200, LENGTH), body(), body()],
}


@pytest.mark.parametrize("messages", (WHOLE | OTHER).values(), ids=WHOLE | OTHER)
@pytest.mark.parametrize("method", ["POST", "HEAD"])
@pytest.mark.parametrize("keep_alive", [True, False])
async def test_what_goes_out_is_what_uvicorn_says(
    messages: Sequence[Any], method: str, keep_alive: bool
) -> None:
    """The same bytes, the same end, the same complaint."""
    if messages is WHOLE["with its length"] and method == "POST":
        assert b"content-length: 2\r\n" in (await Answering(Cycle).say(messages))[0]
    ours = await Answering(Cycle, method, keep_alive=keep_alive).say(messages)
    assert ours == await Answering(RequestResponseCycle, method, keep_alive=keep_alive).say(
        messages
    )


@pytest.mark.parametrize("messages", WHOLE.values(), ids=WHOLE)
async def test_a_whole_answer_is_one_write(messages: Sequence[Any]) -> None:
    """Who dies after it has answered wholly, who dies before it has not answered at all."""
    answering = Answering(Cycle)
    await answering.cycle.send(messages[0])
    assert answering.wire.written == []
    await answering.cycle.send(messages[1])
    [_] = answering.wire.written
    assert answering.completed == 1


async def test_a_body_that_may_come_or_not_ends_the_connection() -> None:
    """A client that waits for 100 Continue and is refused may send its body or not: both end."""
    answering = Answering(Cycle)
    answering.cycle.more_body = True
    written, closed, completed, _ = await answering.say(WHOLE["with its length"])
    assert b"\r\nconnection: close\r\n" in written
    assert (closed, completed) == (1, 1)


async def test_who_has_left_is_told_nothing() -> None:
    """To a client that has gone nothing is written."""
    answering = Answering(Cycle)
    answering.cycle.disconnected = True
    assert await answering.say(WHOLE["with its length"]) == (b"", 0, 0, "")


async def test_who_fails_before_the_body_has_said_nothing() -> None:
    """An application that raises between start and body answers 500, whole and nothing else."""

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send(start(200, LENGTH))
        raise ZeroDivisionError

    answering = Answering(Cycle)
    await answering.cycle.run_asgi(fails)
    written = b"".join(answering.wire.written)
    assert written.startswith(b"HTTP/1.1 500 ")
    assert written.count(b"HTTP/1.1") == 1


async def test_a_body_is_what_came() -> None:
    """However many pieces a body comes in, the application has all of them, in order."""
    cycle = Answering(Cycle).cycle
    assert isinstance(cycle, Cycle)
    cycle.waiting_for_100_continue = False
    cycle.take(b"ab")
    cycle.take(b"c")
    first = await cycle.receive()
    cycle.take(b"d")
    second = await cycle.receive()
    assert [message.get("body") for message in (first, second)] == [b"abc", b"d"]
