"""Signed events, and raw HTTP connections to send them over."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.applications import Starlette

from service.secret import Secret
from service.server.listener import Listener
from service.stripe.signatures import sign
from tests.support.waiting import DEADLINE_S

NOW = int(time.time())
PREFIX = "identity.verification_session."
WEBHOOK = "/webhooks/stripe"
SECRET = Secret(b"whsec_tests")


def event(
    word: str = "created",
    *,
    id: str = "evt_1",
    session: str = "vs_1",
    status: str = "requires_input",
    created: int | None = None,
    envelope: Mapping[str, Any] | None = None,
    **fields: Any,
) -> bytes:
    """Return the body of an event about a session, by default created at `NOW`."""
    return orjson.dumps(
        {
            "id": id,
            "object": "event",
            "type": word if "." in word else PREFIX + word,
            "created": NOW if created is None else created,
            "livemode": False,
            "data": {"object": {"id": session, "status": status, **fields}},
            **(envelope or {}),
        }
    )


def thin_event(
    word: str = "created",
    *,
    id: str = "evt_thin_1",
    session: str = "vs_1",
    created: int | None = None,
    **fields: Any,
) -> bytes:
    """Return the body of a thin event about a session, by default created at `NOW`."""
    at = datetime.fromtimestamp(NOW if created is None else created, UTC)
    return orjson.dumps(
        {
            "id": id,
            "object": "v2.core.event",
            "type": f"v1.{PREFIX}{word}",
            "created": f"{at:%Y-%m-%dT%H:%M:%S}.678Z",
            "livemode": False,
            "related_object": {
                "id": session,
                "type": "identity.verification_session",
                "url": f"/v1/identity/verification_sessions/{session}",
            },
            **fields,
        }
    )


def signed(body: bytes, secret: Secret[bytes] = SECRET, *, age_s: float = 0) -> dict[str, str]:
    """Return the headers that sign *body*."""
    return {"Stripe-Signature": sign(body, secret, int(time.time() - age_s))}


def request(
    body: bytes, headers: Mapping[str, str], *, path: str = WEBHOOK, close: bool = True
) -> bytes:
    """Return the bytes of a POST."""
    lines = {"Host": "tests", "Content-Length": str(len(body)), **headers}
    if close:
        lines["Connection"] = "close"
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


@asynccontextmanager
async def listening(app: Starlette, **changes: Any) -> AsyncIterator[Listener]:
    """Serve *app* on any free port."""
    defaults = {
        "max_connections": 1000,
        "receive_timeout_s": 10.0,
        "keep_alive_s": 60,
        "grace_s": 5.0,
    }
    listener = Listener(app, host="127.0.0.1", port=0, **{**defaults, **changes})
    serving = asyncio.create_task(listener.run())
    try:
        yield listener
    finally:
        listener.stop()
        await serving


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield a raw connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Read until the other side closes."""
    try:
        return await asyncio.wait_for(reader.read(), DEADLINE_S)
    except ConnectionError:
        return b""


async def talk(port: int, *pieces: bytes) -> bytes:
    """Send *pieces* and return the whole answer, until the connection is closed."""
    async with connected(port) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
        return await rest(reader)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read one response from a connection that stays open."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
    body = await reader.readexactly(int(fields[b"content-length"]))
    return int(head.split(b" ")[1]), body
