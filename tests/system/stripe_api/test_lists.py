"""Lists show what Stripe's show: filters, cursors, page tokens, retention and their lag."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.stripe_api import StripeStandIn, client_of

V1, V2 = "/v1/events", "/v2/core/events"
PREFIX = "identity.verification_session."
NOON = 1_795_953_600


@pytest.fixture
def stand_in() -> StripeStandIn:
    """Return a stand-in at noon, with one event a second: of twelve sessions, half canceled."""
    made = StripeStandIn()
    made.clock.stop(NOON)
    for number in range(12):
        session = made.sessions.create()
        made.clock.advance(1)
        if number % 2:
            made.sessions.cancel(session.id)
            made.clock.advance(1)
    return made


@pytest.fixture
async def client(stand_in: StripeStandIn) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client with a secret key."""
    async with client_of(stand_in, stand_in.directory.add_key().secret) as opened:
        yield opened


async def page(client: httpx2.AsyncClient, url: str, **query: Any) -> dict[str, Any]:
    """Return a page."""
    answer = await client.get(url, params=query or None)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ids(page: dict[str, Any]) -> list[str]:
    """Return the ids on a page."""
    return [one["id"] for one in page["data"]]


async def refusal(client: httpx2.AsyncClient, url: str, **query: Any) -> tuple[int, str]:
    """Return the status of a refusal and the parameter that it names."""
    answer = await client.get(url, params=query)
    return answer.status_code, answer.json()["error"].get("param")


async def walk(client: httpx2.AsyncClient, limit: int, cursor: str = "starting_after") -> list[str]:
    """Return the ids of all pages, in the order of the pages."""
    found: list[str] = []
    query: dict[str, Any] = {"limit": limit}
    while True:
        got = await page(client, V1, **query)
        found += ids(got) if cursor == "starting_after" else ids(got)[::-1]
        if not got["has_more"]:
            return found
        query[cursor] = found[-1]


@pytest.mark.parametrize("limit", [1, 5, 9, 18, 100])
async def test_pages_hold_every_event_once(
    stand_in: StripeStandIn, client: httpx2.AsyncClient, limit: int
) -> None:
    """In both directions under /v1, and by the links of /v2."""
    newest_first = [one.id for one in stand_in.events.all][::-1]
    assert await walk(client, limit) == newest_first
    oldest = await page(client, V1, limit=limit, ending_before=newest_first[-1])
    assert ids(oldest) == newest_first[:-1][-limit:]
    assert oldest["has_more"] is (limit < 17)

    thin, url = list[str](), f"{V2}?limit={limit}"
    while url:
        got = await page(client, url)
        thin += ids(got)
        assert (got["previous_page_url"] is None) is (len(thin) <= limit)
        url = got["next_page_url"]
    assert thin == [one.thin_id for one in stand_in.events.all][::-1]


async def test_new_events_do_not_shift_pages(
    stand_in: StripeStandIn, client: httpx2.AsyncClient
) -> None:
    """A reader that is under way sees what there was when it began."""
    v1, v2 = await page(client, V1, limit=3), await page(client, V2, limit=3)
    before = stand_in.events.all[::-1]
    stand_in.sessions.create()
    after = await page(client, V1, limit=3, starting_after=ids(v1)[-1])
    assert ids(after) == [one.id for one in before[3:6]]
    assert ids(await page(client, v2["next_page_url"])) == [one.thin_id for one in before[3:6]]


@given(st.data())
async def test_filters_show_what_they_say(draw: st.DataObject) -> None:
    """Any bounds and types: the same events as by plain comparison, in both APIs."""
    stand_in = StripeStandIn()
    stand_in.clock.stop(NOON)
    for step in draw.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)):
        session = stand_in.sessions.create()
        stand_in.clock.advance(step)
        stand_in.sessions.submit(session.id)
    bounds = draw.draw(
        st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), st.integers(-1, 9))
    )
    words = draw.draw(st.sets(st.sampled_from(["created", "processing", "verified"])))
    tests = {"gt": int.__gt__, "gte": int.__ge__, "lt": int.__lt__, "lte": int.__le__}
    expected = [
        one
        for one in stand_in.events.all[::-1]
        if all(tests[name](int(one.created) - NOON, bound) for name, bound in bounds.items())
        and (not words or one.type.removeprefix(PREFIX) in words)
    ]
    query: dict[str, Any] = {f"created[{name}]": NOON + at for name, at in bounds.items()}
    async with client_of(stand_in, stand_in.directory.add_key().secret) as client:
        types = [f"{PREFIX}{word}" for word in words]
        found = await page(client, V1, limit=100, **query, **{"types[]": types})
        assert ids(found) == [one.id for one in expected]


async def test_types_and_objects_can_be_named(
    stand_in: StripeStandIn, client: httpx2.AsyncClient
) -> None:
    """One type, a pattern, several types, and one session's history under /v2."""
    canceled = [one for one in stand_in.events.all[::-1] if one.type.endswith("canceled")]
    named = await page(client, V1, type=f"{PREFIX}canceled")
    assert ids(named) == [one.id for one in canceled]
    assert len(ids(await page(client, V1, type="identity.*", limit=100))) == 18
    assert ids(await page(client, V1, type="charge.*")) == []
    thin = await page(client, V2, types=f"v1.{PREFIX}canceled", limit=4)
    assert ids(thin) + ids(await page(client, thin["next_page_url"])) == [
        one.thin_id for one in canceled
    ]
    session = canceled[0].related.id
    history = await page(client, V2, object_id=session)
    assert [one["type"].rpartition(".")[2] for one in history["data"]] == ["canceled", "created"]


async def test_lists_lag_and_forget(stand_in: StripeStandIn, client: httpx2.AsyncClient) -> None:
    """An event can be read by its id at once, is listed later, and is gone after 30 days."""
    stand_in.list_lag_s = 45
    stand_in.sessions.create()
    late = stand_in.events.all[-1]
    stand_in.list_lag_s = 0
    stand_in.sessions.create()
    newest = stand_in.events.all[-1]
    for url, event_id in ((V1, late.id), (V2, late.thin_id)):
        assert (await client.get(f"{url}/{event_id}")).status_code == 200
        assert event_id not in ids(await page(client, url, limit=100))
    before = await page(client, V1, limit=1, starting_after=late.id)
    assert ids(before) == [stand_in.events.all[-3].id]
    oldest = await page(client, V2, limit=100)
    half = await page(client, V2, limit=len(ids(oldest)) - 1)
    stand_in.clock.advance(45)
    assert ids(await page(client, V1, limit=2)) == [newest.id, late.id]
    stand_in.clock.advance(30 * 24 * 3600 - 44)
    for url, event_id in ((V1, late.id), (V2, late.thin_id)):
        assert ids(await page(client, url)) == []
        assert ids(await page(client, half["next_page_url"])) == []
        answer = await client.get(f"{url}/{event_id}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "resource_missing")


async def test_events_that_are_not_delivered_can_be_listed(stand_in: StripeStandIn) -> None:
    """Pending ones count as not delivered; those without any endpoint as delivered."""
    endpoint = stand_in.subscribe("http://127.0.0.1:9/")
    for share in (lambda *_: True, lambda *_: False):
        stand_in.pushes.loses = share
        stand_in.sessions.create()
    pending = stand_in.events.all[-1]
    async with client_of(stand_in, stand_in.directory.add_key().secret) as client:
        assert ids(await page(client, V1, delivery_success="false")) == [pending.id]
        assert pending.id not in ids(await page(client, V1, delivery_success="true", limit=100))
        assert (await page(client, f"{V1}/{pending.id}"))["pending_webhooks"] == 1
        assert endpoint.is_enabled


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"starting_after": "evt_none"}, "starting_after"),
        ({"ending_before": "evt_none"}, "ending_before"),
        ({"type": "a", "types[]": "b"}, "type"),
        ({"types[]": [f"t{number}" for number in range(21)]}, "types"),
        ({"created[since]": 1}, "created[since]"),
        ({"created[gte]": "noon"}, "created"),
        ({"delivery_success": "maybe"}, "delivery_success"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_wrong_parameters_are_refused(
    client: httpx2.AsyncClient, query: dict[str, Any], param: str
) -> None:
    """With the name of the parameter."""
    assert await refusal(client, V1, **query) == (400, param)


@pytest.mark.parametrize(
    ("query", "param"),
    [({"page": "x"}, "page"), ({"created[gte]": "1"}, "created"), ({"limit": 0}, "limit")],
)
async def test_wrong_parameters_of_v2_are_refused(
    client: httpx2.AsyncClient, query: dict[str, Any], param: str
) -> None:
    """With the name of the parameter."""
    assert await refusal(client, V2, **query) == (400, param)


async def test_sessions_are_listed_by_what_they_are(stand_in: StripeStandIn) -> None:
    """By reference, customer, status and time."""
    one = stand_in.sessions.create(client_reference_id="user-1", related_customer="cus_1")
    stand_in.sessions.submit(one.id)
    stand_in.sessions.verify(one.id)
    async with client_of(stand_in, stand_in.directory.add_key().secret) as client:
        url = "/v1/identity/verification_sessions"
        for query in (
            {"client_reference_id": "user-1"},
            {"related_customer": "cus_1"},
            {"status": "verified"},
            {"created[gte]": int(one.created)},
        ):
            assert ids(await page(client, url, **query)) == [one.id]
        assert len(ids(await page(client, url, limit=100, status="canceled"))) == 6
