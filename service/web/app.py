"""HTTP: the routes, and one request from its headers to its response.

It does not know how a request is verified and admitted (`inbox`), which status code an outcome is
(`responses`), or how connections are served (`server`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..config import WEBHOOK_PATH, Settings
from ..errors import Rejected, RejectionReason, Unavailable, UnavailableReason
from ..inbox.receiver import Receipt, Receiver
from ..inbox.request_log import AnsweredRequest, RequestLog
from ..secret import Secret
from ..telemetry import metrics
from .allow_list import AllowList
from .headers import Headers
from .responses import respond


class Readiness(Protocol):
    """Whether this process is fit for traffic."""

    @property
    def reason(self) -> str | None:
        """Why a load balancer should send no traffic here, in one word; None when it should."""


class _ClientDisconnected(Exception):
    """The client closed the connection before its body was complete."""


def create_app(
    receiver: Receiver,
    readiness: Readiness,
    settings: Settings,
    allow_list: AllowList | None = None,
) -> WebhookApp:
    """Return the application that faces the load balancer: the webhook path and the probes."""
    request_log = RequestLog()
    webhook = _Webhook(receiver, settings, request_log)
    if allow_list is None:
        return WebhookApp(webhook, webhook, readiness)
    return WebhookApp(webhook, _AllowListMiddleware(webhook, allow_list, request_log), readiness)


class QuietApplication(Starlette):
    """Starlette, but for two defaults: error responses have no body, and slashes no redirect."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        super().__init__(routes=routes, exception_handlers={HTTPException: _empty_response})
        # Stripe takes a redirect for a failed delivery, and its URL would repeat the Host header.
        self.router.redirect_slashes = False


class WebhookApp(QuietApplication):
    """The webhook path and the probes.

    A POST to the default endpoint, which is nearly every request, skips routing and middleware:
    they take 11 % of the CPU of an event.

    Attributes:
        available_slots: Returns how many more requests may be in flight.
    """

    def __init__(self, webhook: _Webhook, endpoint: ASGIApp, readiness: Readiness) -> None:
        self.available_slots = webhook.available_slots
        self._endpoint = endpoint
        super().__init__(
            [
                Route(WEBHOOK_PATH, endpoint, methods=["POST"]),
                Route(WEBHOOK_PATH + "/{endpoint:path}", endpoint, methods=["POST"]),
                *probes(readiness),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the endpoint: directly where the route is plain, else by way of Starlette."""
        if scope["type"] == "http" and scope["path"] == WEBHOOK_PATH and scope["method"] == "POST":
            scope["path_params"] = {}
            await self._endpoint(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def probes(readiness: Readiness) -> list[Route]:
    """Return the routes of the probes."""

    async def livez(request: Request) -> Response:
        return Response(status_code=200)

    async def readyz(request: Request) -> Response:
        if (reason := readiness.reason) is None:
            return Response(status_code=200)
        content = orjson.dumps({"ready": False, "reason": reason})
        return Response(content, 503, media_type="application/json")

    return [Route("/livez", livez), Route("/readyz", readyz)]


async def _empty_response(request: Request, error: Any) -> Response:
    """Answer an unknown path or method without repeating anything of the request."""
    return Response(status_code=error.status_code, headers=error.headers)


class _AllowListMiddleware:
    """Refuses requests from other networks before it reads a byte of the body."""

    def __init__(self, endpoint: ASGIApp, allow_list: AllowList, request_log: RequestLog) -> None:
        self._endpoint = endpoint
        self._allow_list = allow_list
        self._request_log = request_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer, _ = scope["client"] or ("", 0)
        forwarded_for = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        if self._allow_list.admits(peer, forwarded_for):
            await self._endpoint(scope, receive, send)
            return
        rejected = Rejected(RejectionReason.SOURCE_NOT_ALLOWED)
        await respond(send, rejected)
        self._request_log.add(
            AnsweredRequest(rejected, Headers(scope["headers"]).request_id, 0, 0.0)
        )


class _Webhook:
    """The endpoint Stripe posts to, as a bare ASGI application inside its route."""

    def __init__(self, receiver: Receiver, settings: Settings, request_log: RequestLog) -> None:
        self._receiver = receiver
        self._request_log = request_log
        self._secrets: Mapping[str, Sequence[Secret[bytes]]] = settings.secrets
        self._max_body_bytes = settings.max_body_bytes
        self._max_in_flight = settings.max_in_flight
        self._in_flight = 0
        metrics.IN_FLIGHT.set_function(lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = Headers(scope["headers"])
        path = scope["path_params"].get("endpoint")
        try:
            result = await self._result(path, headers, receive)
        except _ClientDisconnected:
            metrics.EVENTS.labels("client_left", metrics.OTHER_TYPE).inc()
            return
        await respond(send, result)
        duration_s = time.perf_counter() - started
        # A name that is not ours is a stranger's text.
        endpoint = path.lower() if path and path.lower() in self._secrets else None
        self._request_log.add(
            AnsweredRequest(result, headers.request_id, headers.body_bytes, duration_s, endpoint)
        )

    def available_slots(self) -> int:
        """Return how many more requests may be in flight."""
        return self._max_in_flight - self._in_flight

    async def _result(
        self, path: str | None, headers: Headers, receive: Receive
    ) -> Receipt | Rejected | Unavailable:
        try:
            endpoint = self._endpoint_name(path)
            body = await self._body(headers, receive)
            if self.available_slots() <= 0:
                return Unavailable(UnavailableReason.BUSY)
            # Only complete requests are in flight: a client that is still sending takes no slot.
            self._in_flight += 1
            try:
                return await self._receiver.receive(
                    body,
                    headers.signature,
                    self._secrets.get(endpoint, ()),
                    now=time.time(),
                    endpoint=endpoint,
                    other_secrets=self._secrets_of_others(endpoint),
                    traceparent=headers.traceparent,
                )
            finally:
                self._in_flight -= 1
        except (Rejected, Unavailable) as error:
            # The error is kept until its line is logged; the frames would keep the body as long.
            return error.with_traceback(None)
        except asyncio.CancelledError:
            # The grace time of a shutdown is over. Raised further, this would become a 500.
            return Unavailable(UnavailableReason.BUSY)

    def _endpoint_name(self, path: str | None) -> str:
        """Return the name of the endpoint at *path* below the webhook path; None is the default.

        Raises:
            Rejected: With `trailing_slash` or `endpoint_unknown`: the likeliest mistakes in the URL
                that was configured at Stripe.
        """
        if path is not None and (not path or path.endswith("/")):
            raise Rejected(RejectionReason.TRAILING_SLASH)
        endpoint = (path or "").lower()
        if not self._secrets.get(endpoint):
            raise Rejected(RejectionReason.ENDPOINT_UNKNOWN)
        return endpoint

    def _secrets_of_others(self, endpoint: str) -> Iterator[Secret[bytes]]:
        """Yield the secrets of every other endpoint."""
        for name, secrets in self._secrets.items():
            if name != endpoint:
                yield from secrets

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Read the whole body, or no more of it than is allowed."""
        if headers.content_length > self._max_body_bytes:
            raise Rejected(RejectionReason.BODY_TOO_LARGE)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _ClientDisconnected
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_body_bytes:
                raise Rejected(RejectionReason.BODY_TOO_LARGE)
            parts.append(part)
            if not message.get("more_body", False):
                headers.body_bytes = size
                return parts[0] if len(parts) == 1 else b"".join(parts)
