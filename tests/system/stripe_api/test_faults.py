"""The API fails as a test asks, over real connections, and counts every request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx2
import pytest

from tests.support.stripe_api import (
    Fault,
    StripeStandIn,
    broken,
    fail,
    served,
    too_many_requests,
)
from tests.support.stripe_api.errors import missing
from tests.support.waiting import DEADLINE_S

EVENTS = "/v1/events"


@pytest.fixture
def stand_in() -> StripeStandIn:
    """Return a stand-in with some events."""
    made = StripeStandIn()
    for _ in range(5):
        made.sessions.create()
    return made


@pytest.fixture
async def client(stand_in: StripeStandIn) -> AsyncIterator[httpx2.AsyncClient]:
    """Serve it, and yield a client with a key."""
    headers = {"Authorization": f"Bearer {stand_in.directory.add_key().secret}"}
    async with (
        served(stand_in) as address,
        httpx2.AsyncClient(base_url=address, headers=headers, timeout=DEADLINE_S) as opened,
    ):
        yield opened


async def test_answers_are_replaced(stand_in: StripeStandIn, client: httpx2.AsyncClient) -> None:
    """For so many requests, in order; then all is well."""
    odd = {"Location": "http://127.0.0.1:9/", "Content-Type": "text/html"}
    for fault in (
        too_many_requests(7, times=1),
        too_many_requests(times=1),
        broken(503, times=2),
        fail(missing("event", "evt_1"), times=1),
        Fault(kind="answer", status=302, headers=odd, body=b"<p>moved", times=1),
    ):
        stand_in.faults.add(fault)
    answers = [await client.get(EVENTS) for _ in range(7)]
    assert [one.status_code for one in answers] == [429, 429, 503, 503, 404, 302, 200]
    assert [one.headers.get("retry-after") for one in answers[:3]] == ["7", None, None]
    assert answers[0].json()["error"]["code"] == "rate_limit"
    assert answers[5].text == "<p>moved"
    assert [one.status for one in stand_in.requests] == [one.status_code for one in answers]


async def test_a_fault_meets_those_it_is_for(
    stand_in: StripeStandIn, client: httpx2.AsyncClient
) -> None:
    """By path, query and account."""
    account = {"Stripe-Account": stand_in.directory.connect().id}
    stand_in.faults.add(broken(account=account["Stripe-Account"], path="/v1/.*"))
    stand_in.faults.add(broken(query=".*limit=3.*"))
    for url, headers, status in (
        (EVENTS, account, 500),
        ("/v2/core/events", account, 200),
        (EVENTS, {}, 200),
        (f"{EVENTS}?limit=3", {}, 500),
    ):
        assert (await client.get(url, headers=headers)).status_code == status
    stand_in.faults.clear()
    assert (await client.get(EVENTS, headers=account)).status_code == 200


async def test_a_connection_is_cut_in_the_middle(
    stand_in: StripeStandIn, client: httpx2.AsyncClient
) -> None:
    """The head says 200, half of the body comes, and the next request is answered."""
    stand_in.faults.add(Fault(kind="cut", times=1))
    with pytest.raises(httpx2.RemoteProtocolError):
        await client.get(EVENTS)
    assert len((await client.get(EVENTS)).json()["data"]) == 5


async def test_a_request_hangs_until_the_client_gives_up(
    stand_in: StripeStandIn, client: httpx2.AsyncClient
) -> None:
    """And is counted, without a status."""
    stand_in.faults.add(Fault(kind="hang", times=1))
    with pytest.raises(httpx2.ReadTimeout):
        await client.get(EVENTS, timeout=0.2)
    assert (await client.get(EVENTS)).status_code == 200
    assert {one.status for one in stand_in.requests} == {None, 200}


async def test_a_body_comes_slowly(stand_in: StripeStandIn, client: httpx2.AsyncClient) -> None:
    """It is the right one, in pieces."""
    stand_in.faults.add(Fault(kind="slow", seconds=0.3, times=1))
    began = time.monotonic()
    slow = await client.get(EVENTS)
    assert time.monotonic() - began >= 0.3
    assert slow.json()["has_more"] is False


@pytest.mark.parametrize("retry_after_s", [None, 2])
async def test_the_rate_is_limited(
    stand_in: StripeStandIn, client: httpx2.AsyncClient, retry_after_s: int | None
) -> None:
    """For each account by itself."""
    stand_in.rate_limit.per_s, stand_in.rate_limit.retry_after_s = 3, retry_after_s
    answers = await asyncio.gather(*(client.get(EVENTS) for _ in range(5)))
    refused = [one for one in answers if one.status_code == 429]
    assert len(refused) == 2
    assert refused[0].headers["stripe-rate-limited-reason"] == "global-rate"
    assert refused[0].headers.get("retry-after") == (retry_after_s and str(retry_after_s))
    account = {"Stripe-Account": stand_in.directory.connect().id}
    assert (await client.get(EVENTS, headers=account)).status_code == 200
