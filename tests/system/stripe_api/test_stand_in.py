"""The stand-in for Stripe, where neither Stripe's own clients nor tests of the service hold it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.secret import Secret
from service.stripe import VerificationReport, VerificationSession
from service.stripe.events import Event, ThinEvent, parse
from service.stripe.signatures import VerifiedPayload, sign, verify
from tests.support.programs import FIXTURES
from tests.support.stripe_api import (
    CANARY,
    CANARY_NUMBERS,
    READ_ONLY,
    StripeStandIn,
    client_of,
)

V1, V2, SESSIONS = "/v1/events", "/v2/core/events", "/v1/identity/verification_sessions"
REPORT = "last_verification_report"
PREFIX = "identity.verification_session."
NOON = 1_795_953_600
SECRET = Secret(b"whsec_tests")


@pytest.fixture
def stand_in() -> StripeStandIn:
    """Return a stand-in at noon, whose one destination names all six types and gets nothing."""
    made = StripeStandIn()
    made.clock.stop(NOON)
    made.subscribe(None)
    return made


@pytest.fixture
async def client(stand_in: StripeStandIn) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client with a key that may read everything."""
    key = stand_in.directory.add_key(permissions=READ_ONLY)
    async with client_of(stand_in, key.secret) as opened:
        yield opened


async def read(client: httpx2.AsyncClient, url: str, **query: Any) -> Any:
    """Return what is answered with 200."""
    answer = await client.get(url, params=query or None)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(page: dict[str, Any]) -> list[str]:
    """Return the ids on a page."""
    return [one["id"] for one in page["data"]]


def verify_session(stand_in: StripeStandIn) -> str:
    """Let a session be rejected once and then verified; return its id."""
    session_id = stand_in.sessions.create().id
    stand_in.sessions.submit(session_id)
    stand_in.sessions.reject(session_id)
    stand_in.sessions.submit(session_id)
    stand_in.sessions.verify(session_id)
    return session_id


async def test_modes_and_accounts_see_their_own(stand_in: StripeStandIn) -> None:
    """A key of one mode sees nothing of the other; accounts are named in a header."""
    account = stand_in.directory.connect().id
    scopes = {
        "test": stand_in.scope(),
        "live": stand_in.scope(livemode=True),
        "connected": stand_in.scope(account),
    }
    made = {name: stand_in.sessions.create(scope=scope).id for name, scope in scopes.items()}
    test = stand_in.directory.add_key(permissions=READ_ONLY).secret
    live = stand_in.directory.add_key(livemode=True).secret
    for secret, headers, seen in (
        (test, {}, "test"),
        (live, {}, "live"),
        (test, {"Stripe-Account": account}, "connected"),
        (test, {"Stripe-Context": f"{stand_in.scope().account}/{account}"}, "connected"),
    ):
        async with client_of(stand_in, secret) as client:
            client.headers.update(headers)
            [one] = (await read(client, V1))["data"]
            assert one["data"]["object"]["id"] == made[seen]
            for name, session in made.items():
                [event] = stand_in.events.about(session)
                for path in (f"{SESSIONS}/{session}", f"{V1}/{event.id}", f"{V2}/{event.thin_id}"):
                    answer = await client.get(path)
                    assert answer.status_code == (200 if name == seen else 404)


@pytest.mark.parametrize("limit", [1, 5, 18, 100])
async def test_pages_hold_every_event_once(
    limit: int, stand_in: StripeStandIn, client: httpx2.AsyncClient
) -> None:
    """An event that comes meanwhile shifts nothing."""
    for _ in range(18):
        stand_in.sessions.create()
    events = stand_in.events.all[::-1]
    query: dict[str, Any] = {"limit": limit}
    found, has_more = list[str](), True
    while has_more:
        page = await read(client, V1, **query)
        found, has_more = found + ids(page), page["has_more"]
        query["starting_after"] = found[-1]
        stand_in.sessions.create()
    assert found == [one.id for one in events]


@given(st.data())
async def test_filters_show_what_they_say(draw: st.DataObject) -> None:
    """Any bounds and types: the same events as by plain comparison."""
    stand_in = StripeStandIn()
    stand_in.clock.stop(NOON)
    for step in draw.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)):
        session = stand_in.sessions.create()
        stand_in.clock.advance(step)
        stand_in.sessions.submit(session.id)
    bounds = draw.draw(st.dictionaries(st.sampled_from(["gte", "lte"]), st.integers(-1, 9)))
    words = draw.draw(st.sets(st.sampled_from(["created", "processing", "verified"])))
    tests = {"gte": int.__ge__, "lte": int.__le__}
    expected = [
        one.id
        for one in stand_in.events.all[::-1]
        if all(tests[name](int(one.created) - NOON, bound) for name, bound in bounds.items())
        and (not words or one.type.removeprefix(PREFIX) in words)
    ]
    query: dict[str, Any] = {f"created[{name}]": NOON + at for name, at in bounds.items()}
    query["types[]"] = [f"{PREFIX}{word}" for word in words]
    async with client_of(stand_in, stand_in.directory.add_key().secret) as client:
        assert ids(await read(client, V1, limit=100, **query)) == expected


async def test_lists_lag_and_forget(stand_in: StripeStandIn, client: httpx2.AsyncClient) -> None:
    """An event can be read by its id at once, is listed later, and is gone after 30 days."""
    stand_in.list_lag_s = 45
    stand_in.sessions.create()
    [late] = stand_in.events.all
    forms = ((V1, late.id), (V2, late.thin_id))
    for url, event_id in forms:
        assert (await read(client, f"{url}/{event_id}"))["id"] == event_id
    assert ids(await read(client, V1)) == []
    stand_in.clock.advance(45)
    assert ids(await read(client, V1)) == [late.id]
    stand_in.clock.advance(30 * 24 * 3600 - 44)
    assert ids(await read(client, V1)) == []
    for url, event_id in forms:
        assert (await client.get(f"{url}/{event_id}")).status_code == 404


def test_snapshots_have_the_fields_of_the_samples(stand_in: StripeStandIn) -> None:
    """Of all six types, in the same order."""
    rejected = verify_session(stand_in)
    stand_in.sessions.redact(rejected)
    stand_in.sessions.finish_redaction(rejected)
    stand_in.sessions.cancel(stand_in.sessions.create().id)
    assert len({event.type for event in stand_in.events.all}) == 6
    for event in stand_in.events.all:
        sample = orjson.loads((FIXTURES / f"{event.type}.json").read_bytes())
        snapshot = event.as_snapshot()
        assert list(snapshot) == list(sample)
        for part in ("request", "data"):
            assert list(snapshot[part]) == list(sample[part])
        shown, expected = snapshot["data"]["object"], sample["data"]["object"]
        assert list(shown) == list(expected)
        assert list(shown["options"]["document"]) == list(expected["options"]["document"])


def payload(event: dict[str, Any]) -> VerifiedPayload:
    """Return an event as the service has it after its signature was verified."""
    body, now = orjson.dumps(event), int(time.time())
    header = sign(body, SECRET, now)
    return verify(body, header.encode(), [SECRET], now=now, tolerance_s=300)


async def test_the_service_reads_every_form(
    stand_in: StripeStandIn, client: httpx2.AsyncClient
) -> None:
    """Snapshots, notifications, sessions and reports with everything expanded."""
    stand_in.expands_everything = True
    session_id = verify_session(stand_in)
    assert "dob" in stand_in.events.all[-1].session["verified_outputs"]
    for event in stand_in.events.all:
        snapshot = parse(payload(event.as_snapshot()))
        assert isinstance(snapshot, Event)
        found = (snapshot.id, snapshot.session.id, snapshot.skipped_fields)
        assert found == (event.id, session_id, ())
        thin = parse(payload(event.as_notification()))
        assert isinstance(thin, ThinEvent)
        assert (thin.event_id, thin.event_type) == (event.thin_id, f"v1.{event.type}")
    answer = await client.get(f"{SESSIONS}/{session_id}")
    session = VerificationSession.from_json(answer.content)
    assert session.verified_outputs
    assert session.verified_outputs.dob
    assert isinstance(session.last_verification_report, VerificationReport)
    assert session.last_verification_report.document
    assert session.last_verification_report.document.number


def leaves(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each text and number with its path."""
    if isinstance(found, dict):
        for name, value in found.items():
            yield from leaves(value, f"{path}.{name}" if path else name)
    elif isinstance(found, list):
        for value in found:
            yield from leaves(value, path)
    elif isinstance(found, (str, int)) and not isinstance(found, bool):
        yield path, found


# What is neither secret nor personal, or has no room for a canary.
PLAIN = {
    *("id", "object", "created", "status", "type", "options.document.allowed_types"),
    *("related_customer", "verified_outputs.address.country", "verified_outputs.sex"),
    "verified_outputs.id_number_type",
    *(
        f"{REPORT}.{name}"
        for name in (
            *("id", "object", "created", "type", "options.document.allowed_types"),
            *("verification_session", "document.address.country", "document.issuing_country"),
            *("document.sex", "document.status", "document.type", "email.status"),
            *("id_number.id_number_type", "id_number.status", "phone.status", "selfie.status"),
        )
    ),
}


async def test_everything_personal_has_a_canary(
    stand_in: StripeStandIn, client: httpx2.AsyncClient
) -> None:
    """Until it is redacted, when nothing of it is left."""
    stand_in.expands_everything = True
    session_id = verify_session(stand_in)
    found = list(leaves(await read(client, f"{SESSIONS}/{session_id}")))
    assert len(found) > 60
    for path, value in found:
        assert value in CANARY_NUMBERS or CANARY in str(value) or path in PLAIN, path
    stand_in.sessions.redact(session_id)
    stand_in.sessions.finish_redaction(session_id)
    for path, value in leaves(await read(client, f"{SESSIONS}/{session_id}")):
        assert value not in CANARY_NUMBERS, path
        assert CANARY not in str(value), path
