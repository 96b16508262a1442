"""Laws of the HTTP contract: design section 2, row by row, and nothing a stranger does is a 5xx."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest

from service import cancellation
from service.config import Livemode, Settings, parse_network
from service.errors import Rejected, RejectionReason, Unavailable, UnavailableReason
from service.inbox import request_log
from service.inbox.receiver import Receipt
from service.runtime.embedded_redis import EmbeddedServer
from service.secret import Secret
from service.storage.connections import Connections, connect
from service.storage.health import Health
from service.storage.layout import Keys
from service.telemetry import metrics
from service.transitions import stream_entry
from service.web.allow_list import AllowList
from service.web.app import create_admin_app, create_app
from tests.support.apps import webhook_app
from tests.support.harness import (
    DEADLINE_S,
    NOW,
    SECRET,
    WEBHOOK,
    answer,
    connected,
    event,
    eventually,
    listening,
    request,
    rest,
    signed,
    talk,
)
from tests.support.virtual_time import push

Open = Callable[..., AbstractAsyncContextManager[httpx2.AsyncClient]]
DAY_S = 86_400


class Log:
    """Stands in for the request log's logger and keeps what was written."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.warned: list[str] = []

    def bind(self) -> Log:
        """Return what is written through."""
        return self

    def _write(self, event: str, **fields: Any) -> None:
        prepared = fields.pop("_fields", {})
        self.lines.append({"event": event, **prepared, **fields})

    def warning(self, event: str, **fields: Any) -> None:
        """Write a line that stands out."""
        self.warned.append(event)
        self._write(event, **fields)

    info = error = _write


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Record what the request log writes."""
    recorded = Log()
    monkeypatch.setattr(request_log, "log", recorded)
    return recorded


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client that calls *app* and raises what the application raises."""
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://tests") as client:
        yield client
    # The request log records what was answered when the loop turn is over.
    await asyncio.sleep(0)


@pytest.fixture
def open_app(connections: Connections, make_settings: Callable[..., Settings]) -> Open:
    """Return what opens the real application with settings that differ where a test says so."""

    @asynccontextmanager
    async def opened(**changes: Any) -> AsyncIterator[httpx2.AsyncClient]:
        app, _ = webhook_app(connections, make_settings(**changes))
        async with client_of(app) as client:
            yield client

    return opened


async def post(
    client: httpx2.AsyncClient,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    path: str = WEBHOOK,
) -> httpx2.Response:
    """Post *body*, signed unless told."""
    return await client.post(
        path, content=body, headers=signed(body) if headers is None else headers
    )


def assert_answer(response: httpx2.Response, status: int, **said: str) -> None:
    """Check an answer to the last byte: status, the JSON body, and no header but those shown."""
    assert (response.status_code, response.content) == (status, orjson.dumps(said))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(response.content)),
        **({"retry-after": "5"} if status == 503 else {}),
    }
    assert dict(response.headers) == headers


THIN = orjson.dumps(
    {"id": "evt_t", "object": "v2.core.event", "type": "v2.core.event_destination.ping"}
)
OUTCOMES: dict[str, tuple[list[bytes], bytes, str]] = {
    "new": ([], event(), "admitted"),
    "moves on": (
        [event()],
        event("processing", id="evt_2", status="processing", created=NOW + 5),
        "admitted",
    ),
    "same id": ([event()], event(), "duplicate"),
    "same id, other bytes": ([event()], event(envelope={"pending_webhooks": 3}), "duplicate"),
    "older": (
        [event("processing", status="processing", created=NOW)],
        event(id="evt_2", created=NOW - 5),
        "late",
    ),
    "after a final status": (
        [event("verified", status="verified", created=NOW - 9)],
        event("processing", id="evt_2", status="processing", created=NOW),
        "late",
    ),
    "beyond the horizon": ([], event(created=NOW - 36 * DAY_S), "expired"),
    "within the horizon": ([], event(created=NOW - 34 * DAY_S), "admitted"),
    "nothing changed": ([event(created=NOW)], event(id="evt_2", created=NOW + 1), "unchanged"),
    "another type": ([], event("customer.created"), "ignored"),
    "a ping": ([], THIN, "ignored"),
    "a thin event of another type": ([], THIN.replace(b"_destination.ping", b""), "ignored"),
}


@pytest.mark.parametrize(("before", "body", "outcome"), OUTCOMES.values(), ids=OUTCOMES)
async def test_each_outcome_is_a_200(
    open_app: Open, before: list[bytes], body: bytes, outcome: str
) -> None:
    """A genuine event is answered 200 with one word for what became of it."""
    async with open_app() as client:
        for earlier in before:
            await post(client, earlier)
        assert_answer(await post(client, body), 200, outcome=outcome)


LIVEMODES = {
    ("both", None): "admitted",
    ("both", True): "admitted",
    ("both", False): "admitted",
    ("live", None): "admitted",
    ("live", True): "admitted",
    ("live", False): "ignored",
    ("test", None): "ignored",
    ("test", True): "ignored",
    ("test", False): "admitted",
}


@pytest.mark.parametrize(("listens", "said"), LIVEMODES)
async def test_the_other_world_is_ignored(open_app: Open, listens: str, said: bool | None) -> None:
    """A test event where LIVEMODE=live, or the reverse, is ignored with a 200."""
    async with open_app(livemode=Livemode(listens)) as client:
        response = await post(client, event(envelope={"livemode": said}))
    assert_answer(response, 200, outcome=LIVEMODES[listens, said])


def _signature(body: bytes = b"{}", **changes: Any) -> str:
    return signed(body, **changes)["Stripe-Signature"]


OTHER = Secret(b"whsec_other")
# Made when they are sent: a signature has a clock.
SIGNATURES: dict[str, tuple[Callable[[], str | bytes | None], str]] = {
    "none": (lambda: None, "signature_missing"),
    "empty": (lambda: "", "signature_missing"),
    "no timestamp": (lambda: _signature().split(",")[1], "signature_malformed"),
    "no v1": (lambda: _signature().split(",")[0], "signature_malformed"),
    "v0 only": (lambda: _signature().replace("v1", "v0"), "signature_malformed"),
    "not ASCII": (lambda: b"t=\xff\xfe,v1=\x80\x81", "signature_malformed"),
    "not ASCII beside": (
        lambda: b"\xff\xfe=\x80," + _signature(b"[]").encode(),
        "signature_mismatch",
    ),
    "10000 v1 items": (
        lambda: "t=1," + ",".join(["v1=" + "0" * 64] * 10_000),
        "signature_mismatch",
    ),
    "10000 items before t": (
        lambda: ",".join(["v1=" + "0" * 64] * 10_000) + ",t=1",
        "signature_malformed",
    ),
    "another secret": (lambda: _signature(secret=OTHER), "signature_mismatch"),
    "another body": (lambda: _signature(b"[]"), "signature_mismatch"),
    "forged and old": (lambda: _signature(secret=OTHER, age_s=9999), "signature_mismatch"),
    "too old": (lambda: _signature(age_s=900), "timestamp_too_old"),
    "too new": (lambda: _signature(age_s=-900), "timestamp_too_new"),
}


@pytest.mark.parametrize(("header", "word"), SIGNATURES.values(), ids=SIGNATURES)
async def test_each_fault_of_a_signature_is_a_400(
    open_app: Open, header: Callable[[], str | bytes | None], word: str
) -> None:
    """Nothing unsigned, forged or outside the tolerance gets past the door."""
    sent = header()
    headers: Any = {} if sent is None else [("Stripe-Signature", sent)]
    async with open_app() as client:
        response = await client.post(WEBHOOK, content=b"{}", headers=headers)
    assert_answer(response, 400, error=word)


@pytest.mark.parametrize(
    "word", ["canceled", "created", "processing", "redacted", "requires_input", "verified"]
)
async def test_a_thin_event_of_a_session_comes_again(open_app: Open, log: Log, word: str) -> None:
    """While sessions cannot be asked for, each is a 503 that says so in the log and the metric."""
    child = metrics.events("api_key_missing", metrics.OTHER_TYPE)
    before = child._value.get()
    event_type = f"v1.identity.verification_session.{word}"
    body = orjson.dumps({"id": "evt_t", "object": "v2.core.event", "type": event_type})
    async with open_app() as client:
        assert_answer(await post(client, body), 503, error="unavailable")
    assert [(line["event"], line["reason"]) for line in log.lines] == [
        ("event.unavailable", "api_key_missing")
    ]
    assert child._value.get() == before + 1


async def test_only_what_is_for_us_is_an_event(open_app: Open) -> None:
    """Whatever is ignored, refused or put off does not look like an event to who waits for one."""
    metrics.LAST_EVENT.set(0)
    thin = THIN.replace(b"v2.core.event_destination", b"v1.identity.verification_session")
    other = [THIN, thin, event("customer.created"), b"[]", event(envelope={"livemode": True})]
    async with open_app(livemode=Livemode.TEST) as client:
        for body in other:
            await post(client, body)
        await asyncio.sleep(0)
        assert sample("idv_last_event_timestamp_seconds") == 0
        for _ in range(2):
            metrics.LAST_EVENT.set(0)
            await post(client, event())
            await asyncio.sleep(0)
            assert sample("idv_last_event_timestamp_seconds") >= NOW


async def test_what_is_alerted_on_is_counted_from_nought(open_app: Open) -> None:
    """A word is there before it has happened: Prometheus sees what grows, not what appears."""
    async with open_app():
        counted = metrics.exposition().decode()
    for word in (*RejectionReason, *UnavailableReason):
        assert f'idv_events_total{{outcome="{word}",type="other"}}' in counted
    assert 'idv_events_total{outcome="ignored",type="verified"}' in counted


async def test_what_nobody_needs_costs_no_event(open_app: Open, log: Log) -> None:
    """A field that cannot be read is left out, counted, and told of by its path."""
    before = sample("idv_skipped_fields_total")
    async with open_app() as client:
        assert_answer(await post(client, event(options="canary")), 200, outcome="admitted")
        assert_answer(await post(client, event(id="evt_2")), 200, outcome="unchanged")
    assert sample("idv_skipped_fields_total") == before + 1
    assert [line.get("skipped_fields") for line in log.lines] == [("data.object.options",), None]
    assert "canary" not in str(log.lines)


async def test_a_signature_in_two_lines_counts_as_joined(open_app: Open) -> None:
    """Header lines of one name mean what they mean joined by a comma."""
    body = event()
    timestamp, _, v1 = _signature(body).partition(",")
    async with open_app() as client:
        response = await client.post(
            WEBHOOK,
            content=body,
            headers=[("Stripe-Signature", timestamp), ("Stripe-Signature", v1)],
        )
    assert_answer(response, 200, outcome="admitted")


def _without(*path: str) -> bytes:
    found = orjson.loads(event())
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return orjson.dumps(found)


FAULTS: dict[str, tuple[bytes, str, str | None]] = {
    "empty": (b"", "body_not_json", None),
    "not UTF-8": (b'{"id": "\xff\xfe"}', "body_not_json", None),
    "UTF-16": (event().decode().encode("utf-16"), "body_not_json", None),
    "cut off": (event()[:-1], "body_not_json", None),
    "NaN": (b'{"created": NaN}', "body_not_json", None),
    "2000 arrays": (b"[" * 2000 + b"]" * 2000, "body_not_json", None),
    "half a pair in an id": (event(id="evt_?").replace(b"?", b"\\ud800"), "field_mistyped", "id"),
    "array": (b"[]", "body_not_an_event", None),
    "null": (b"null", "body_not_an_event", None),
    "number": (b"1", "body_not_an_event", None),
    "no type": (_without("type"), "field_missing", "type"),
    "no id": (_without("id"), "field_missing", "id"),
    "no created": (_without("created"), "field_missing", "created"),
    "no session": (_without("data", "object"), "field_missing", "data.object"),
    "no session id": (_without("data", "object", "id"), "field_missing", "data.object.id"),
    "no status": (_without("data", "object", "status"), "field_missing", "data.object.status"),
    "type no text": (event(envelope={"type": 1}), "field_mistyped", "type"),
    "hostile id": (event(id="evt_{0}:x"), "field_mistyped", "id"),
    "hostile session": (event(session="vs_1}{2}"), "field_mistyped", "data.object.id"),
    "400 digits": (
        event(created=1).replace(b'"created":1', b'"created":' + b"1" * 400),
        "body_not_json",
        None,
    ),
    "30 digits": (
        event(created=1).replace(b'"created":1', b'"created":' + b"1" * 30),
        "field_mistyped",
        "created",
    ),
    "negative time": (event(created=-5), "field_mistyped", "created"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "word", "field"), FAULTS.values(), ids=FAULTS)
async def test_each_fault_of_a_genuine_body_is_a_400(
    open_app: Open, body: bytes, word: str, field: str | None
) -> None:
    """A genuine but unusable body is refused with a word and a path, never a value."""
    said = {"error": word} | ({"field": field} if field else {})
    async with open_app() as client:
        assert_answer(await post(client, body), 400, **said)


@pytest.mark.parametrize("body", [body for body, _, _ in FAULTS.values()], ids=FAULTS)
async def test_an_unsigned_body_is_never_parsed(open_app: Open, body: bytes) -> None:
    """Whoever has no secret hears about the signature, whatever the body is."""
    async with open_app() as client:
        assert_answer(await post(client, body, {}), 400, error="signature_missing")
        response = await post(client, body, signed(body, OTHER))
    assert_answer(response, 400, error="signature_mismatch")


async def test_of_duplicate_keys_the_last_counts(open_app: Open) -> None:
    """Duplicate keys are no way round the checks: what is checked is what is used."""
    body = event().replace(b'"id":"evt_1"', b'"id":"evt_1","id":"hostile"')
    async with open_app() as client:
        assert_answer(await post(client, body), 400, error="field_mistyped", field="id")


# What holds for one route holds for the other.
ROUTES = (WEBHOOK, WEBHOOK + "/acme")
both_routes = pytest.mark.parametrize("path", ROUTES)
BOTH_SECRETS = {"": (SECRET,), "acme": (SECRET,)}


@both_routes
async def test_the_limit_is_the_limit(open_app: Open, path: str) -> None:
    """A body of MAX_BODY_BYTES is read, one byte more is a 413, signed or not."""
    body = event().ljust(1024)
    more = body + b" "
    async with open_app(max_body_bytes=1024, secrets=BOTH_SECRETS) as client:
        assert_answer(await post(client, body, path=path), 200, outcome="admitted")
        assert_answer(await post(client, more, path=path), 413, error="body_too_large")
        assert_answer(await post(client, more, {}, path=path), 413, error="body_too_large")


async def call(
    app: Any, *messages: dict[str, Any], headers: Sequence[tuple[bytes, bytes]] = ()
) -> list[Any]:
    """Call *app* with a crafted scope; return what it sends."""
    sent: list[Any] = []
    queue = list(messages)

    async def receive() -> dict[str, Any]:
        return queue.pop(0)

    async def send(message: Any) -> None:
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
async def test_a_crafted_length_is_no_length(
    connections: Connections, settings: Settings, length: bytes
) -> None:
    """A Content-Length that is no number is ignored: the bytes themselves are counted."""
    app, _ = webhook_app(connections, settings)
    body = event()
    sent = await call(
        app,
        {"type": "http.request", "body": body},
        headers=[
            (b"content-length", length),
            (b"stripe-signature", _signature(body).encode()),
        ],
    )
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("length", [b"262145", b"9" * 19, b"9" * 20, b"9" * 21, b"9" * 10_000])
async def test_a_declared_length_is_enough_for_a_413(
    connections: Connections, settings: Settings, length: bytes
) -> None:
    """What says of itself that it is too large is refused before a byte of it is read."""
    app, _ = webhook_app(connections, settings)
    sent = await call(app, headers=[(b"content-length", length)])
    assert sent[0]["status"] == 413


async def test_chunks_are_counted(connections: Connections, settings: Settings) -> None:
    """A body without a length is refused as soon as its chunks exceed the limit."""
    app, _ = webhook_app(connections, settings)
    chunk = {"type": "http.request", "body": b" " * 131_072, "more_body": True}
    sent = await call(app, chunk, chunk, {**chunk, "body": b" "})
    assert (sent[0]["status"], sent[1]["body"]) == (413, b'{"error":"body_too_large"}')


async def test_an_endless_body_is_a_413_on_the_wire(
    connections: Connections, settings: Settings
) -> None:
    """A chunked body that never ends is answered when it exceeds the limit."""
    app, _ = webhook_app(connections, settings)
    head = f"POST {WEBHOOK} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    async with listening(app) as listener, connected(listener.port) as (reader, writer):
        writer.write(head + b"10000\r\n" + b" " * 65_536 + b"\r\n")
        for _ in range(4):
            writer.write(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        assert await answer(reader) == (413, b'{"error":"body_too_large"}')


async def test_a_client_may_leave(connections: Connections, settings: Settings, log: Log) -> None:
    """A client that leaves in mid-body is counted, not answered, and leaves no trace of data."""
    app, _ = webhook_app(connections, settings)
    child = metrics.events("client_left", "other")
    before = child._value.get()
    async with listening(app) as listener:
        async with connected(listener.port) as (_, writer):
            writer.write(request(event(), signed(event()))[:-20])
            await writer.drain()
        await eventually(lambda: child._value.get() == before + 1)
        assert (await talk(listener.port, request(event(), signed(event()))))[:15].endswith(
            b"200 OK"
        )
    assert [line["event"] for line in log.lines] == ["event.admitted"]


async def test_endpoints_have_their_own_secrets(open_app: Open) -> None:
    """Each endpoint takes its own secrets and nobody else's; during rotation, any of them."""
    old, new, acme = Secret(b"whsec_old"), Secret(b"whsec_new"), Secret(b"whsec_acme")
    async with open_app(secrets={"": (old, new), "acme": (acme,)}) as client:
        tries = [
            (path, secret, await client.post(path, content=b"{}", headers=signed(b"{}", secret)))
            for path in (WEBHOOK, WEBHOOK + "/acme", WEBHOOK + "/ACME")
            for secret in (old, new, acme)
        ]
    for path, secret, response in tries:
        own = (secret is acme) == (path != WEBHOOK)
        error = "field_missing" if own else "signature_of_other_endpoint"
        assert (response.status_code, response.json()["error"]) == (400, error)


async def test_another_endpoints_secret_is_named_as_such(open_app: Open, log: Log) -> None:
    """Whoever signs with a secret of another endpoint hears so; whoever has none learns nothing."""
    acme, stranger = Secret(b"whsec_acme"), Secret(b"whsec_stranger")
    async with open_app(secrets={"": (SECRET,), "acme": (acme,)}) as client:
        swapped = [
            await post(client, event(), signed(event(), acme)),
            await post(client, event(), path=WEBHOOK + "/acme"),
        ]
        forged = await post(client, event(), signed(event(), stranger))
    for response in swapped:
        assert_answer(response, 400, error="signature_of_other_endpoint")
    assert_answer(forged, 400, error="signature_mismatch")
    assert [line["reason"] for line in log.lines] == [
        *["signature_of_other_endpoint"] * 2,
        "signature_mismatch",
    ]


NOT_FOUND = [
    "/", "/webhooks", "/livez/", "/metrics", "/docs", "/%2e%2e/x", "//webhooks/stripe",
    "/webhooks/stripes", "/webhooks/stripe%00", "/webhooks/stripe%0d%0a",
]  # fmt: skip
# What Stripe may have been told instead of the right URL.
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
async def test_a_wrong_url_at_stripe_is_told(open_app: Open, log: Log, path: str) -> None:
    """A path that looks like ours and is none has a word, a line and a count, without the path."""
    word = WRONG_PATHS[path]
    child = metrics.events(word, metrics.OTHER_TYPE)
    before = child._value.get()
    async with open_app(secrets={"": (SECRET,), "acme": (SECRET,)}) as client:
        url = httpx2.URL("http://tests", raw_path=path.encode())
        response = await client.post(url, content=event(), headers=signed(event()))
    assert_answer(response, 404, error=word)
    [line] = log.lines
    assert (line["event"], line["reason"], line["body_bytes"]) == ("event.rejected", word, 0)
    assert "canary" not in str(line)
    assert child._value.get() == before + 1


@pytest.mark.parametrize("path", NOT_FOUND)
async def test_an_unknown_path_is_a_404(open_app: Open, path: str) -> None:
    """An unknown path is a 404 without a body, and no slash is ever redirected."""
    async with open_app(secrets={"": (SECRET,), "acme": (SECRET,)}) as client:
        response = await client.post(
            httpx2.URL("http://tests", raw_path=path.encode()), content=b"{}"
        )
    assert (response.status_code, response.content) == (404, b"")
    assert dict(response.headers) == {"content-length": "0"}


async def test_an_endpoint_nobody_configured_is_a_404(open_app: Open) -> None:
    """Where only named endpoints have secrets, the bare path is unknown."""
    async with open_app(secrets={"acme": (SECRET,)}) as client:
        assert_answer(await post(client, event()), 404, error="endpoint_unknown")


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"]
)
@both_routes
async def test_another_method_is_a_405(open_app: Open, method: str, path: str) -> None:
    """Another method is a 405 that says which one is allowed, without a body."""
    async with open_app(secrets=BOTH_SECRETS) as client:
        response = await client.request(method, path)
    assert (response.status_code, response.content) == (405, b"")
    assert dict(response.headers) == {"allow": "POST", "content-length": "0"}


@pytest.mark.parametrize("host", [b"", b"[::", b"evil.example", b"a:b:c", b"\xff\xfe", b"x" * 999])
async def test_the_host_header_means_nothing(open_app: Open, host: bytes) -> None:
    """No Host header changes an answer or appears in one."""
    body = event()
    headers: Any = [("Host", host), *signed(body).items()]
    async with open_app() as client:
        response = await client.post(WEBHOOK, content=body, headers=headers)
        assert_answer(response, 200, outcome="admitted")
        missing = await client.post("/webhooks", content=body, headers=headers)
    assert dict(missing.headers) == {"content-length": "0"}


async def test_a_full_backlog_is_a_503(open_app: Open) -> None:
    """Where a partition's stream is at its cap nothing more is admitted, and nothing lost."""
    second = event("processing", id="evt_2", status="processing", created=NOW + 5)
    async with open_app(stream_max_entries=1) as client:
        assert_answer(await post(client, event()), 200, outcome="admitted")
        assert_answer(await post(client, second), 503, error="unavailable")
    async with open_app() as client:
        assert_answer(await post(client, second), 200, outcome="admitted")


class Held:
    """A receiver that keeps every request in hand until it is let go."""

    def __init__(self) -> None:
        self.waiting = 0
        self.release = asyncio.Event()

    async def receive(self, *_: object, **__: object) -> Receipt:
        """Wait; then fail as if Redis were gone."""
        self.waiting += 1
        await self.release.wait()
        raise Unavailable(UnavailableReason.REDIS_UNREACHABLE)


@both_routes
async def test_too_many_in_hand_are_a_503_at_once(
    connections: Connections, make_settings: Callable[..., Settings], path: str
) -> None:
    """Beyond MAX_IN_FLIGHT a whole request is put off at once; those in hand go on."""
    held: Any = Held()
    settings = make_settings(max_in_flight=2, secrets=BOTH_SECRETS)
    app = create_app(held, Health(connections, settings), settings)
    async with client_of(app) as client, asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        for route in ROUTES:
            tasks.create_task(post(client, event(), path=route))
        await eventually(lambda: held.waiting == 2)
        assert sample("idv_requests_in_flight") == 2
        assert_answer(await post(client, event(), path=path), 503, error="unavailable")
        assert held.waiting == 2
        held.release.set()
    assert sample("idv_requests_in_flight") == 0


async def test_who_still_sends_takes_nobodys_place(
    connections: Connections, make_settings: Callable[..., Settings]
) -> None:
    """A request counts as in hand when it is whole: slow strangers keep nobody waiting."""
    app, _ = webhook_app(connections, make_settings(max_in_flight=1))
    body = event()
    half = f"POST {WEBHOOK} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf".encode()
    async with listening(app) as listener, contextlib.AsyncExitStack() as slow:
        for _ in range(20):
            _, writer = await slow.enter_async_context(connected(listener.port))
            writer.write(half)
        said = await talk(listener.port, request(body, signed(body)))
    assert said.startswith(b"HTTP/1.1 200 ")


REFUSED: dict[str, tuple[bytes, dict[str, str], str]] = {
    "forged": (event(), signed(event(), Secret(b"whsec_other")), "signature_mismatch"),
    "too large": (b"x" * 1025, {}, "body_too_large"),
    "not JSON": (b"[", signed(b"["), "body_not_json"),
    "Redis gone": (event(), signed(event()), "redis_unreachable"),
}


@pytest.mark.parametrize(("body", "headers", "reason"), REFUSED.values(), ids=REFUSED)
async def test_a_refusal_keeps_nothing_of_what_was_refused(
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    body: bytes,
    headers: dict[str, str],
    reason: str,
) -> None:
    """Until its line is written a refusal is held: no frame with the body may hang on it."""
    noted: list[request_log.Entry] = []
    monkeypatch.setattr(request_log.RequestLog, "add", lambda _, entry: noted.append(entry))
    url = Secret("unix:///nowhere.sock")
    settings = make_settings(max_body_bytes=1024, admit_deadline_s=0.1, redis_url=url)
    async with connect(url) as nowhere, client_of(webhook_app(nowhere, settings)[0]) as client:
        await post(client, body, headers)
    [entry] = noted
    error = entry.outcome
    assert isinstance(error, Rejected | Unavailable)
    assert error.reason == reason
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


async def test_a_cancelled_request_is_a_503(connections: Connections, settings: Settings) -> None:
    """When the grace time of a stop is over, who is still in hand hears 503, not 500."""
    held: Any = Held()
    app = create_app(held, Health(connections, settings), settings)
    async with client_of(app) as client:
        asked = asyncio.create_task(post(client, event()))
        await eventually(lambda: held.waiting)
        asked.cancel()
        assert_answer(await asked, 503, error="unavailable")


def sample(name: str) -> float:
    """Return what a metric says."""
    return metrics.REGISTRY.get_sample_value(name) or 0.0


class Line:
    """The way to a server, which can be cut and mended."""

    def __init__(self, server: EmbeddedServer, directory: Path) -> None:
        self.path = directory / "line.sock"
        self._to = server.socket
        self._open: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        """Let calls through."""
        self._open = await asyncio.start_unix_server(self._forward, self.path)

    async def cut(self) -> None:
        """Drop every connection and refuse new ones."""
        assert self._open is not None
        self._open.close()
        self.path.unlink(missing_ok=True)
        for writer in self._writers:
            writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_unix_connection(self._to)
        self._writers |= {writer, to_writer}
        await asyncio.gather(self._copy(reader, to_writer), self._copy(to_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65_536):
                writer.write(chunk)
        writer.close()


async def test_redis_may_go_and_come(
    connections: Connections,
    redis_server: EmbeddedServer,
    make_settings: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    """While Redis is gone: 503, Retry-After and not ready; when it is back, all is well again."""
    line = Line(redis_server, tmp_path)
    await line.mend()
    url = Secret(f"unix://{line.path}")
    settings = make_settings(redis_url=url, admit_deadline_s=600)
    async with connect(url) as through:
        app, health = webhook_app(through, settings)
        watching = asyncio.create_task(health.watch())
        async with client_of(app) as client:

            async def ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            await eventually(lambda: health.is_ready)
            assert await ready()
            assert_answer(await post(client, event()), 200, outcome="admitted")
            await line.cut()
            late = event("processing", id="evt_2", status="processing", created=NOW + 5)
            batches = sample("idv_admission_batch_events_count")
            refused = asyncio.create_task(post(client, late))
            await eventually(lambda: sample("idv_admission_batch_events_count") > batches)
            push(600)
            assert_answer(await refused, 503, error="unavailable")
            await eventually(lambda: not health.is_ready)
            assert not await ready()
            assert (await client.get("/livez")).status_code == 200
            await line.mend()
            await eventually(lambda: health.is_ready)
            assert await ready()
            assert_answer(await post(client, late), 200, outcome="admitted")
            assert_answer(await post(client, event()), 200, outcome="duplicate")
        await cancellation.cancel_and_wait(watching)
    await line.cut()


@both_routes
async def test_only_who_is_on_the_list_may_come_in(
    connections: Connections, make_settings: Callable[..., Settings], log: Log, path: str
) -> None:
    """With an allow list strangers hear 403 unread, are logged without address, and may probe."""
    settings = make_settings(secrets=BOTH_SECRETS)
    allow_list = AllowList([parse_network("3.18.12.63")], proxies=[parse_network("127.0.0.1")])
    app, _ = webhook_app(connections, settings, allow_list)
    body = event()
    async with client_of(app) as client:
        for forwarded in ({}, {"X-Forwarded-For": "3.18.12.63, 6.6.6.6"}):
            answered = await post(client, body, signed(body) | forwarded, path=path)
            assert_answer(answered, 403, error="source_not_allowed")
        from_stripe = signed(body) | {"X-Forwarded-For": "6.6.6.6, 3.18.12.63"}
        answered = await post(client, body, from_stripe, path=path)
        assert_answer(answered, 200, outcome="admitted")
        assert (await client.get("/livez")).status_code == 200
    assert [line.get("reason") for line in log.lines] == ["source_not_allowed"] * 2 + [None]
    assert "6.6.6.6" not in repr(log.lines)


async def test_probes_say_ready_or_not(connections: Connections, settings: Settings) -> None:
    """Both apps answer the probes without a body; draining is not ready; metrics are admin's."""
    health = Health(connections, settings)
    watching = asyncio.create_task(health.watch())
    held: Any = Held()
    app = create_app(held, health, settings)
    for one in (app, create_admin_app(health)):
        health.is_draining = False
        await eventually(lambda: health.is_ready)
        async with client_of(one) as client:
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


TRACE = "00-" + "a1" * 16 + "-00f067aa0ba902b7-01"
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
    open_app: Open, log: Log, headers: list[tuple[str, Any]], logged: str | None
) -> None:
    """A well-formed X-Request-Id or traceparent is logged; anything else gives way to our own."""
    all_headers: Any = [*signed(event()).items(), *headers]
    async with open_app() as client:
        await client.post(WEBHOOK, content=event(), headers=all_headers)
    [line] = log.lines
    if logged is None:
        assert len(line["request_id"]) == 16
        assert set(line["request_id"]) <= set("0123456789abcdef")
    else:
        assert line["request_id"] == logged


async def test_one_line_for_each_delivery(open_app: Open, log: Log) -> None:
    """Each request has one line, named after its outcome, with fields of the allow list only."""
    late = event("processing", id="evt_2", status="processing", created=NOW - 60)
    contradiction = event("processing", id="evt_4", status="processing", created=NOW + 60)
    bodies = [
        event(), event(), late, event(id="evt_3", created=NOW + 9), THIN, b"[]",
        event("verified", id="evt_5", status="verified", created=NOW + 20), contradiction,
    ]  # fmt: skip
    async with open_app() as client:
        for body in bodies:
            await post(client, body)
    async with open_app(stream_max_entries=1) as client:
        full = event("redacted", id="evt_6", status="verified", created=NOW + 90)
        await post(client, full)
    assert [line["event"] for line in log.lines] == [
        "event.admitted", "event.duplicate", "event.late", "event.unchanged", "event.ignored",
        "event.rejected", "event.admitted", "event.late", "event.unavailable",
    ]  # fmt: skip
    allowed = {
        "event", "event_id", "event_type", "session_id", "previous", "current", "reversal",
        "status", "ignored_status", "sequence", "endpoint", "last_error_code",
        "redaction_status", "report_id", "livemode", "account", "reason",
        "field", "after_final", "secret_fingerprint", "duration_ms", "body_bytes",
        "request_id",
    }  # fmt: skip
    assert all(line.keys() <= allowed for line in log.lines)
    assert [line.get("after_final") for line in log.lines[6:8]] == [False, True]


async def test_a_line_says_what_the_session_is(open_app: Open, log: Log) -> None:
    """What changed is told from what stays, so that no line reads like a set-back."""
    async with open_app() as client:
        for body in (
            event(created=NOW - 60),
            event("verified", id="evt_2", status="verified"),
            event("processing", id="evt_3", status="processing", created=NOW - 30),
            event("verified", id="evt_4", status="verified", created=NOW + 1),
            event(created=NOW - 60),
            event(id="evt_5", session="vs_old", created=NOW - 99 * DAY_S),
        ):
            await post(client, body)
    words = ("event", "previous", "current", "status", "ignored_status")
    assert [tuple(line.get(word, "-") for word in words) for line in log.lines] == [
        ("event.admitted", None, "requires_input", "-", "-"),
        ("event.admitted", "requires_input", "verified", "-", "-"),
        ("event.late", "-", "-", "verified", "processing"),
        ("event.unchanged", "-", "-", "verified", "-"),
        ("event.duplicate", "-", "-", None, "requires_input"),
        ("event.expired", "-", "-", None, "requires_input"),
    ]
    assert log.warned == []


async def test_a_reversal_is_a_warning_and_counted(open_app: Open, log: Log) -> None:
    """When staff take a verification back the line stands out; when they give it, it does not."""
    before = metrics.REVERSALS._value.get()
    async with open_app() as client:
        await post(client, event("verified", status="verified"))
        await post(client, event("requires_input", id="evt_2", created=NOW + 100))
        await post(client, event("verified", id="evt_3", status="verified", created=NOW + 200))
    assert [line["reversal"] for line in log.lines] == [False, True, False]
    assert log.warned == ["event.admitted"]
    assert metrics.REVERSALS._value.get() == before + 1


async def test_an_event_says_by_which_endpoint_it_came(
    open_app: Open, log: Log, connections: Connections
) -> None:
    """The name in the URL is in the line and in the transition; the default one has none."""
    secrets = {"": (SECRET,), "acme": (SECRET,)}
    async with open_app(secrets=secrets) as client:
        for path, body in (
            (WEBHOOK, event()),
            (f"{WEBHOOK}/Acme", event(id="evt_2", session="vs_2")),
        ):
            await client.post(path, content=body, headers=signed(body))
    assert [line["endpoint"] for line in log.lines] == [None, "acme"]
    keys = Keys("idv", 8)
    for session, endpoint in (("vs_1", None), ("vs_2", "acme")):
        [(_, entry)] = await connections.client.xrange(keys.transitions(keys.partition(session)))
        assert stream_entry.unpack(entry).endpoint == endpoint


def _broken(*_: object, **__: object) -> None:
    raise BrokenPipeError


@pytest.mark.parametrize("space", [b" ", b"\t", b" \t \t"])
async def test_whitespace_around_a_value_is_none_of_it(
    connections: Connections, settings: Settings, log: Log, space: bytes
) -> None:
    """Spaces and tabs around headers' values mean nothing (RFC 9110, 5.5)."""
    app, _ = webhook_app(connections, settings)
    headers = {**signed(event()), "X-Request-Id": "0a1b2c3d", "traceparent": TRACE}
    sent = request(event(), headers)
    for value in (*headers.values(), str(len(event())), "tests", "close"):
        sent = sent.replace(
            f": {value}\r\n".encode(), b":%b%b%b\r\n" % (space, value.encode(), space)
        )
    async with listening(app) as listener:
        said = await talk(listener.port, sent)
    assert said.startswith(b"HTTP/1.1 200 ")
    assert [line["request_id"] for line in log.lines] == ["0a1b2c3d"]


@pytest.mark.parametrize("broken", ["log", "metrics"])
async def test_a_log_that_fails_costs_no_answer(
    open_app: Open, monkeypatch: pytest.MonkeyPatch, log: Log, broken: str
) -> None:
    """A full disk under the log, or a broken metric, changes no answer and raises nothing."""
    async with open_app() as client:
        if broken == "log":
            for method in ("info", "warning", "error"):
                monkeypatch.setattr(log, method, _broken)
        else:
            monkeypatch.setattr(metrics, "events", _broken)
        assert_answer(await post(client, event()), 200, outcome="admitted")
        assert_answer(await post(client, b"["), 400, error="body_not_json")


async def test_acknowledged_means_admitted(
    connections: Connections, settings: Settings, keys: Keys
) -> None:
    """Before the first byte of a 200 goes out, Redis holds the event."""
    app, _ = webhook_app(connections, settings)
    body, known = event(), []

    async def send(message: Any) -> None:
        known.append(await connections.client.hexists(keys.session("vs_1"), "evt_1"))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    scope = {
        "type": "http",
        "method": "POST",
        "path": WEBHOOK,
        "query_string": b"",
        "headers": [(b"stripe-signature", _signature(body).encode())],
    }
    await app(scope, receive, send)
    assert known == [True, True]


@pytest.mark.parametrize(
    "framing",
    ["Transfer-Encoding: chunked\r\nContent-Length: 5", "Transfer-Encoding: gzip, chunked"],
)
async def test_ambiguous_framing_is_refused(
    connections: Connections, settings: Settings, log: Log, framing: str
) -> None:
    """Both lengths at once, or a coding nobody decodes, is a 400 and the end of the connection."""
    app, _ = webhook_app(connections, settings)
    head = f"POST {WEBHOOK} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode()
    smuggled = b"0\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    async with listening(app) as listener:
        said = await talk(listener.port, head + smuggled)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert said.count(b"HTTP/1.1") == 1
    assert not log.lines


async def test_garbage_is_never_a_5xx(connections: Connections, settings: Settings) -> None:
    """Whatever bytes arrive on the port, the answer is 4xx or a closed connection."""
    app, _ = webhook_app(connections, settings)
    line = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    garbage = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 50,
        b"\r\n" * 100 + b"\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST http://evil" + line + b"\r\n",
        b"POST http://[::1/x" + line + b"\r\n",
        b"CONNECT evil:443" + line + b"\r\n",
        b"OPTIONS *" + line + b"\r\n",
        b"POST /webhooks/stripe/%ff%00%0a" + line + b"\r\n",
        b"POST /webhooks/stripe/\xff" + line + b"\r\n",
        b"POST /webhooks/stripe" + line + b"Content-Length: -1\r\n\r\n",
        b"POST /webhooks/stripe" + line + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /webhooks/stripe" + line + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /webhooks/stripe" + line + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST /webhooks/stripe" + line + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n{}",
        b"GET /%zz" + line + b"\r\n",
        b"GET /\r\n\r\n",
    ]  # fmt: skip
    async with listening(app, receive_timeout_s=1.0) as listener:
        said = await asyncio.gather(*(talk(listener.port, one) for one in garbage))
    for sent, got in zip(garbage, said, strict=True):
        assert got[:10] in (b"", b"HTTP/1.1 4"), sent


async def test_pipelined_strangers_are_answered_one_by_one(
    connections: Connections, settings: Settings
) -> None:
    """A refusal in front of a genuine request on one connection costs the latter nothing."""
    app, _ = webhook_app(connections, settings)
    body = event()
    async with listening(app) as listener, connected(listener.port) as (reader, writer):
        writer.write(request(b"{}", {}, close=False) + request(body, signed(body), close=True))
        assert await answer(reader) == (400, b'{"error":"signature_missing"}')
        assert await answer(reader) == (200, b'{"outcome":"admitted"}')
        assert await rest(reader) == b""


def test_the_application_builds_no_documents() -> None:
    """The admin app has the three admin routes and nothing else."""
    app = create_admin_app(Health.__new__(Health))
    assert [getattr(route, "path", None) for route in app.routes] == [
        "/metrics",
        "/livez",
        "/readyz",
    ]
