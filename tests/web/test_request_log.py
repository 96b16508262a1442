"""What is logged and counted of each request: one line, with allowed fields only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from service.config import Livemode, Settings
from service.errors import Rejected, RejectionReason, Unavailable, UnavailableReason
from service.inbox import request_log
from service.inbox.decision_log import recent_reversals
from service.secret import Secret
from service.storage.connections import connect
from service.stripe.signatures import fingerprint
from service.telemetry import metrics
from service.transitions.transition import SELFTEST_PREFIX
from tests.support.apps import webhook_app
from tests.support.harness import (
    NOW,
    SECRET,
    WEBHOOK,
    event,
    signed,
    thin_event,
)
from tests.support.web_client import (
    PING,
    TWO_ENDPOINTS,
    Log,
    OpenApp,
    asgi_client,
    assert_response,
    counted,
    post_event,
    sample,
)

DAY_S = 86_400
TRACE = "00-" + "a1" * 16 + "-00f067aa0ba902b7-01"


async def test_only_admitted_or_known_events_count_as_events(open_app: OpenApp) -> None:
    """What is ignored, rejected, unavailable or a self-test does not move the last event's time."""
    metrics.LAST_EVENT.set(0)
    other = [
        PING,
        thin_event(),
        event("customer.created"),
        event(session="vs_selftest_1", id="evt_selftest"),
        b"[]",
        event(envelope={"livemode": True}),
    ]
    async with open_app(livemode=Livemode.TEST) as client:
        for body in other:
            await post_event(client, body)
        await asyncio.sleep(0)
        assert sample("idv_last_event_timestamp_seconds") == 0
        for _ in range(2):
            metrics.LAST_EVENT.set(0)
            await post_event(client, event())
            await asyncio.sleep(0)
            assert sample("idv_last_event_timestamp_seconds") >= NOW


async def test_what_is_alerted_on_is_counted_from_zero(open_app: OpenApp) -> None:
    """Each series exists before its first event: Prometheus sees increases only."""
    async with open_app():
        counted = metrics.exposition().decode()
    for word in (*RejectionReason, *UnavailableReason):
        assert f'idv_events_total{{outcome="{word}",type="other"}}' in counted
    assert 'idv_events_total{outcome="ignored",type="verified"}' in counted


async def test_an_invalid_field_that_is_not_needed_costs_no_event(
    open_app: OpenApp, log: Log
) -> None:
    """A field that cannot be read is skipped, counted, and logged by its path."""
    before = sample("idv_skipped_fields_total")
    async with open_app() as client:
        assert_response(await post_event(client, event(options="canary")), 200, outcome="admitted")
        assert_response(await post_event(client, event(id="evt_2")), 200, outcome="unchanged")
    assert sample("idv_skipped_fields_total") == before + 1
    assert [line.get("skipped_fields") for line in log.lines] == [("data.object.options",), None]
    assert "canary" not in str(log.lines)


REQUEST_IDS: dict[str, tuple[list[tuple[str, str | bytes]], str | None]] = {
    "given": ([("X-Request-Id", "0A1b2c3d-4e5f")], "0A1b2c3d-4e5f"),
    "traced": ([("traceparent", TRACE)], "a1" * 16),
    "both": ([("traceparent", TRACE), ("X-Request-Id", "0A1b2c3d-4e5f")], "0A1b2c3d-4e5f"),
    "both, other order": (
        [("X-Request-Id", "0A1b2c3d-4e5f"), ("traceparent", TRACE)],
        "0A1b2c3d-4e5f",
    ),
    "made": ([], None),
    "too short": ([("X-Request-Id", "abc")], None),
    "too long": ([("X-Request-Id", "a" * 65)], None),
    "hostile": ([("X-Request-Id", '"}\t<script>${jndi:ldap}')], None),
    "not ASCII": ([("X-Request-Id", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8")], None),
    "hostile trace": ([("traceparent", TRACE.replace("a1", "zz"))], None),
    "long trace": ([("traceparent", TRACE + "-" + "x" * 4000)], None),
}


@pytest.mark.parametrize(("headers", "logged"), REQUEST_IDS.values(), ids=REQUEST_IDS)
async def test_every_line_names_its_request(
    open_app: OpenApp, log: Log, headers: list[tuple[str, Any]], logged: str | None
) -> None:
    """A valid X-Request-Id or traceparent is logged; otherwise an id of our own."""
    all_headers: Any = [*signed(event()).items(), *headers]
    async with open_app() as client:
        await client.post(WEBHOOK, content=event(), headers=all_headers)
    [line] = log.lines
    if logged is None:
        assert len(line["request_id"]) == 16
        assert set(line["request_id"]) <= set("0123456789abcdef")
    else:
        assert line["request_id"] == logged


# The body, and what its line says: its name, the status before and after, or the status that stays
# and the one that is ignored, and whether it was created after a final status.
LINES: list[tuple[bytes, tuple[object, ...]]] = [
    (event(created=NOW - 60), ("admitted", None, "requires_input", "-", "-", False)),
    (
        event("processing", id="evt_2", status="processing"),
        ("admitted", "requires_input", "processing", "-", "-", False),
    ),
    (
        event(id="evt_3", created=NOW - 30),
        ("late", "-", "-", "processing", "requires_input", False),
    ),
    (
        event("processing", id="evt_4", status="processing", created=NOW + 1),
        ("unchanged", "-", "-", "processing", "-", False),
    ),
    (
        event("verified", id="evt_5", status="verified", created=NOW + 20),
        ("admitted", "processing", "verified", "-", "-", False),
    ),
    (
        event("processing", id="evt_6", status="processing", created=NOW + 60),
        ("late", "-", "-", "verified", "processing", True),
    ),
    (event(created=NOW - 60), ("duplicate", "-", "-", None, "requires_input", False)),
    (
        event(id="evt_7", session="vs_old", created=NOW - 99 * DAY_S),
        ("expired", "-", "-", None, "requires_input", False),
    ),
    (PING, ("ignored", "-", "-", "-", "-", "-")),
    (b"[]", ("rejected", "-", "-", "-", "-", "-")),
]


async def test_one_line_for_each_delivery(open_app: OpenApp, log: Log) -> None:
    """Each request has one line, named after its outcome, with allowed fields only."""
    async with open_app() as client:
        for body, _ in LINES:
            await post_event(client, body)
    async with open_app(stream_max_entries=1) as client:
        full = event("redacted", id="evt_8", status="verified", created=NOW + 90)
        await post_event(client, full)
    words = ("event", "previous", "current", "status", "ignored_status", "after_final")
    assert [tuple(line.get(word, "-") for word in words) for line in log.lines] == [
        *((f"event.{name}", *said) for _, (name, *said) in LINES),
        ("event.unavailable", "-", "-", "-", "-", "-"),
    ]
    allowed = {
        "event", "event_id", "event_type", "session_id", "previous", "current", "reversal",
        "status", "ignored_status", "sequence", "endpoint", "last_error_code",
        "redaction_status", "report_id", "livemode", "account", "reason",
        "field", "after_final", "secret_fingerprint", "duration_ms", "body_bytes",
        "request_id",
    }  # fmt: skip
    assert all(line.keys() <= allowed for line in log.lines)
    # A rejection, and what is late although it was created after a final status.
    assert sorted(log.warned) == ["event.late", "event.rejected"]


async def test_a_line_for_each_thin_event(open_app: OpenApp, log: Log) -> None:
    """Queued or not, a thin event has one line; it counts as an event of its type and age."""
    metrics.LAST_EVENT.set(0)
    body = thin_event("verified", context="acct_1", created=NOW - 7)
    before = counted("queued", "verified"), sample("idv_event_age_seconds_count")
    keys = (Secret("sk_test_x"),)
    async with open_app(stripe_api_key=keys, secrets=TWO_ENDPOINTS) as client:
        for path in (f"{WEBHOOK}/acme", WEBHOOK):
            await post_event(client, body, path=path)
        await post_event(client, thin_event(id="evt_old", created=NOW - 99 * DAY_S))
    assert [(line["event"], line["endpoint"]) for line in log.lines] == [
        ("event.queued", "acme"),
        ("event.duplicate", None),
        ("event.expired", None),
    ]
    line = log.lines[0]
    of_request = {name: line.pop(name) for name in ("request_id", "duration_ms", "body_bytes")}
    assert all(of_request.values())
    assert line == {
        "event": "event.queued",
        "event_id": "evt_thin_1",
        "event_type": "v1.identity.verification_session.verified",
        "session_id": "vs_1",
        "livemode": False,
        "context": "acct_1",
        "endpoint": "acme",
        "secret_fingerprint": fingerprint(SECRET),
    }
    assert sample("idv_last_event_timestamp_seconds") >= NOW
    after = counted("queued", "verified"), sample("idv_event_age_seconds_count")
    assert (after[0] - before[0], after[1] - before[1]) == (1, 3)


@pytest.mark.parametrize("make", [event, thin_event])
async def test_a_session_of_the_other_mode_is_named(
    open_app: OpenApp, log: Log, make: Callable[..., bytes]
) -> None:
    """The log is all that knows of it; other events that are ignored have no session."""
    async with open_app(livemode=Livemode.LIVE) as client:
        for body in (make("verified"), PING):
            await post_event(client, body)

    lines = [(line["reason"], line.get("session_id")) for line in log.lines]
    assert lines == [("livemode", "vs_1"), ("thin", None)]


async def test_a_reversal_is_a_warning_and_counted(open_app: OpenApp, log: Log) -> None:
    """A verification that staff revoke is a warning; one that they grant is not."""
    before = sample("idv_reversals_total")
    async with open_app() as client:
        await post_event(client, event("verified", status="verified"))
        await post_event(client, event("requires_input", id="evt_2", created=NOW + 100))
        await post_event(
            client, event("verified", id="evt_3", status="verified", created=NOW + 200)
        )
    assert [line["reversal"] for line in log.lines] == [False, True, False]
    assert log.warned == ["event.admitted"]
    assert sample("idv_reversals_total") == before + 1


async def test_what_a_selftest_does_alerts_no_one(open_app: OpenApp, log: Log) -> None:
    """Its reversals are no person's, and its expired event is no loss."""
    before = sample("idv_reversals_total"), counted("expired", "created"), len(recent_reversals)
    session = f"{SELFTEST_PREFIX}1"
    async with open_app() as client:
        await post_event(client, event("verified", status="verified", session=session))
        await post_event(
            client, event("requires_input", id="evt_2", created=NOW + 100, session=session)
        )
        old = event(id="evt_3", created=NOW - 99 * DAY_S, session=session)
        assert_response(await post_event(client, old), 200, outcome="expired")
    after = sample("idv_reversals_total"), counted("expired", "created"), len(recent_reversals)
    assert (after, log.warned) == (before, [])
    assert counted("selftest", "created") == 1


@pytest.mark.parametrize("broken", ["log", "metrics"])
async def test_a_failing_log_costs_no_response(
    open_app: OpenApp, monkeypatch: pytest.MonkeyPatch, log: Log, broken: str
) -> None:
    """A full disk or a broken metric changes no response and raises nothing."""
    async with open_app() as client:
        if broken == "log":
            for method in ("info", "warning", "error"):
                monkeypatch.setattr(log, method, _broken)
        else:
            monkeypatch.setattr(metrics.EVENTS, "labels", _broken)
        assert_response(await post_event(client, event()), 200, outcome="admitted")
        assert_response(await post_event(client, b"["), 400, error="body_not_json")


def _broken(*_: object, **__: object) -> None:
    raise BrokenPipeError


# Signed by the test: a signature made before all tests may be too old when they run.
Sign = Callable[[bytes], dict[str, str]]
REFUSED: dict[str, tuple[bytes, Sign, str]] = {
    "forged": (event(), lambda body: signed(body, Secret(b"whsec_other")), "signature_mismatch"),
    "too large": (b"x" * 1025, lambda _: {}, "body_too_large"),
    "not JSON": (b"[", signed, "body_not_json"),
    "Redis gone": (event(), signed, "redis_unreachable"),
}


@pytest.mark.parametrize(("body", "sign", "reason"), REFUSED.values(), ids=REFUSED)
async def test_a_rejection_keeps_nothing_of_the_body(
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    body: bytes,
    sign: Sign,
    reason: str,
) -> None:
    """An error is kept until its line is written: it must not keep frames with the body alive."""
    noted: list[request_log.AnsweredRequest] = []
    monkeypatch.setattr(request_log.RequestLog, "add", lambda _, request: noted.append(request))
    url = Secret("unix:///nowhere.sock")
    settings = make_settings(max_body_bytes=1024, admit_deadline_s=0.1, redis_url=url)
    async with connect(url) as nowhere, asgi_client(webhook_app(nowhere, settings)[0]) as client:
        await post_event(client, body, sign(body))
    [request] = noted
    error = request.result
    assert isinstance(error, Rejected | Unavailable)
    assert error.reason == reason
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)
