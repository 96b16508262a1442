"""Faults of Stripe's API that a test asks for, as ASGI middleware.

`cut`, `hang` and `slow` need a server; without one a cut answer is an error of the client's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any, Final, Literal

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, rate_limited, server_error

Kind = Literal["answer", "cut", "hang", "slow"]

SLOW_PIECES: Final = 10


@dataclass(kw_only=True)
class Fault:
    """What happens to requests, instead of the answer or with it.

    Attributes:
        kind: `answer` something else, `cut` the connection in the middle of the right answer's
            body, `hang` without any answer, or send the right answer `slow`ly.
        path: A regular expression that the whole path matches.
        query: A regular expression that the whole query matches, as it was sent.
        account: The account in the header; None for requests of any.
        times: How many requests; None for all from now on.
        share: The share of requests.
        seconds: How long a slow body takes.
        status: The status of another answer.
        headers: Its headers.
        body: Its body.
    """

    kind: Kind
    path: str = ".*"
    query: str = ".*"
    account: str | None = None
    times: int | None = None
    share: float = 1.0
    seconds: float = 1.0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def answer(body: bytes, **rule: Any) -> Fault:
    """Return a fault that answers 200 with these bytes as JSON; *rule* as in `Fault`."""
    given = {"status": 200, "headers": {"Content-Type": "application/json"}, **rule}
    return Fault(kind="answer", body=body, **given)


def fail(error: ApiError, **rule: Any) -> Fault:
    """Return a fault that answers with one of Stripe's errors; *rule* as in `Fault`."""
    headers = {"Content-Type": "application/json", **error.headers}
    body = orjson.dumps(error.body("req_fault"))
    return answer(body, status=error.status, headers=headers, **rule)


def too_many_requests(retry_after_s: int | None = None, **rule: Any) -> Fault:
    """Return a fault that answers 429, with `Retry-After` or without."""
    return fail(rate_limited(retry_after_s), **rule)


def broken(status: int = 500, **rule: Any) -> Fault:
    """Return a fault that answers 5xx."""
    return fail(server_error(status), **rule)


class Faults:
    """The faults that hold now; the first that fits a request is applied."""

    def __init__(self) -> None:
        self._random = Random(0)
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Add a fault."""
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """End all faults."""
        self._faults.clear()

    def draw(self, path: str, query: str, account: str | None) -> Fault | None:
        """Return the fault of a request, if any, and count it."""
        for fault in self._faults:
            fits = (
                re.fullmatch(fault.path, path)
                and re.fullmatch(fault.query, query)
                and fault.account in {None, account}
            )
            if fits and fault.times != 0 and self._random.random() < fault.share:
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


class FaultMiddleware:
    """Applies the faults to requests."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self._app = app
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as its fault says; without one, let the application answer."""
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        account = headers.get("stripe-account") or headers.get("stripe-context")
        fault = self._faults.draw(scope["path"], scope["query_string"].decode(), account)
        if fault is None:
            await self._app(scope, receive, send)
        elif fault.kind == "answer":
            await _answer(fault, send)
        elif fault.kind == "hang":
            await _wait_for_disconnect(receive)
        else:
            start, body = await self._right_answer(scope, receive)
            await send(start)
            if fault.kind == "slow":
                await _send_slowly(body, fault.seconds, send)
            else:
                # An answer that ends before its announced length makes the server cut.
                await send(_piece(body[: len(body) // 2], is_last=False))

    async def _right_answer(self, scope: Scope, receive: Receive) -> tuple[Message, bytes]:
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            sent.append(message)

        await self._app(scope, receive, keep)
        return sent[0], b"".join(message.get("body", b"") for message in sent[1:])


async def _answer(fault: Fault, send: Send) -> None:
    headers = {**fault.headers, "Content-Length": str(len(fault.body))}
    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": lines})
    await send(_piece(fault.body, is_last=True))


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_slowly(body: bytes, seconds: float, send: Send) -> None:
    ends = [len(body) * number // SLOW_PIECES for number in range(SLOW_PIECES + 1)]
    for begin, end in pairwise(ends):
        await asyncio.sleep(seconds / SLOW_PIECES)
        await send(_piece(body[begin:end], is_last=end == len(body)))


def _piece(body: bytes, *, is_last: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": not is_last}
