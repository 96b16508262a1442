"""The HTTP contract: each outcome and fault has its response, and no client causes a 5xx."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2
import pytest

from service import cancellation
from service.admin.app import AdminApp
from service.config import Settings
from service.errors import Unavailable, UnavailableReason
from service.inbox.receiver import Receipt
from service.parsers import parse_network
from service.secret import Secret
from service.storage.connections import Connections
from service.storage.health import Health
from service.storage.keys import Keys
from service.telemetry import metrics
from service.web.allow_list import AllowList
from service.web.app import create_app
from tests.support.apps import webhook_app
from tests.support.harness import (
    NOW,
    SECRET,
    WEBHOOK,
    connected,
    event,
    listening,
    request,
    signed,
    talk,
    thin_event,
)
from tests.support.waiting import DEADLINE_S, until
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
    signature,
)

DAY_S = 86_400


API_KEYS = (Secret("sk_live_tests"), Secret("sk_test_tests"))
OUTCOMES: dict[str, tuple[list[bytes], bytes, str]] = {
    "new": ([], event(), "admitted"),
    "same id, other bytes": ([event()], event(envelope={"pending_webhooks": 3}), "duplicate"),
    "older": (
        [event("processing", status="processing", created=NOW)],
        event(id="evt_2", created=NOW - 5),
        "late",
    ),
    "beyond the horizon": ([], event(created=NOW - 36 * DAY_S), "expired"),
    "nothing changed": ([event(created=NOW)], event(id="evt_2", created=NOW + 1), "unchanged"),
    "another type": ([], event("customer.created"), "ignored"),
    "a thin event": ([], thin_event(), "queued"),
    "a thin event again": ([thin_event()], thin_event(), "duplicate"),
    "a thin event beyond the horizon": ([], thin_event(created=NOW - 36 * DAY_S), "expired"),
    "a thin event of another type": ([], PING, "ignored"),
}


@pytest.mark.parametrize(("before", "body", "outcome"), OUTCOMES.values(), ids=OUTCOMES)
async def test_each_outcome_is_a_200(
    open_app: OpenApp, before: list[bytes], body: bytes, outcome: str
) -> None:
    """A genuine event is answered 200 with one word for what became of it."""
    async with open_app(stripe_api_key=API_KEYS) as client:
        for earlier in before:
            await post_event(client, earlier)
        assert_response(await post_event(client, body), 200, outcome=outcome)


OTHER = Secret(b"whsec_other")
# Functions, since a signature holds the time it was made.
SIGNATURES: dict[str, tuple[Callable[[], str | bytes | None], str]] = {
    "none": (lambda: None, "signature_missing"),
    "no timestamp": (lambda: signature().split(",")[1], "signature_malformed"),
    "not ASCII": (lambda: b"t=\xff\xfe,v1=\x80\x81", "signature_malformed"),
    "another secret": (lambda: signature(secret=OTHER), "signature_mismatch"),
    "too old": (lambda: signature(age_s=900), "timestamp_too_old"),
    "too new": (lambda: signature(age_s=-900), "timestamp_too_new"),
}


@pytest.mark.parametrize(("header", "word"), SIGNATURES.values(), ids=SIGNATURES)
async def test_each_fault_of_a_signature_is_a_400(
    open_app: OpenApp, header: Callable[[], str | bytes | None], word: str
) -> None:
    """A request that is unsigned, forged or outside the tolerance is rejected."""
    sent = header()
    headers: Any = {} if sent is None else [("Stripe-Signature", sent)]
    async with open_app() as client:
        response = await client.post(WEBHOOK, content=b"{}", headers=headers)
    assert_response(response, 400, error=word)


@pytest.mark.parametrize(
    "word", ["canceled", "created", "processing", "redacted", "requires_input", "verified"]
)
async def test_a_thin_event_without_an_api_key_is_a_503(
    open_app: OpenApp, log: Log, word: str
) -> None:
    """Without a key of its mode it cannot be fetched: 503, with its reason in log and metric."""
    before = counted("api_key_missing")
    async with open_app(stripe_api_key=API_KEYS[:1]) as client:
        assert_response(await post_event(client, thin_event(word)), 503, error="unavailable")
    assert [(line["event"], line["reason"]) for line in log.lines] == [
        ("event.unavailable", "api_key_missing")
    ]
    assert counted("api_key_missing") == before + 1


async def test_a_signature_in_two_lines_is_joined(open_app: OpenApp) -> None:
    """Header lines of one name mean the same as joined by a comma."""
    body = event()
    timestamp, _, v1 = signature(body).partition(",")
    async with open_app() as client:
        response = await client.post(
            WEBHOOK,
            content=body,
            headers=[("Stripe-Signature", timestamp), ("Stripe-Signature", v1)],
        )
    assert_response(response, 200, outcome="admitted")


FAULTS: dict[str, tuple[bytes, str, str | None]] = {
    "not JSON": (b'{"id": "\xff\xfe"}', "body_not_json", None),
    "no event": (b"[]", "body_not_an_event", None),
    "no type": (b"{}", "field_missing", "type"),
    "no session id": (event(envelope={"data": {"object": {}}}), "field_missing", "data.object.id"),
    "hostile id": (event(id="evt_{0}:x"), "field_mistyped", "id"),
}


@pytest.mark.parametrize(("body", "word", "field"), FAULTS.values(), ids=FAULTS)
async def test_each_fault_of_a_genuine_body_is_a_400(
    open_app: OpenApp, body: bytes, word: str, field: str | None
) -> None:
    """A genuine but unusable body is rejected with a reason and a path, never a value."""
    said = {"error": word} | ({"field": field} if field else {})
    async with open_app() as client:
        assert_response(await post_event(client, body), 400, **said)


# Both routes: the default endpoint, reached directly, and a named one, by way of Starlette.
ROUTES = (WEBHOOK, WEBHOOK + "/acme")
both_routes = pytest.mark.parametrize("path", ROUTES)


@both_routes
async def test_a_body_over_the_limit_is_a_413(open_app: OpenApp, path: str) -> None:
    """A body of MAX_BODY_BYTES is read, one byte more is a 413, signed or not."""
    body = event().ljust(1024)
    more = body + b" "
    async with open_app(max_body_bytes=1024, secrets=TWO_ENDPOINTS) as client:
        assert_response(await post_event(client, body, path=path), 200, outcome="admitted")
        assert_response(await post_event(client, more, path=path), 413, error="body_too_large")
        assert_response(await post_event(client, more, {}, path=path), 413, error="body_too_large")


async def call(
    app: Any,
    *messages: dict[str, Any],
    headers: Sequence[tuple[bytes, bytes]] = (),
    on_send: Callable[[], Awaitable[None]] | None = None,
) -> list[Any]:
    """Call *app* with a crafted scope; return the messages it sends."""
    sent: list[Any] = []
    queue = list(messages)

    async def receive() -> dict[str, Any]:
        return queue.pop(0)

    async def send(message: Any) -> None:
        if on_send is not None:
            await on_send()
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": WEBHOOK,
        "root_path": "",
        "query_string": b"",
        "headers": [*headers],
    }
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize(
    "length",
    [b"-1", b"+2", b" 2", b"1_0", b"x", b"", b"\xb2", "٢".encode(), b"2, 2"],
)  # fmt: skip
async def test_an_invalid_content_length_is_ignored(
    connections: Connections, settings: Settings, length: bytes
) -> None:
    """A Content-Length that is no number is ignored: the received bytes are counted."""
    app, _ = webhook_app(connections, settings)
    body = event()
    sent = await call(
        app,
        {"type": "http.request", "body": body},
        headers=[(b"content-length", length), (b"stripe-signature", signature(body).encode())],
    )
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("length", [b"262145", b"9" * 19, b"9" * 20, b"9" * 21, b"9" * 10_000])
async def test_a_declared_length_is_enough_for_a_413(
    connections: Connections, settings: Settings, length: bytes
) -> None:
    """A body that is declared too large is rejected before a byte of it is read."""
    app, _ = webhook_app(connections, settings)
    sent = await call(app, headers=[(b"content-length", length)])
    assert sent[0]["status"] == 413


async def test_chunks_are_counted(connections: Connections, settings: Settings) -> None:
    """A body without a length is rejected as soon as its chunks exceed the limit."""
    app, _ = webhook_app(connections, settings)
    chunk = {"type": "http.request", "body": b" " * 131_072, "more_body": True}
    sent = await call(app, chunk, chunk, {**chunk, "body": b" "})
    assert (sent[0]["status"], sent[1]["body"]) == (413, b'{"error":"body_too_large"}')


async def test_a_client_may_disconnect(
    connections: Connections, settings: Settings, log: Log
) -> None:
    """A client that disconnects in mid-body is counted, and not logged."""
    app, _ = webhook_app(connections, settings)
    before = counted("client_left")
    async with listening(app) as listener:
        async with connected(listener.port) as (_, writer):
            writer.write(request(event(), signed(event()))[:-20])
            await writer.drain()
        await until(lambda: counted("client_left") == before + 1)
        assert (await talk(listener.port, request(event(), signed(event()))))[:15].endswith(
            b"200 OK"
        )
    assert [line["event"] for line in log.lines] == ["event.admitted"]


async def test_endpoints_have_their_own_secrets(open_app: OpenApp, log: Log) -> None:
    """Each accepts its own secrets only; during rotation, any of them. The log says which it is."""
    old, new, acme = Secret(b"whsec_old"), Secret(b"whsec_new"), Secret(b"whsec_acme")
    async with open_app(secrets={"": (old, new), "acme": (acme,)}) as client:
        attempts = [
            (path, secret, await client.post(path, content=b"{}", headers=signed(b"{}", secret)))
            for path in (WEBHOOK, WEBHOOK + "/acme", WEBHOOK + "/ACME")
            for secret in (old, new, acme)
        ]
    for path, secret, response in attempts:
        own = (secret is acme) == (path != WEBHOOK)
        error = "field_missing" if own else "signature_of_other_endpoint"
        assert (response.status_code, response.json()["error"]) == (400, error)
    assert [line["endpoint"] for line in log.lines] == [None] * 3 + ["acme"] * 6


# Likely mistakes in the URL that was configured at Stripe.
WRONG_PATHS = {
    "/webhooks/stripe/": "trailing_slash",
    "/webhooks/stripe//": "trailing_slash",
    "/webhooks/stripe/acme/": "trailing_slash",
    "/webhooks/stripe/canary-66600666/": "trailing_slash",
    "/webhooks/stripe/canary-66600666": "endpoint_unknown",
    "/webhooks/stripe/acme/canary-66600666": "endpoint_unknown",
    "/webhooks/stripe/%00": "endpoint_unknown",
    "/webhooks/stripe/%2e%2e": "endpoint_unknown",
}


@pytest.mark.parametrize("path", WRONG_PATHS)
async def test_a_wrong_url_at_stripe_is_named(open_app: OpenApp, log: Log, path: str) -> None:
    """A path below ours has a reason, a log line and a count, none of which repeats the path."""
    word = WRONG_PATHS[path]
    before = counted(word)
    async with open_app(secrets=TWO_ENDPOINTS) as client:
        url = httpx2.URL("http://tests", raw_path=path.encode())
        response = await client.post(url, content=event(), headers=signed(event()))
    assert_response(response, 404, error=word)
    [line] = log.lines
    assert (line["event"], line["reason"], line["body_bytes"]) == ("event.rejected", word, 0)
    assert line["endpoint"] is None
    assert "canary" not in str(line)
    assert counted(word) == before + 1


async def test_without_a_default_endpoint_its_path_is_a_404(open_app: OpenApp) -> None:
    """If only named endpoints have secrets, the bare path is unknown."""
    async with open_app(secrets={"acme": (SECRET,)}) as client:
        assert_response(await post_event(client, event()), 404, error="endpoint_unknown")


class Held:
    """A receiver that keeps every request in flight until it is released."""

    def __init__(self) -> None:
        self.waiting = 0
        self.release = asyncio.Event()

    async def receive(self, *_: object, **__: object) -> Receipt:
        """Wait, then fail as if Redis were unreachable."""
        self.waiting += 1
        await self.release.wait()
        raise Unavailable(UnavailableReason.REDIS_UNREACHABLE)


@both_routes
async def test_too_many_in_flight_are_a_503_at_once(
    connections: Connections, make_settings: Callable[..., Settings], path: str
) -> None:
    """Above MAX_IN_FLIGHT a request is answered 503 at once; those in flight go on."""
    held: Any = Held()
    settings = make_settings(max_in_flight=2, secrets=TWO_ENDPOINTS)
    app = create_app(held, Health(connections, settings), settings)
    async with (
        asgi_client(app) as client,
        asyncio.timeout(DEADLINE_S),
        asyncio.TaskGroup() as tasks,
    ):
        for route in ROUTES:
            tasks.create_task(post_event(client, event(), path=route))
        await until(lambda: held.waiting == 2)
        assert sample("idv_requests_in_flight") == 2
        assert_response(await post_event(client, event(), path=path), 503, error="unavailable")
        assert held.waiting == 2
        held.release.set()
    assert sample("idv_requests_in_flight") == 0


async def test_incomplete_requests_take_no_slots(
    connections: Connections, make_settings: Callable[..., Settings]
) -> None:
    """A request is in flight when it is whole: slow clients delay no others."""
    app, _ = webhook_app(connections, make_settings(max_in_flight=1))
    body = event()
    half = f"POST {WEBHOOK} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf".encode()
    async with listening(app) as listener, contextlib.AsyncExitStack() as slow:
        for _ in range(20):
            _, writer = await slow.enter_async_context(connected(listener.port))
            writer.write(half)
        said = await talk(listener.port, request(body, signed(body)))
    assert said.startswith(b"HTTP/1.1 200 ")


async def test_a_cancelled_request_is_a_503(connections: Connections, settings: Settings) -> None:
    """When the grace time of a shutdown is over, requests in flight get a 503, not a 500."""
    held: Any = Held()
    app = create_app(held, Health(connections, settings), settings)
    async with asgi_client(app) as client:
        asked = asyncio.create_task(post_event(client, event()))
        await until(lambda: held.waiting)
        asked.cancel()
        assert_response(await asked, 503, error="unavailable")


@both_routes
async def test_only_allowed_networks_may_come_in(
    connections: Connections, make_settings: Callable[..., Settings], log: Log, path: str
) -> None:
    """Other networks get a 403 unread, logged without the address; probes are open."""
    settings = make_settings(secrets=TWO_ENDPOINTS)
    allow_list = AllowList([parse_network("3.18.12.63")], proxies=[parse_network("127.0.0.1")])
    app, _ = webhook_app(connections, settings, allow_list)
    body = event()
    async with asgi_client(app) as client:
        for forwarded in ({}, {"X-Forwarded-For": "3.18.12.63, 6.6.6.6"}):
            answered = await post_event(client, body, signed(body) | forwarded, path=path)
            assert_response(answered, 403, error="source_not_allowed")
        from_stripe = signed(body) | {"X-Forwarded-For": "6.6.6.6, 3.18.12.63"}
        answered = await post_event(client, body, from_stripe, path=path)
        assert_response(answered, 200, outcome="admitted")
        assert (await client.get("/livez")).status_code == 200
    assert [line.get("reason") for line in log.lines] == ["source_not_allowed"] * 2 + [None]
    assert "6.6.6.6" not in repr(log.lines)


async def test_probes_report_readiness(connections: Connections, settings: Settings) -> None:
    """Both apps answer probes without a body; draining is not ready; metrics are for admins."""
    health = Health(connections, settings)
    watching = asyncio.create_task(health.watch())
    held: Any = Held()
    app = create_app(held, health, settings)
    for one in (app, AdminApp(health)):
        health.is_draining = False
        await until(lambda: health.is_ready)
        async with asgi_client(one) as client:
            for path, status in (("/livez", 200), ("/readyz", 200)):
                response = await client.get(path)
                assert (response.status_code, response.content) == (status, b"")
                assert (await client.head(path)).status_code == status
                assert (await client.post(path)).status_code == 405
            health.is_draining = True
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/livez")).status_code == 200
            shown = await client.get("/metrics")
            assert shown.status_code == (404 if one is app else 200)
    assert shown.headers["content-type"] == metrics.CONTENT_TYPE
    await cancellation.cancel_and_wait(watching)


async def test_acknowledged_means_admitted(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """Before the first byte of a 200 is sent, Redis holds the event."""
    app, _ = webhook_app(connections, settings)
    body, known = event(), []

    async def look() -> None:
        known.append(await connections.client.hexists(keys.session("vs_1"), "evt_1"))

    await call(
        app,
        {"type": "http.request", "body": body},
        headers=[(b"stripe-signature", signature(body).encode())],
        on_send=look,
    )
    assert known == [True, True]
