"""Hostile clients: slow bodies, tiny chunks, and forged requests whose responses are read slowly.

Each attacks one receiver again and again until it is canceled, and reports the status of every
response. Its bodies and headers contain a canary that no output may contain.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import orjson

from tests.support.harness import PREFIX, WEBHOOK

CANARY = "hostile0"
READ_BYTES = 65536
SILENCE_S, BYTE_PAUSE_S, LAZY_PAUSE_S = 2.0, 0.2, 0.1
TINY_CHUNKS, LAZY_REQUESTS = 20_000, 200
ENDED = (OSError, EOFError, TimeoutError)

OnStatus = Callable[[int], None]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def forged_event() -> bytes:
    """Return the body of an event that Stripe never sent."""
    session = {"id": f"vs_{CANARY}", "object": "identity.verification_session"}
    event = {"id": f"evt_{CANARY}", "object": "event", "type": PREFIX + "verified", "created": 1}
    return orjson.dumps(event | {"data": {"object": {**session, "status": "verified"}}})


async def slow_body(connection: Connection, on_status: OnStatus) -> None:
    """Send a body byte by byte, slowly."""
    reader, writer = connection
    writer.write(_head(b"Content-Length: 2000\r\n"))
    listening = asyncio.ensure_future(_statuses(reader, on_status))
    try:
        while not listening.done():
            writer.write(b"x")
            await asyncio.sleep(BYTE_PAUSE_S)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def tiny_chunks(connection: Connection, on_status: OnStatus) -> None:
    """Send a body in chunks of one byte."""
    reader, writer = connection
    writer.write(_head(b"Transfer-Encoding: chunked\r\n"))
    for _ in range(TINY_CHUNKS // 100):
        writer.write(b"1\r\nx\r\n" * 100)
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    await _statuses(reader, on_status)


async def lazy_reader(connection: Connection, on_status: OnStatus) -> None:
    """Pipeline many requests, and read the responses very slowly."""
    reader, writer = connection
    transport: socket.socket = writer.get_extra_info("socket")
    transport.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    body = forged_event()
    writer.write((_head(b"Content-Length: %d\r\n" % len(body)) + body) * LAZY_REQUESTS)
    found = b""
    while chunk := await reader.read(40):
        found += chunk
        await asyncio.sleep(LAZY_PAUSE_S)
    for status in _found(found):
        on_status(status)


KINDS: dict[str, tuple[int, Callable[[Connection, OnStatus], Awaitable[None]]]] = {
    "slow body": (48, slow_body),
    "tiny chunks": (2, tiny_chunks),
    "lazy reader": (12, lazy_reader),
}


@contextlib.asynccontextmanager
async def attacking(port: int, on_status: Callable[[str, int], None]) -> AsyncIterator[None]:
    """Run clients of every kind against *port* for the length of the block."""
    tasks = [
        asyncio.create_task(_again_and_again(port, send, partial(on_status, kind)))
        for kind, (count, send) in KINDS.items()
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _again_and_again(
    port: int, send: Callable[[Connection, OnStatus], Awaitable[None]], on_status: OnStatus
) -> None:
    while True:
        with contextlib.suppress(*ENDED):
            connection = await asyncio.open_connection("127.0.0.1", port)
            try:
                await send(connection, on_status)
            finally:
                connection[1].transport.abort()
        await asyncio.sleep(0.05)


async def _statuses(reader: asyncio.StreamReader, on_status: OnStatus) -> None:
    """Report the status of each response, until the connection is closed or silent."""
    found = b""
    with contextlib.suppress(*ENDED):
        # Not `wait_for`: in Python 3.11 it can swallow the request to end.
        while chunk := await _next(reader):
            found += chunk
    for status in _found(found):
        on_status(status)


async def _next(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(SILENCE_S):
        return await reader.read(READ_BYTES)


def _found(text: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", text)]


def _head(fields: bytes) -> bytes:
    start = f"POST {WEBHOOK} HTTP/1.1\r\nHost: tests\r\nX-{CANARY}: {CANARY}\r\n"
    return start.encode() + fields + b"\r\n"
