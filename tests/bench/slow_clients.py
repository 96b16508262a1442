"""Measures what strangers cost honest requests: `python -m tests.bench.slow_clients`.

Honest events at a steady rate, in turns alone and beside strangers of each kind, who open each
connection again as soon as it is closed. Loopback only; takes two minutes. Asserts no time.
"""
# ruff: noqa: T201 (the tests' own modules are found after the path is set; it says numbers)

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import httpx2
import uvloop

from tests.support.harness import event, signed
from tests.support.processes import open_sandbox

EVENTS_PER_S = 100
TURN_S = 12
HEAD = b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\n"
HALVES = (b"", HEAD + b"Content-Le", HEAD + b"Content-Length: 4096\r\n\r\n{")
TINY_CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 60_000 + b"0\r\n\r\n"
# Never more at once than may be pipelined: what counts is that the answers are not read.
UNREAD = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 8
ASK_EVERY_S = 0.02
SLOWLY_BYTES_PER_S = 470
FILLING_S = 8

Life = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


class Kind(NamedTuple):
    """Strangers who do the same thing.

    Attributes:
        name: What the table calls them.
        number: How many there are at a time.
        live: What each does with a connection, until it is closed.
        connections: How many connections the receiver allows.
    """

    name: str
    number: int
    live: Life
    connections: int = 1024


async def _half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, index: int) -> None:
    """Send a part, and wait to be cut off."""
    writer.write(HALVES[index % len(HALVES)])
    await reader.read()


async def _chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
    """Send bodies in chunks of a byte, as fast as they are taken."""
    while not reader.at_eof():
        writer.write(TINY_CHUNKS)
        await writer.drain()
        await reader.read(256)


async def _unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
    """Ask and ask, and read the answers slowly."""
    asking = asyncio.create_task(_ask(writer))
    try:
        while await reader.read(SLOWLY_BYTES_PER_S):  # noqa: ASYNC110 - that is what is slow
            await asyncio.sleep(1)
    finally:
        asking.cancel()


async def _ask(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(UNREAD)
            await writer.drain()
            await asyncio.sleep(ASK_EVERY_S)


KINDS = (
    Kind("halves of requests", 500, _half),
    Kind("one-byte chunks", 1, _chunks),
    Kind("one-byte chunks", 8, _chunks),
    Kind("slow readers", 120, _unread, connections=100),
)


def main() -> None:
    """Measure in turns, and say each, then the ratio."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with tempfile.TemporaryDirectory(prefix="slow-") as made, open_sandbox(Path(made)) as opened:
        for turn, kind in enumerate(KINDS):
            receiver = opened.start("serve", MAX_CONNECTIONS=str(kind.connections)).ready()
            uvloop.run(_measure(receiver.url, receiver.port, kind, turn))
            assert receiver.stop() == 0


async def _measure(url: str, port: int, kind: Kind, turn: int) -> None:
    alone, _ = await _honest(url, f"{turn}a", TURN_S / 3)
    lives: list[float] = []
    strangers = [
        asyncio.create_task(_stranger(port, index, kind, lives)) for index in range(kind.number)
    ]
    await asyncio.sleep(FILLING_S)
    beside, answers = await _honest(url, f"{turn}b", TURN_S)
    for stranger in strangers:
        stranger.cancel()
    await asyncio.gather(*strangers, return_exceptions=True)
    print(
        f"{kind.number:5} {kind.name:18}  p50 {_ms(beside, 50)} (alone {_ms(alone, 50)})"
        f"  p99 {_ms(beside, 99)} ({_ms(alone, 99)})  {answers}  {len(lives)} cut off"
        f"{f' after {max(lives):.1f} s at most' if lives else ''}",
        flush=True,
    )


async def _stranger(port: int, index: int, kind: Kind, lives: list[float]) -> None:
    """Open a connection, live on it, and again."""
    await asyncio.sleep(index / kind.number)
    while True:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            # As little as possible is read before it is asked for.
            connected = socket.socket()
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connected.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connected, ("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=connected, limit=256)
            try:
                await kind.live(reader, writer, index)
            finally:
                writer.close()
        lives.append(time.monotonic() - began)
        await asyncio.sleep(0)


async def _honest(url: str, turn: str, seconds: float) -> tuple[list[float], dict[str, int]]:
    """Post events at their rate; return how long each answer took, and what there was."""
    answers: Counter[str] = Counter()
    took: list[float] = []

    async def post(number: int) -> None:
        body = event(id=f"evt_{turn}_{number}", session=f"vs_{turn}_{number}")
        began = time.perf_counter()
        try:
            answer = await client.post(url, content=body, headers=signed(body))
            answers[str(answer.status_code)] += 1
        except httpx2.TransportError as error:
            answers[type(error).__name__] += 1
        took.append(time.perf_counter() - began)

    async with httpx2.AsyncClient(timeout=15) as client, asyncio.TaskGroup() as group:
        for number in range(int(seconds * EVENTS_PER_S)):
            group.create_task(post(number))
            await asyncio.sleep(1 / EVENTS_PER_S)
    return took, dict(answers)


def _ms(took: list[float], percent: int) -> str:
    return f"{statistics.quantiles(took, n=100)[percent - 1] * 1000:.1f} ms"


if __name__ == "__main__":
    main()
