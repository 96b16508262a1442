"""HTTP: routes, bodies, and which error is which answer. The only module that knows a status code.

The few answers that are given where there is no request to route are `framing`'s. What
becomes of a request is `receiver`'s business; listening and stopping are `server`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import WEBHOOK_PATH, Settings
from ..errors import RETRY_AFTER_S, Rejected, RejectionReason, Unavailable, UnavailableReason
from ..inbox.receiver import Receipt, Receiver
from ..inbox.request_log import Entry, Journal
from ..secret import Secret
from ..telemetry import metrics
from .allow_list import AllowList
from .headers import Headers

_STATUSES = {
    RejectionReason.BODY_TOO_LARGE: 413,
    RejectionReason.SOURCE_NOT_ALLOWED: 403,
    RejectionReason.ENDPOINT_UNKNOWN: 404,
    RejectionReason.TRAILING_SLASH: 404,
}


class Readiness(Protocol):
    """Whether this process is fit for traffic."""

    @property
    def reason(self) -> str | None:
        """Why a load balancer should send no traffic here, in one word; None when it should."""


class _ClientLeft(Exception):
    """The client went away before its body was whole."""


class _Answer(NamedTuple):
    """An answer, ready to be sent."""

    status: int
    start: Message
    body: Message


def create_app(
    receiver: Receiver,
    readiness: Readiness,
    settings: Settings,
    allow_list: AllowList | None = None,
) -> FastPath:
    """Return the application that faces the load balancer: the webhook path and the probes."""
    journal = Journal()
    webhook = _Webhook(receiver, settings, journal)
    inside = webhook if allow_list is None else _AllowListDoor(webhook, allow_list, journal)
    app = _app(
        [
            Route(WEBHOOK_PATH, inside, methods=["POST"]),
            Route(WEBHOOK_PATH + "/{endpoint:path}", inside, methods=["POST"]),
            *_probes(readiness),
        ]
    )
    return FastPath(inside, app, room=webhook.room)


def create_admin_app(readiness: Readiness) -> Starlette:
    """Return the application of the admin port: metrics and the probes."""
    return _app([Route("/metrics", _metrics), *_probes(readiness)])


def _app(routes: Sequence[BaseRoute]) -> Starlette:
    app = Starlette(routes=routes, exception_handlers={HTTPException: _without_body})
    # To Stripe a redirect is a failed delivery, and it would be built from the Host header.
    app.router.redirect_slashes = False
    return app


def _probes(readiness: Readiness) -> list[Route]:
    async def livez(request: Request) -> Response:
        return Response(status_code=200)

    async def readyz(request: Request) -> Response:
        if (reason := readiness.reason) is None:
            return Response(status_code=200)
        said = orjson.dumps({"ready": False, "reason": reason})
        return Response(said, 503, media_type="application/json")

    return [Route("/livez", livez), Route("/readyz", readyz)]


async def _metrics(request: Request) -> Response:
    return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)


async def _without_body(request: Request, error: Any) -> Response:
    """Answer an unknown path or another method with nothing that came from the request."""
    return Response(status_code=error.status_code, headers=error.headers)


class FastPath:
    """Lets what Stripe sends, nearly every request there is, past routing and middleware.

    Attributes:
        room: Says how many more requests can be taken in hand.
    """

    def __init__(self, webhook: ASGIApp, app: ASGIApp, *, room: Callable[[], int]) -> None:
        self._webhook = webhook
        self._app = app
        self.room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request to where it belongs."""
        if scope["type"] == "http" and scope["path"] == WEBHOOK_PATH and scope["method"] == "POST":
            scope["path_params"] = {}
            await self._webhook(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _AllowListDoor:
    """Lets in who comes from an allowed network, before a byte of the body is read."""

    def __init__(self, inside: ASGIApp, allow_list: AllowList, journal: Journal) -> None:
        self._inside = inside
        self._allow_list = allow_list
        self._journal = journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer, _ = scope["client"] or ("", 0)
        forwarded_for = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        if self._allow_list.admits(peer, forwarded_for):
            await self._inside(scope, receive, send)
            return
        refused = Rejected(RejectionReason.SOURCE_NOT_ALLOWED)
        answer = _answer_to(refused)
        await send(answer.start)
        await send(answer.body)
        self._journal.note(Entry(refused, Headers(scope["headers"]).request_id, 0, 0.0))


class _Webhook:
    """The endpoint Stripe posts to, as a bare ASGI application inside its route."""

    def __init__(self, receiver: Receiver, settings: Settings, journal: Journal) -> None:
        self._receiver = receiver
        self._journal = journal
        self._secrets: Mapping[str, Sequence[Secret[bytes]]] = settings.secrets
        self._most_bytes = settings.max_body_bytes
        self._most_in_flight = settings.max_in_flight
        self._in_flight = 0
        metrics.IN_FLIGHT.set_function(lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = Headers(scope["headers"])
        try:
            outcome = await self._outcome(scope["path_params"].get("endpoint"), headers, receive)
        except _ClientLeft:
            metrics.events("client_left", metrics.OTHER_TYPE).inc()
            return
        answer = _answer_to(outcome)
        await send(answer.start)
        await send(answer.body)
        duration_s = time.perf_counter() - started
        self._journal.note(Entry(outcome, headers.request_id, headers.body_bytes, duration_s))

    def room(self) -> int:
        """Return how many more requests may be in hand."""
        return self._most_in_flight - self._in_flight

    async def _outcome(
        self, path: str | None, headers: Headers, receive: Receive
    ) -> Receipt | Rejected | Unavailable:
        try:
            endpoint = self._endpoint(path)
            body = await self._body(headers, receive)
            if self.room() <= 0:
                return Unavailable(UnavailableReason.BUSY)
            # In hand is a whole request only: who is still sending takes nobody's place.
            self._in_flight += 1
            try:
                return await self._receiver.receive(
                    body,
                    headers.signature,
                    self._secrets.get(endpoint, ()),
                    now=time.time(),
                    endpoint=endpoint,
                    other_secrets=self._secrets_beside(endpoint),
                    traceparent=headers.traceparent,
                )
            finally:
                self._in_flight -= 1
        except (Rejected, Unavailable) as error:
            # Frames hold the body and copies of it, and an outcome lives until its line is written.
            return error.with_traceback(None)
        except asyncio.CancelledError:
            # The grace time of a stop is over; left alone this would become a 500.
            return Unavailable(UnavailableReason.BUSY)

    def _endpoint(self, path: str | None) -> str:
        """Return the name of the endpoint at *path* below the webhook path; None is at none.

        Raises:
            Rejected: With `trailing_slash` or `endpoint_unknown`: the likeliest mistakes in the URL
                that Stripe was given.
        """
        if path is not None and (not path or path.endswith("/")):
            raise Rejected(RejectionReason.TRAILING_SLASH)
        endpoint = (path or "").lower()
        if not self._secrets.get(endpoint):
            raise Rejected(RejectionReason.ENDPOINT_UNKNOWN)
        return endpoint

    def _secrets_beside(self, endpoint: str) -> Iterator[Secret[bytes]]:
        """Yield the secrets of every other endpoint."""
        for name, secrets in self._secrets.items():
            if name != endpoint:
                yield from secrets

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Read the whole body, or no more than is allowed of it."""
        if headers.declared_bytes > self._most_bytes:
            raise Rejected(RejectionReason.BODY_TOO_LARGE)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _ClientLeft
            part = message.get("body", b"")
            size += len(part)
            if size > self._most_bytes:
                raise Rejected(RejectionReason.BODY_TOO_LARGE)
            parts.append(part)
            if not message.get("more_body", False):
                headers.body_bytes = size
                return parts[0] if len(parts) == 1 else b"".join(parts)


@lru_cache(maxsize=1024)
def _answer(status: int, word: str, value: str, field: str | None = None) -> _Answer:
    body = orjson.dumps({word: value} if field is None else {word: value, "field": field})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if status == 503:  # noqa: PLR2004 - HTTP's own number
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    start = {"type": "http.response.start", "status": status, "headers": headers}
    return _Answer(status, start, {"type": "http.response.body", "body": body})


def _answer_to(outcome: Receipt | Rejected | Unavailable) -> _Answer:
    """Map what became of a request to its answer."""
    if isinstance(outcome, Receipt):
        return _answer(200, "outcome", outcome.outcome)
    if isinstance(outcome, Unavailable):
        return _answer(503, "error", "unavailable")
    status = _STATUSES.get(outcome.reason, 400)
    return _answer(status, "error", outcome.reason, outcome.field)
