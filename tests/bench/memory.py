"""Measures how much memory strangers can take: `python -m tests.bench.memory`. Asserts no size.

Each attack on a fresh receiver with its default limits: 1,000 connections do the same thing at the
same time, without any signing secret. Loopback only; needs 1 GiB and takes a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop

from service.config import Settings
from tests.support.processes import PROCESS_DEADLINE_S, Sandbox, open_sandbox
from tests.support.usage import memory_mib

CONNECTIONS = 1000
BODY = Settings.max_body_bytes
HEAD = b"POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\n"
FORGED = b"Stripe-Signature: t=1,v1=" + b"0" * 64 + b"\r\n"
CHUNKED = HEAD + FORGED + b"Transfer-Encoding: chunked\r\n\r\n"


class Attack(NamedTuple):
    """What each connection does.

    Attributes:
        name: What the table calls it.
        first: Sent and held, until every connection has.
        then: Sent by all at once.
    """

    name: str
    first: bytes
    then: bytes = b""


def chunk(body: bytes) -> bytes:
    """Return a chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(body), body)


ATTACKS = (
    Attack("nothing", b""),
    Attack(
        "a whole body but its last byte, then that",
        HEAD + FORGED + b"Content-Length: %d\r\n\r\n" % BODY + b"x" * (BODY - 1),
        b"x",
    ),
    Attack(
        "small chunks, then the last", CHUNKED + chunk(b"x" * 128) * (BODY // 128), b"0\r\n\r\n"
    ),
    Attack("a whole body, then far too much", CHUNKED + chunk(b"x" * BODY), chunk(b"x" * 4 * BODY)),
    Attack("half a head of the shortest headers", HEAD + b"ab:cd\r\n" * 4600),
    Attack("pipelined requests with many headers", (HEAD + b"ab:cd\r\n" * 120 + b"\r\n") * 200),
)


def main() -> None:
    """Measure each, and say it line by line."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(allowed, 4096), most))
    with tempfile.TemporaryDirectory(prefix="memory-") as made, open_sandbox(Path(made)) as opened:
        for number, attack in enumerate(ATTACKS):
            _measure(opened, number, attack)


def _measure(opened: Sandbox, number: int, attack: Attack) -> None:
    receiver = opened.start("serve", REDIS_PREFIX=f"m{number}", RECEIVE_TIMEOUT_S="120").ready()
    pid = receiver.popen.pid
    try:
        held = uvloop.run(_attack(receiver.port, pid, attack))
        print(  # noqa: T201 - what it is for
            f"{attack.name:42}  held {held:4.0f} MiB  at most {memory_mib(pid, 'VmHWM'):4.0f} MiB"
            f"  afterwards {memory_mib(pid):4.0f} MiB",
            flush=True,
        )
    finally:
        receiver.stop()


async def _attack(port: int, pid: int, attack: Attack) -> float:
    """Do it; return what memory was held between its two parts."""
    async with asyncio.timeout(PROCESS_DEADLINE_S):
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
        writers = [writer for _, writer in opened]
        await _send(writers, attack.first)
        await asyncio.sleep(1)
        held = memory_mib(pid)
        await _send(writers, attack.then)
        if attack.then:
            await asyncio.gather(*(_answered(reader) for reader, _ in opened))
        for writer in writers:
            writer.close()
    return held


async def _send(writers: Sequence[asyncio.StreamWriter], sent: bytes) -> None:
    async def one(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(sent), 65_536):
                writer.write(sent[start : start + 65_536])
                await asyncio.wait_for(writer.drain(), 5)

    await asyncio.gather(*map(one, writers), return_exceptions=True)


async def _answered(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.read(1)


if __name__ == "__main__":
    main()
