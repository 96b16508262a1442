"""An endpoint that keeps what is pushed to it, for tests of the stand-in itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class Received(NamedTuple):
    """One push.

    Attributes:
        path: The path that it was posted to.
        headers: Its headers, with names in lower case.
        body: Its body.
    """

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        """The event in its body."""
        event: dict[str, Any] = orjson.loads(self.body)
        return event


class Receiver:
    """Accepts pushes."""

    def __init__(self) -> None:
        self.received: list[Received] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keep a push and answer it."""
        request = Request(scope, receive)
        headers = dict(request.headers)
        self.received.append(Received(request.url.path, headers, await request.body()))
        await Response()(scope, receive, send)
