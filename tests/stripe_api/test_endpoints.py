"""What is found out about the destinations that Stripe sends to: each case, and healthy ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import orjson
import pytest
from structlog.testing import capture_logs

from service.config import Livemode, Settings
from service.errors import Unavailable, UnavailableReason
from service.findings import Finding, Promise, Severity
from service.secret import Secret
from service.stripe_api.client import Caller, StripeApi
from service.stripe_api.destinations import ALL_TYPES, survey_all
from service.stripe_api.endpoint_watch import LOOK_EVERY_S, EndpointWatch
from service.stripe_api.endpoints import assess
from service.stripe_api.keys import ApiKeys
from service.stripe_api.rate_limit import Priority
from service.telemetry import metrics
from tests.support.stripe_api import (
    CANARY,
    READ_ONLY,
    Fault,
    Permission,
    StripeStandIn,
    all_types,
    answer,
    too_many_requests,
)

URL = "https://hooks.test/webhooks/stripe"
SNAPSHOT, THIN = all_types("snapshot"), all_types("thin")
SETTINGS = Settings()


async def examined(api: StripeApi, **changes: Any) -> list[Finding]:
    """Return what is found, with some settings."""
    return assess(await survey_all(api, Priority.FETCH), replace(SETTINGS, **changes))


async def names(api: StripeApi, **changes: Any) -> list[str]:
    """Return the names of what is found."""
    return [one.name for one in await examined(api, **changes)]


@pytest.fixture
def live(stand_in: StripeStandIn, api_keys: ApiKeys) -> StripeStandIn:
    """Return the stand-in, with a live key only."""
    api_keys.replace([Secret(stand_in.directory.add_key(livemode=True).secret)])
    return stand_in


def both_keys(stand_in: StripeStandIn, api_keys: ApiKeys) -> None:
    """Add a key of each mode."""
    keys = [stand_in.directory.add_key(livemode=is_live) for is_live in (True, False)]
    api_keys.replace([Secret(key.secret) for key in keys])


@pytest.mark.parametrize(
    "url", [URL, f"{URL}/acme", f"{URL}?x=1", "http://127.0.0.1:8000/below/webhooks/stripe"]
)
async def test_nothing_is_wrong(url: str, stand_in: StripeStandIn, api: StripeApi) -> None:
    """One snapshot and one thin destination with all types, own and connected, are fine."""
    stand_in.subscribe(url)
    stand_in.subscribe(url, payload="thin", own=True, accounts=True)
    assert await examined(api, stripe_accounts=("acct_1",)) == []


async def test_a_long_url_is_read_at_once(stand_in: StripeStandIn, api: StripeApi) -> None:
    """With a time that grows with the square of its length the test would time out."""
    stand_in.subscribe("https://" + "h" * 500_000)
    assert await names(api) == ["endpoint_missing"]


@pytest.mark.parametrize(
    ("destinations", "expected"),
    [
        ([], ["endpoint_missing"]),
        ([{"url": "https://hooks.test/other"}], ["endpoint_missing"]),
        ([{"url": f"{URL}/a/b"}], ["endpoint_missing"]),
        ([{"url": f"{URL}s"}], ["endpoint_missing"]),
        ([{"url": None}], ["endpoint_missing"]),
        ([{"events": ["charge.succeeded"]}], ["endpoint_missing"]),
        ([{"events": THIN}], ["endpoint_missing"]),
        ([{"is_enabled": False}], ["endpoint_disabled"]),
        ([{"is_enabled": False}, {"events": SNAPSHOT[1:]}], ["endpoint_disabled"]),
        ([{"is_enabled": False}, {}], []),
        ([{"is_enabled": False}, {"payload": "thin"}], []),
        ([{"is_enabled": False}, {"accounts": True, "own": False}], ["endpoint_disabled"]),
        ([{}, {}], ["endpoint_duplicate"]),
        ([{}, {"url": f"{URL}/b"}], []),
        ([{}, {"accounts": True, "own": False}], []),
        ([{"events": SNAPSHOT[:3]}, {"events": SNAPSHOT[3:]}], []),
        ([{"payload": "thin"}, {"payload": "thin"}], ["endpoint_duplicate"]),
        ([{"events": ["*"]}], ["wildcard_selected"]),
        ([{"events": ["*"]}, {"events": SNAPSHOT[3:4]}], []),
        ([{"events": ["*", SNAPSHOT[3]]}], []),
        ([{"events": ["*"], "payload": "thin"}], ["wildcard_selected"]),
        ([{"events": SNAPSHOT[4:]}], ["redacted_not_selected"]),
        ([{"events": SNAPSHOT[4:]}, {"events": THIN, "payload": "thin"}], []),
        ([{"accounts": True, "own": False, "events": SNAPSHOT[4:]}, {}], ["redacted_not_selected"]),
    ],
)
async def test_what_is_wrong(
    destinations: Sequence[Mapping[str, Any]],
    expected: list[str],
    stand_in: StripeStandIn,
    api: StripeApi,
) -> None:
    """Each problem is found once, and nothing is found where there is none."""
    for fields in destinations:
        stand_in.subscribe(**{"url": URL, **fields})
    found = await examined(api)
    assert [one.name for one in found] == expected
    for one in found:
        assert one.severity is Severity.WARNING
        assert one.promises == (Promise.COMPLETE,)
        assert one.meaning.startswith("test mode: ")
        assert one.meaning.endswith("in Stripe's Dashboard under Workbench > Webhooks")


async def test_connected_accounts_need_a_destination(
    stand_in: StripeStandIn, api: StripeApi
) -> None:
    """Where connected accounts are configured, some destination must get their events."""
    stand_in.subscribe(URL)
    assert await names(api, stripe_accounts=("acct_1",)) == ["connect_missing"]
    stand_in.subscribe(URL, accounts=True, own=False)
    assert await names(api, stripe_accounts=("acct_1",)) == []


async def test_thin_events_need_a_key_of_their_mode(
    live: StripeStandIn, api: StripeApi, api_keys: ApiKeys
) -> None:
    """A live destination of connected accounts sends their test events too."""
    live.subscribe(URL, scope=live.scope(livemode=True), payload="thin", accounts=True)
    assert await names(api) == ["thin_without_key"]
    assert await names(api, livemode=Livemode.LIVE) == []
    both_keys(live, api_keys)
    assert await names(api) == ["endpoint_missing"]


async def test_a_destination_of_the_excluded_mode_is_found(
    live: StripeStandIn, api: StripeApi, api_keys: ApiKeys
) -> None:
    """Of the mode that LIVEMODE excludes, only what comes here nevertheless matters."""
    both_keys(live, api_keys)
    live.subscribe(URL, scope=live.scope(livemode=True))
    assert await names(api, livemode=Livemode.LIVE) == []
    test = live.subscribe(URL, events=["*"])
    [one] = await examined(api, livemode=Livemode.LIVE)
    assert one.name == "livemode_differs"
    assert one.meaning.startswith(f"test mode: {test.id} sends here what LIVEMODE=live ignores")


@pytest.mark.parametrize(
    ("missing", "severity", "meaning"),
    [
        (Permission.EVENTS_READ, Severity.FATAL, "may not read events: neither thin events nor"),
        (Permission.WEBHOOKS_READ, Severity.WARNING, "may not read webhook endpoints: whether"),
    ],
)
async def test_a_permission_is_missing(
    *,
    missing: Permission,
    severity: Severity,
    meaning: str,
    stand_in: StripeStandIn,
    api: StripeApi,
    api_keys: ApiKeys,
) -> None:
    """What the key may not read is said, with what it costs; nothing else is concluded."""
    key = stand_in.directory.add_key(permissions=READ_ONLY - {missing})
    api_keys.replace([Secret(key.secret)])
    first, *_ = await examined(api)
    assert (first.name, first.severity) == ("stripe_api", severity)
    assert meaning in first.meaning
    assert first.meaning.endswith("in Stripe's Dashboard under Developers > API keys")
    assert await names(api) in (["stripe_api"], ["stripe_api", "stripe_api"])


@pytest.mark.parametrize(
    ("fault", "severity", "meaning"),
    [
        (Fault(kind="answer", status=401), Severity.FATAL, "Stripe rejects the key"),
        (Fault(kind="answer", status=404), Severity.WARNING, "STRIPE_API_BASE is not"),
        (Fault(kind="answer", status=302), Severity.WARNING, "what answers at STRIPE_API_BASE"),
        (Fault(kind="cut"), Severity.WARNING, "Stripe's API does not answer"),
        (too_many_requests(), Severity.WARNING, "Stripe's API refuses requests as too many"),
    ],
    ids=["401", "404", "302", "cut", "429"],
)
async def test_a_failing_api_is_one_finding(
    fault: Fault, severity: Severity, meaning: str, stand_in: StripeStandIn, api: StripeApi
) -> None:
    """An API error is a finding, and no exception."""
    stand_in.faults.add(fault)
    [one] = await examined(api)
    assert (one.name, one.severity) == ("stripe_api", severity)
    assert one.meaning.startswith(f"test mode: {meaning}")


ENDPOINT = {
    "object": "webhook_endpoint",
    "id": "we_1",
    "url": URL,
    "status": "enabled",
    "enabled_events": SNAPSHOT,
}


@pytest.mark.parametrize(
    "answered",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"data": null}',
        {"data": [ENDPOINT | {"object": "charge"}]},
        {"data": [ENDPOINT | {"id": f"we_{CANARY} x"}]},
        {"data": [ENDPOINT | {"id": "we_1\n"}]},
        {"data": [ENDPOINT | {"enabled_events": CANARY}]},
    ],
    ids=range(9),
)
async def test_an_answer_must_be_a_list_of_destinations(
    answered: bytes | dict[str, Any], stand_in: StripeStandIn, api: StripeApi
) -> None:
    """Anything else is unexpected, and nothing of it is repeated."""
    body = answered if isinstance(answered, bytes) else orjson.dumps(answered)
    stand_in.faults.add(answer(body, path="/v1/webhook_endpoints"))
    [one] = await examined(api)
    assert one.meaning.startswith("test mode: what answers at STRIPE_API_BASE is not Stripe's API")
    assert CANARY not in str(one)


async def test_the_selected_types_are_read(stand_in: StripeStandIn, api: StripeApi) -> None:
    """They are those of all destinations, disabled or not; all types where none is known."""

    async def selected(*, connected: bool = False) -> Sequence[str]:
        [found] = await survey_all(api, Priority.FETCH)
        return found.selected_types(connected=connected)

    assert await selected() == ALL_TYPES
    stand_in.subscribe(URL, events=SNAPSHOT[4:5], is_enabled=False)
    stand_in.subscribe(URL, events=[*THIN[5:], "v1.other"], payload="thin")
    assert {*await selected()} == {*SNAPSHOT[4:]}
    assert await selected(connected=True) == ALL_TYPES
    stand_in.subscribe(URL, events=["*"], accounts=True, own=False)
    assert {*await selected(connected=True)} == {*SNAPSHOT} - {SNAPSHOT[3]}
    stand_in.faults.add(Fault(kind="answer", status=403, path="/v2/core/event_destinations"))
    assert await selected() == ALL_TYPES


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def severities() -> dict[str, float]:
    """Return what is exported of each finding."""
    [family] = metrics.STRIPE_FINDING_SEVERITY.collect()
    return {one.labels["finding"]: one.value for one in family.samples if one.value}


async def test_the_watch_looks_now_and_then(stand_in: StripeStandIn, api: StripeApi) -> None:
    """It looks every five minutes, logs what is new, and exports what is wrong now.

    What it cannot see is selected as it was.
    """
    clock, caller = Clock(), Caller(is_live=False)
    watch = EndpointWatch(SETTINGS, clock)
    stand_in.subscribe(URL, events=SNAPSHOT[4:])

    async def passes() -> list[str]:
        with capture_logs() as lines:
            for _ in range(3):
                await watch.select_types(api, caller)
        return [one["finding"] for one in lines if one["event"] == "stripe.finding"]

    assert await passes() == ["redacted_not_selected"]
    assert severities() == {"redacted_not_selected": 1}
    asked = len(stand_in.requests)
    stand_in.directory._keys.clear()
    clock.now = LOOK_EVERY_S - 1
    assert await passes() == []
    assert len(stand_in.requests) == asked
    clock.now = LOOK_EVERY_S
    assert await passes() == ["stripe_api"]
    assert severities() == {"stripe_api": 2}
    assert await watch.select_types(api, caller) == SNAPSHOT[4:]
    watch.forget()
    assert severities() == {}
    assert await passes() == ["stripe_api"]
    watch.forget()


async def test_a_look_that_redis_prevents_is_made_up_for(
    stand_in: StripeStandIn, api: StripeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, types that no destination selects would be read for five minutes."""
    watch, caller = EndpointWatch(SETTINGS, Clock()), Caller(is_live=False)
    stand_in.subscribe(URL, events=SNAPSHOT[4:5])
    with monkeypatch.context() as patch:
        away = mock.AsyncMock(side_effect=Unavailable(UnavailableReason.REDIS_UNREACHABLE))
        patch.setattr(api, "get", away)
        with pytest.raises(Unavailable):
            await watch.select_types(api, caller)

    assert await watch.select_types(api, caller) == SNAPSHOT[4:5]
    watch.forget()
