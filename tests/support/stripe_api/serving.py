"""Serves a stand-in on a loopback port, and pushes its events meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import httpx2
import uvicorn
from starlette.types import ASGIApp

from .app import create_app
from .stand_in import StripeStandIn

# Requests that hang on purpose end with the server.
GRACE_S: Final = 1


class _Server(uvicorn.Server):
    """Sets `ready` once it accepts connections."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        await super().startup(sockets)
        self.ready.set()


@asynccontextmanager
async def running(app: ASGIApp, *, port: int = 0) -> AsyncIterator[str]:
    """Serve an application in this event loop; yield its address, `http://127.0.0.1:…`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config)
    with socket.create_server(("127.0.0.1", port)) as listener:
        # asyncio sets it only where the protocol is named; without it an answer takes 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            await server.ready.wait()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def served(stand_in: StripeStandIn, *, port: int = 0) -> AsyncIterator[str]:
    """Yield the address of the API and push events, until it is left.

    The stand-in may be used in the same event loop meanwhile.
    """
    async with running(create_app(stand_in), port=port) as address:
        pushing = asyncio.create_task(stand_in.pushes.run())
        try:
            yield address
        finally:
            pushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pushing


@asynccontextmanager
async def client_of(stand_in: StripeStandIn, secret: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client that calls the application without a socket, with a key."""
    transport = httpx2.ASGITransport(create_app(stand_in))
    headers = {"Authorization": f"Bearer {secret}"}
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://stripe.test", headers=headers
    ) as client:
        yield client
