"""Requests to Stripe's API: what is sent, which answers count, and what becomes of the others."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from service.errors import ApiError, ApiErrorReason
from service.secret import Secret
from service.stripe_api import client
from service.stripe_api.client import API_VERSION, ApiEndpoint, Caller, StripeApi, open_api
from service.stripe_api.keys import ApiKeys
from service.stripe_api.rate_limit import Priority
from tests.support.stripe_api import (
    API_VERSION as CURRENT_VERSION,
)
from tests.support.stripe_api import (
    Fault,
    StripeStandIn,
    broken,
    running,
    too_many_requests,
)

TEST = Caller(is_live=False)
JSON = {"Content-Type": "application/json"}
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
async def recording(recorder: Recorder, keys: ApiKeys = KEYS) -> AsyncIterator[StripeApi]:
    """Yield a client of an application."""
    async with running(recorder) as address, open_api(address, keys) as api:
        yield api


async def test_an_object_is_read(stand_in: StripeStandIn, api: StripeApi) -> None:
    """The answer's body is returned as it came."""
    session = stand_in.sessions.create()
    path = f"/v1/identity/verification_sessions/{session.id}"
    found = orjson.loads(await read(api, path, endpoint=ApiEndpoint.SESSION))
    assert found["id"] == session.id
    assert [one.path for one in stand_in.requests] == [path]


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


async def test_nobody_listens() -> None:
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
