"""Requests to Stripe's API: what is sent, which answers count, and what becomes of the others."""

from __future__ import annotations

import asyncio
import gzip
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from random import Random
from traceback import walk_tb
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from service.config import LogFormat, LogLevel
from service.errors import ApiError, ApiErrorReason
from service.secret import Secret
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.stripe_api import client
from service.stripe_api.client import API_VERSION, ApiEndpoint, Caller, StripeApi, open_api
from service.stripe_api.keys import ApiKeys
from service.stripe_api.rate_limit import Priority, RateLimiter
from service.telemetry import logs, metrics
from tests.support.spans import Spans
from tests.support.stripe_api import API_VERSION as CURRENT_VERSION
from tests.support.stripe_api import (
    CANARY,
    Fault,
    StripeStandIn,
    broken,
    running,
    too_many_requests,
)

TEST = Caller(is_live=False)
JSON = {"Content-Type": "application/json"}
OUTCOMES = {"ok", *ApiErrorReason}
KEYS = ApiKeys([Secret("sk_test_a"), Secret("rk_live_b")])


async def read(
    api: StripeApi,
    path: str = "/v1/events",
    *params: tuple[str, str],
    caller: Caller = TEST,
    endpoint: ApiEndpoint = ApiEndpoint.EVENTS,
) -> bytes:
    """Read something with the highest priority."""
    return await api.get(path, params, caller=caller, priority=Priority.FETCH, endpoint=endpoint)


async def failure(api: StripeApi, **how: Any) -> ApiErrorReason:
    """Return why a request fails."""
    with pytest.raises(ApiError) as caught:
        await read(api, **how)
    assert str(caught.value) == caught.value.reason
    assert caught.value.__context__ is caught.value.__cause__ is None
    return caught.value.reason


def variables(error: BaseException) -> list[str]:
    """Return the variables of every function of the service that an exception passed."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return [
        repr(one.f_locals) for one in frames if one.f_globals["__name__"].startswith("service.")
    ]


class Recorder:
    """An application that answers every request alike, and records the requests."""

    def __init__(
        self, status: int = 200, headers: Mapping[str, str] = JSON, body: bytes = b"{}"
    ) -> None:
        self.answer = status, headers, body
        self.requests: list[tuple[str, bytes, dict[str, str]]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((scope["path"], scope["query_string"], headers))
        status, answered, body = self.answer
        lines = [(name.lower().encode(), value.encode()) for name, value in answered.items()]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def answering(answer: list[bytes]) -> AsyncIterator[StripeApi]:
    """Yield a client of a server that sends the last of *answer* and hangs up, whatever it gets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer[-1])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, open_api(f"http://127.0.0.1:{port}", KEYS) as api:
        yield api


@asynccontextmanager
async def recording(recorder: Recorder, keys: ApiKeys = KEYS) -> AsyncIterator[StripeApi]:
    """Yield a client of an application."""
    async with running(recorder) as address, open_api(address, keys) as api:
        yield api


async def test_what_is_sent() -> None:
    """A request carries the key of its mode, whose objects it is about, and the version."""
    recorder = Recorder()
    async with recording(recorder) as api:
        await read(api, "/v1/events", ("types[]", "a.b"), ("types[]", "c"))
        await read(api, caller=Caller(is_live=True, account="acct_1"))
        await read(api, caller=Caller(is_live=True, context="acct_2/acct_3"))
    (path, query, own), (_, _, account), (_, _, context) = recorder.requests
    assert (path, query) == ("/v1/events", b"types%5B%5D=a.b&types%5B%5D=c")
    assert own["authorization"] == "Bearer sk_test_a"
    assert own["stripe-version"] == API_VERSION == CURRENT_VERSION
    assert not {"stripe-account", "stripe-context", "cookie"} & own.keys()
    assert account["authorization"] == "Bearer rk_live_b"
    assert (account["stripe-account"], context["stripe-context"]) == ("acct_1", "acct_2/acct_3")


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (401, JSON, ApiErrorReason.UNAUTHORIZED),
        (403, JSON, ApiErrorReason.FORBIDDEN),
        (404, JSON, ApiErrorReason.NOT_FOUND),
        (400, JSON, ApiErrorReason.UNEXPECTED),
        (204, JSON, ApiErrorReason.UNEXPECTED),
        (200, {}, ApiErrorReason.UNEXPECTED),
        (200, {"Content-Type": "text/html"}, ApiErrorReason.UNEXPECTED),
        (200, JSON | {"Content-Encoding": "gzip, gzip"}, ApiErrorReason.UNEXPECTED),
        (200, JSON | {"Content-Encoding": "gzip"}, ApiErrorReason.UNEXPECTED),
        (302, JSON | {"Location": "http://127.0.0.1:1/"}, ApiErrorReason.UNEXPECTED),
    ],
)
async def test_what_is_not_tried_again(
    status: int, headers: dict[str, str], reason: ApiErrorReason
) -> None:
    """An answer that another attempt would not change fails at once, with its word."""
    recorder = Recorder(status, headers, b"" if status == 204 else b"{}")
    async with recording(recorder) as api:
        assert await failure(api) is reason
    assert len(recorder.requests) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (broken(500), ApiErrorReason.UNREACHABLE),
        (broken(503), ApiErrorReason.UNREACHABLE),
        (broken(409), ApiErrorReason.UNREACHABLE),
        (too_many_requests(), ApiErrorReason.RATE_LIMITED),
        (too_many_requests(0), ApiErrorReason.RATE_LIMITED),
        (Fault(kind="cut"), ApiErrorReason.UNREACHABLE),
    ],
    ids=["500", "503", "409", "429", "429 after 0 s", "cut"],
)
async def test_what_is_tried_again(
    fault: Fault, reason: ApiErrorReason, stand_in: StripeStandIn, api: StripeApi
) -> None:
    """A fault that passes goes unnoticed; one that stays fails with its word in the end."""
    fault.times = 2
    stand_in.faults.add(fault)
    assert await read(api)
    assert len(stand_in.requests) == 3
    fault.times = None
    assert await failure(api) is reason
    assert len(stand_in.requests) == 3 + client.MAX_ATTEMPTS


async def test_a_mode_without_a_key_is_not_asked_for(
    stand_in: StripeStandIn, api: StripeApi
) -> None:
    """Without a key of its mode a request is not even sent."""
    assert not api.holds(True)
    assert await failure(api, caller=Caller(is_live=True)) is ApiErrorReason.UNAUTHORIZED
    assert stand_in.requests == []


async def test_a_replaced_key_is_used_from_the_next_request_on(
    stand_in: StripeStandIn, api: StripeApi, api_keys: ApiKeys
) -> None:
    """A revoked key fails until it is replaced."""
    for key in stand_in.directory._keys.values():
        key.is_revoked = True
    assert await failure(api) is ApiErrorReason.UNAUTHORIZED
    api_keys.replace([Secret(stand_in.directory.add_key().secret)])
    assert await read(api)


@pytest.mark.parametrize(
    ("endpoint", "max_bytes"), [(ApiEndpoint.EVENT, 2**20), (ApiEndpoint.EVENTS, 2**23)]
)
async def test_an_answer_has_a_largest_size(endpoint: ApiEndpoint, max_bytes: int) -> None:
    """A longer answer is refused, also when it is short as it comes."""
    body = b"x" * (max_bytes + 1)
    for sent, headers in (body, JSON), (gzip.compress(body), JSON | {"Content-Encoding": "gzip"}):
        async with recording(Recorder(headers=headers, body=sent)) as api:
            assert await failure(api, endpoint=endpoint) is ApiErrorReason.UNEXPECTED
    async with recording(Recorder(headers=headers, body=gzip.compress(body[1:]))) as api:
        assert await read(api, endpoint=endpoint) == body[1:]


async def test_no_server_listens() -> None:
    """Without a server the API is unreachable."""
    async with running(Recorder()) as address:
        pass
    async with open_api(address, KEYS) as api:
        assert await failure(api) is ApiErrorReason.UNREACHABLE


async def test_an_answer_has_a_deadline(
    stand_in: StripeStandIn, address: str, api_keys: ApiKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is silent, or sends a little at a time, is given up."""
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 0.3)
    async with open_api(address, api_keys) as api:
        hanging = stand_in.faults.add(Fault(kind="hang", times=1))
        assert await read(api)
        assert hanging.times == 0
        monkeypatch.setattr(client, "DEADLINE_S", 0.6)
        stand_in.faults.add(Fault(kind="slow", seconds=2.0))
        began = asyncio.get_running_loop().time()
        assert await failure(api) is ApiErrorReason.UNREACHABLE
        assert asyncio.get_running_loop().time() - began < 1.5


async def test_a_retry_waits_as_long_as_asked(
    stand_in: StripeStandIn, api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Retry-After` is waited for, unless the deadline is before it."""
    stand_in.faults.add(too_many_requests(1, times=1))
    began = asyncio.get_running_loop().time()
    assert await read(api)
    assert asyncio.get_running_loop().time() - began >= 1
    stand_in.faults.add(too_many_requests(3600))
    assert await failure(api) is ApiErrorReason.RATE_LIMITED
    assert len(stand_in.requests) == 3


PARTS = [
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 101 X\r\n", b"HTTP/1.1 302 X\r\n", b"HTTP/1.1 429\r\n"),
    *(b"Content-Type: application/json\r\n", b"Content-Length: 2\r\n", b"Content-Length: 9\r\n"),
    *(b"Content-Encoding: gzip\r\n", b"Transfer-Encoding: chunked\r\n", b"Retry-After: \xb2\r\n"),
    *(b"Location: http://[\r\n", b"Location: //\r\n", b"Set-Cookie: a=b\r\n", b"Connection: x\r\n"),
    *(b"\r\n", b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"\xff", b"\0", b":", gzip.compress(b"{}")),
]


async def test_no_answer_raises_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever bytes come, the result is an answer or an `ApiError`."""
    monkeypatch.setattr(client, "MAX_ATTEMPTS", 1)
    made = Random(1)
    answer: list[bytes] = []
    reasons = set()
    async with answering(answer) as api:
        for _ in range(500):
            status, *others = made.choices(PARTS[:4], k=1) + made.choices(PARTS[4:], k=6)
            answer.append(status + b"".join(part for part in PARTS if part in others))
            try:
                reasons.add(await read(api, endpoint=ApiEndpoint.EVENT))
            except ApiError as error:
                reasons.add(error.reason.encode())
    # And answers.
    assert {b"api_unexpected", b"api_unreachable", b"api_rate_limited"} < reasons


async def test_cookies_are_forgotten() -> None:
    """No state of one request passes to the next, which may have another key."""
    recorder = Recorder(headers=JSON | {"Set-Cookie": "a=b; Path=/"})
    async with recording(recorder) as api:
        for _ in range(2):
            await read(api)
    assert "cookie" not in recorder.requests[1][2]


@pytest.mark.parametrize("value", ["", "acct_é", "acct_1\r\nX: y", "a" * 256])
async def test_no_header_is_made_of_any_text(value: str) -> None:
    """An account or a context that is no id is not sent."""
    recorder = Recorder()
    async with recording(recorder) as api:
        for caller in (Caller(is_live=True, account=value), Caller(is_live=True, context=value)):
            assert await failure(api, caller=caller) is ApiErrorReason.UNEXPECTED
    assert recorder.requests == []


FAULTS = [
    None,
    Fault(kind="cut"),
    Fault(kind="slow", seconds=1),
    Fault(kind="answer", status=200, headers=JSON, body=CANARY.encode() * 200_000),
    Fault(kind="answer", status=302, headers={"Location": f"http://{CANARY}.test/"}),
    Fault(kind="answer", status=400, headers=JSON, body=CANARY.encode()),
    too_many_requests(),
]


@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
async def test_nothing_of_a_request_or_an_answer_is_shown(
    fault: Fault | None,
    stand_in: StripeStandIn,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither key nor content is in the log, in an exception, in its variables or in a repr."""
    monkeypatch.setattr(client, "DEADLINE_S", 0.3)
    out = io.BytesIO()
    session = stand_in.sessions.create()
    if fault is not None:
        stand_in.faults.add(fault)
    keys = ApiKeys([Secret(stand_in.directory.add_key().secret)])
    shown = [repr(keys), str(keys.fingerprints())]
    logs.configure(LogLevel.DEBUG, LogFormat.JSON, out)
    async with open_api(address, keys) as api:
        path = f"/v1/identity/verification_sessions/{session.id}"
        try:
            assert CANARY.encode() in await read(api, path, endpoint=ApiEndpoint.SESSION)
        except ApiError as error:
            shown += [repr(error), *variables(error)]
        shown.append(repr(api))
    logs.flush()
    # The server of this test may log that an answer was cut.
    logged = out.getvalue().decode() + caplog.text
    assert not [word for word in (CANARY, session.id, "httpx2", "httpcore2") if word in logged]
    assert CANARY not in "".join(shown)
    assert len(shown) > 3 or fault is None


async def test_each_request_is_counted(stand_in: StripeStandIn, api: StripeApi) -> None:
    """Each attempt is counted with its outcome and timed; all series exist from the start."""

    def counted() -> dict[tuple[str, ...], float]:
        return {
            (sample.name, *sample.labels.values()): sample.value
            for series in (metrics.STRIPE_API_REQUESTS, metrics.STRIPE_API_SECONDS)
            for family in series.collect()
            for sample in family.samples
            if sample.name.endswith(("_total", "_count"))
        }

    before = counted()
    name = "idv_stripe_api_requests_total"
    assert {(name, one, outcome) for one in ApiEndpoint for outcome in OUTCOMES} <= before.keys()
    stand_in.faults.add(broken(times=2))
    await read(api)
    await failure(api, path="/v1/events/evt_none", endpoint=ApiEndpoint.EVENT)
    after = counted()
    assert {
        key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key)
    } == {
        (name, "events", "api_unreachable"): 2,
        (name, "events", "ok"): 1,
        (name, "event", "api_not_found"): 1,
        ("idv_stripe_api_seconds_count", "events"): 3,
        ("idv_stripe_api_seconds_count", "event"): 1,
    }


async def test_each_reading_has_a_span(address: str, api_keys: ApiKeys) -> None:
    """Its span is a child of the present one, and holds words only."""
    spans = Spans()
    async with open_api(address, api_keys, open_span=spans.tracing.api_span) as api:
        with spans.tracing.receive_span(None):
            await read(api)
            await failure(api, path="/v1/events/evt_none", endpoint=ApiEndpoint.EVENT)
    good, bad, outer = spans.all
    assert good.parent == bad.parent == outer.context
    assert (good.name, good.kind.name, good.attributes) == (
        "GET events",
        "CLIENT",
        {"endpoint": "events"},
    )
    assert bad.attributes == {"endpoint": "event", "outcome": "api_not_found"}
    assert not bad.events


async def test_requests_take_from_the_budget(
    connections: Connections,
    keys: Keys,
    stand_in: StripeStandIn,
    api: StripeApi,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each attempt takes one; where none is left within the deadline, nothing is sent."""
    monkeypatch.setattr(client, "DEADLINE_S", 0.5)
    api._limiter = RateLimiter(connections, keys, 1)
    stand_in.faults.add(broken(times=1))
    assert await read(api)
    assert await failure(api) is ApiErrorReason.RATE_LIMITED
    assert len(stand_in.requests) == 2
