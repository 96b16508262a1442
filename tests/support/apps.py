"""Applications that tests put behind a listener: the real one, and one that echoes. No tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from service.config import Settings
from service.inbox.admission import Inbox
from service.inbox.receiver import Receiver
from service.runtime.traced import TracedReceiver
from service.server.listener import Listener
from service.storage.connections import Connections
from service.storage.health import Health
from service.storage.keys import Keys
from service.stripe_api.keys import ApiKeys
from service.telemetry.tracing import Tracing
from service.web.allow_list import AllowList
from service.web.app import WebhookApp, create_app
from tests.support.harness import listening, request


def webhook_app(
    connections: Connections,
    settings: Settings,
    allow_list: AllowList | None = None,
    *,
    traced: Tracing | None = None,
) -> tuple[WebhookApp, Health]:
    """Return the real application, and the health behind its probes."""
    inbox = Inbox(connections, Keys(settings.redis_prefix, settings.partitions), settings)
    make = Receiver if traced is None else partial(TracedReceiver, traced)
    receiver = make(
        inbox,
        tolerance_s=settings.signature_tolerance_s,
        livemode=settings.livemode,
        has_api_key=ApiKeys(settings.stripe_api_key).holds,
    )
    health = Health(connections, settings)
    return create_app(receiver, health, settings, allow_list), health


@asynccontextmanager
async def serving(
    connections: Connections, settings: Settings, state: str, *, receive_timeout_s: float = 1
) -> AsyncIterator[Listener]:
    """Serve the real application in one state of its process: idle, overloaded or draining."""
    if state == "overloaded":
        settings = replace(settings, max_in_flight=0)
    app, _ = webhook_app(connections, settings)
    async with listening(
        app,
        receive_timeout_s=receive_timeout_s,
        keep_alive_s=1,
        available_slots=app.available_slots,
    ) as listener:
        if state == "draining":
            listener.drain()
        yield listener


class Gate:
    """An endpoint that reads its request, and responds once the gate is opened."""

    def __init__(self) -> None:
        self.entered = 0
        self.opened = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond with what was posted."""
        body = await Request(scope, receive).body()
        self.entered += 1
        await self.opened.wait()
        await Response(body)(scope, receive, send)


async def _echo(read: Request) -> Response:
    return Response(await read.body())


async def _unread(read: Request) -> Response:
    return Response(b"unread")


def echo_app(gate: Gate | None = None) -> Starlette:
    """Return an application with three endpoints: `/echo`, `/unread` and `/gate`."""
    return Starlette(
        routes=[
            Route("/echo", _echo, methods=["POST"]),
            Route("/unread", _unread, methods=["POST"]),
            Route("/gate", gate or Gate(), methods=["POST"]),
        ]
    )


def post(body: bytes = b"x", *, path: str = "/echo", close: bool = False) -> bytes:
    """Return a whole request to the echoing application."""
    return request(body, {}, path=path, close=close)


# Requests to the echoing application that are not complete.
INCOMPLETE = {
    "no byte": b"",
    "half a request line": b"POST /ec",
    "half a header": b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Le",
    "no body": b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
    "half a body": b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab",
    "half a large body": b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\nab",
    "half a chunk": b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    "empty lines": b"\r\n\r\n",
}
