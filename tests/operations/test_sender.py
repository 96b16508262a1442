"""The sender: what it signs, in which order it sends, and how it counts."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import ConfigError
from service.operations import sender
from service.operations.sender import Answer, WebhookRequest, plan, send
from service.operations.synthetic_events import SyntheticEvent, lifecycle_events
from service.secret import Secret
from tests.support.stripe_api import running
from tests.support.virtual_time import in_virtual_time
from tests.support.waiting import PATIENCE_S

SECRET = Secret(b"whsec_of_the_tests")
NOW = 1_785_931_200


@dataclass
class Endpoint:
    """A small real receiver: records requests, awaits `hold`, answers `reply`."""

    url: str = ""
    status: int = 200
    reply: bytes = b'{"outcome":"admitted"}'
    hold: Callable[[], Awaitable[Any]] = lambda: asyncio.sleep(0)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    steps: list[tuple[str, str]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        body = await request.body()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.steps.append(("begun", body.decode()))
        await self.hold()
        self.steps.append(("ended", body.decode()))
        answer = Response(self.reply, self.status, {"location": "/elsewhere"})
        await answer(scope, receive, send)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    """Serve an `Endpoint` on loopback."""
    app = Endpoint()
    async with running(app) as address:
        app.url = f"{address}/webhooks/stripe"
        yield app


@contextmanager
def closed_port() -> Iterator[str]:
    """Yield an address on which no process listens, or can listen meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"


def raw(*bodies: str, ordering_key: str | None = None) -> list[WebhookRequest]:
    """Return requests of these very bodies."""
    return [WebhookRequest(body=body.encode(), ordering_key=ordering_key) for body in bodies]


def events_of(count: int, seed: int = 0) -> list[SyntheticEvent]:
    """Return the events of *count* sessions."""
    random = Random(seed)
    return [
        event
        for _ in range(count)
        for event in lifecycle_events("retry-then-verified", random=random, started_at=NOW)
    ]


# The plan


@given(
    count=st.integers(0, 6),
    duplicates=st.floats(0, 1),
    shuffle=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_share_of_duplicates(count: int, duplicates: float, shuffle: bool, seed: int) -> None:
    """Every event is sent once, and the requested share of them twice."""
    events = events_of(count)
    planned = plan(events, duplicates=duplicates, shuffle=shuffle, random=Random(seed))
    times = Counter(request.body for request in planned)
    assert set(times) == {event.body for event in events}
    assert sum(times.values()) == len(events) + round(duplicates * len(events))
    assert set(times.values()) <= {1, 2}


@given(count=st.integers(1, 6), duplicates=st.floats(0, 1), seed=st.integers(0, 1000))
def test_unshuffled(count: int, duplicates: float, seed: int) -> None:
    """Unshuffled, events keep their order, and a copy comes after its original only."""
    events = events_of(count)
    planned = plan(events, duplicates=duplicates, shuffle=False, random=Random(seed))
    firsts = dict.fromkeys(request.body for request in planned)
    assert list(firsts) == [event.body for event in events]
    sessions = {event.body: event.session_id for event in events}
    assert all(request.ordering_key == sessions[request.body] for request in planned)


def test_shuffled() -> None:
    """Shuffled, the order depends on the seed only, and no request waits for another."""
    events = events_of(5)
    planned = plan(events, duplicates=0, shuffle=True, random=Random(1))
    assert [one.body for one in planned] != [event.body for event in events]
    assert planned == plan(events, duplicates=0, shuffle=True, random=Random(1))
    assert planned != plan(events, duplicates=0, shuffle=True, random=Random(2))
    assert {one.ordering_key for one in planned} == {None}


# What is sent


async def test_signed(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each body arrives unchanged, signed with the whole secret, and looks like Stripe's."""
    monkeypatch.setattr("time.time", lambda: NOW + 0.9 + 0.3 * len(endpoint.bodies))
    bodies = ['{"id": "evt_1"}', "{ \r\n}é"]
    await send(raw(*bodies), to=endpoint.url, secret=SECRET, concurrency=1)
    monkeypatch.undo()
    assert endpoint.bodies == [body.encode() for body in bodies]
    for second, body, headers in zip((0, 1), bodies, endpoint.headers, strict=True):
        signed = f"{NOW + second}.{body}".encode()
        mac = hmac.new(b"whsec_of_the_tests", signed, hashlib.sha256).hexdigest()
        assert headers["stripe-signature"] == f"t={NOW + second},v1={mac}"
        assert headers["user-agent"] == "Stripe/1.0 (+https://stripe.com/docs/webhooks)"
        assert headers["content-type"] == "application/json; charset=utf-8"


async def test_proxy_unused_on_loopback(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy of the environment is not used for this machine's own addresses."""
    with closed_port() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("ALL_PROXY", proxy)
        assert (await send(raw("{}"), to=endpoint.url, secret=SECRET)).ok


# In which order, how fast


async def test_session_order(endpoint: Endpoint) -> None:
    """The events of one session are sent one after the other, each after the last answer."""
    requests = plan(events_of(6), duplicates=0.3, shuffle=False, random=Random(3))
    await send(requests, to=endpoint.url, secret=SECRET, concurrency=8)
    for session in {request.ordering_key for request in requests}:
        own = [request.body.decode() for request in requests if request.ordering_key == session]
        steps = [step for step in endpoint.steps if step[1] in own]
        assert steps == [(word, body) for body in own for word in ("begun", "ended")]


async def test_concurrency(endpoint: Endpoint) -> None:
    """As many requests as allowed are in progress, and no more."""
    together = asyncio.Barrier(3)
    endpoint.hold = together.wait
    async with asyncio.timeout(PATIENCE_S):
        await send(raw(*map(str, range(12))), to=endpoint.url, secret=SECRET, concurrency=3)
    in_progress = accumulate(1 if step == "begun" else -1 for step, _ in endpoint.steps)
    assert max(in_progress) == 3


@pytest.mark.parametrize(
    ("concurrency", "rate", "stall_s", "starts"),
    [
        pytest.param(1, 2, 3.0, [0.0, 0.5, 3.5, 4.0, 4.5], id="no burst to catch up"),
        pytest.param(3, 4, 0.0, [0.0, 0.25, 0.5, 0.75, 1.0], id="one rate for all"),
    ],
)
@in_virtual_time
async def test_rate(
    concurrency: int,
    rate: float,
    stall_s: float,
    starts: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a rate, requests start at even intervals, whatever the concurrency."""
    clock = asyncio.get_running_loop().time
    began_at = list[float]()

    async def deliver(_: object, request: WebhookRequest) -> Answer:
        began_at.append(clock())
        if len(began_at) == 2:
            await asyncio.sleep(stall_s)
        return Answer(request=request, outcome="admitted", status=200, elapsed_s=0.0)

    monkeypatch.setattr(sender._Endpoint, "deliver", deliver)
    await send(
        raw(*"abcde"), to="http://localhost", secret=SECRET, rate=rate, concurrency=concurrency
    )
    assert began_at == pytest.approx(starts)


@in_virtual_time
async def test_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once stopped, nothing more is sent, and no wait for the rate goes on."""
    stopping = asyncio.Event()

    async def deliver(_: object, request: WebhookRequest) -> Answer:
        stopping.set()
        return Answer(request=request, outcome="admitted", status=200, elapsed_s=0.0)

    monkeypatch.setattr(sender._Endpoint, "deliver", deliver)
    summary = await send(
        raw(*"abc"), to="http://localhost", secret=SECRET, rate=1 / 3600, stopping=stopping
    )
    assert summary.total == 1
    assert asyncio.get_running_loop().time() < 1


# How it is counted


@pytest.mark.parametrize(
    ("status", "reply", "outcome"),
    [
        (200, '{"outcome":"admitted"}', "admitted"),
        (200, '{"outcome":"duplicate","more":1}', "duplicate"),
        (200, "", "http_200"),
        (204, "", "http_204"),
        (200, "[]", "http_200"),
        (200, '{"outcome":7}', "http_200"),
        (200, '{"outcome":"<b>Words\\nof a stranger"}', "http_200"),
        (302, "", "http_302"),
        (400, '{"error":"signature_mismatch"}', "signature_mismatch"),
        (500, "<html>", "http_500"),
        (503, '{"error":"unavailable"}', "unavailable"),
    ],
)
async def test_outcome(endpoint: Endpoint, status: int, reply: str, outcome: str) -> None:
    """An answer counts under its own word, else its status, and is ok only if a 2xx."""
    endpoint.status, endpoint.reply = status, reply.encode()
    summary = await send(raw("a", "b"), to=endpoint.url, secret=SECRET)
    assert summary.counts == {outcome: 2}
    assert summary.total == 2
    assert summary.ok is (200 <= status < 300)
    assert len(endpoint.bodies) == 2


async def test_progress(endpoint: Endpoint) -> None:
    """`progress` gets every answer as it arrives; the summary is ok only if every answer is."""
    requests = raw("a", "b", "c", ordering_key="one")
    answers: list[Answer] = []

    def progress(answer: Answer) -> None:
        answers.append(answer)
        endpoint.status, endpoint.reply = 200, b'{"outcome":"admitted"}'
        if len(answers) == 1:
            endpoint.status, endpoint.reply = 503, b'{"error":"unavailable"}'

    summary = await send(requests, to=endpoint.url, secret=SECRET, progress=progress)
    assert [(answer.request, answer.outcome, answer.status, answer.ok) for answer in answers] == [
        (requests[0], "admitted", 200, True),
        (requests[1], "unavailable", 503, False),
        (requests[2], "admitted", 200, True),
    ]
    assert summary.counts == {"admitted": 2, "unavailable": 1}
    assert not summary.ok


async def test_unreachable() -> None:
    """If nothing listens, every request is counted and none is retried."""
    answers: list[Answer] = []
    with closed_port() as url:
        summary = await send(raw("a", "b"), to=url, secret=SECRET, progress=answers.append)
    assert summary.counts == {"unreachable": 2}
    assert [(answer.status, answer.ok) for answer in answers] == [(None, False)] * 2
    assert not summary.ok


async def test_silent_endpoint(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that does not answer in time counts as unreachable."""
    monkeypatch.setattr(sender, "TIMEOUT_S", 0.1)
    answered = asyncio.Event()
    endpoint.hold = answered.wait
    summary = await send(raw("a"), to=endpoint.url, secret=SECRET)
    answered.set()
    assert summary.counts == {"unreachable": 1}


# What is refused before anything is sent


@pytest.mark.parametrize(
    "to", ["", "localhost:8000", "ftp://localhost/", "http://", "http://x:y/", "http://x/\0"]
)
async def test_no_address(to: str) -> None:
    """An address that is no http or https URL is an error."""
    with pytest.raises(ConfigError, match="no http or https URL"):
        await send(raw("a"), to=to, secret=SECRET)


def test_repr() -> None:
    """A request's repr shows nothing of its body."""
    assert "secret" not in repr(raw(json.dumps({"client_secret": "…"})))
