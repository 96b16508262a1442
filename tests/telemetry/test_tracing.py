"""One trace from the POST to each handler, with ids and words only; none unless configured."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import orjson
import pytest
from opentelemetry.sdk.trace import ReadableSpan

from service.config import Settings
from service.delivery import dead_letters
from service.delivery.dead_letters import EntryFilter
from service.delivery.worker import Worker
from service.errors import Undeliverable
from service.handlers import AnyHandler
from service.runtime.traced import trace_handlers
from service.secret import Secret
from service.storage.connections import Connections
from service.storage.keys import Keys
from service.telemetry import tracing
from service.telemetry.tracing import Tracing
from service.transitions import thin_notification
from service.transitions.cloudevents import message
from service.transitions.transition import StatusTransition
from tests.support.apps import webhook_app
from tests.support.depth import takes_long
from tests.support.harness import event, signed, thin_event
from tests.support.http_sink import http_sink
from tests.support.processes import PACKAGE, open_sandbox
from tests.support.spans import Spans
from tests.support.waiting import until, wait_until
from tests.support.web_client import asgi_client

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
CANARY = "canary66600666"
ALLOWED = {
    *("outcome", "event_id", "event_type", "session_id"),
    *("handler", "sequence", "error"),
}


@pytest.fixture
def spans() -> Spans:
    """Return an empty collector of spans."""
    return Spans()


def receiving(
    connections: Connections, settings: Settings, traced: Tracing | None
) -> AbstractAsyncContextManager[httpx2.AsyncClient]:
    """Return a client that is connected to a receiver."""
    app, _ = webhook_app(connections, settings, traced=traced)
    return asgi_client(app)


@asynccontextmanager
async def working(
    connections: Connections, settings: Settings, keys: Keys, handler: AnyHandler
) -> AsyncIterator[None]:
    """Run a worker during the block."""
    stopping = asyncio.Event()
    worker = Worker(connections, keys, settings, {"log": handler})
    task = asyncio.create_task(worker.run(stopping))
    try:
        yield
    finally:
        stopping.set()
        await task


class RecordingHandler(list[StatusTransition]):
    """A handler, and the transitions it was called with."""

    async def __call__(self, transition: StatusTransition, /) -> None:
        """Keep the transition."""
        self.append(transition)


def attributes_of(span: ReadableSpan) -> Mapping[str, Any]:
    """Return a span's attributes."""
    return dict(span.attributes or {})


async def test_one_trace_from_the_post_to_the_handler(
    connections: Connections, settings: Settings, keys: Keys, spans: Spans
) -> None:
    """The parent of the receiver's span is in the header, that of the call is the receiver's."""
    body, handler = event(id="evt_traced"), RecordingHandler()
    following = trace_handlers(spans.tracing, {"log": handler})["log"]
    async with (
        receiving(connections, settings, spans.tracing) as client,
        working(connections, settings, keys, following),
    ):
        headers = {**signed(body), "traceparent": PARENT}
        await client.post("/webhooks/stripe", content=body, headers=headers)
        await until(lambda: spans.named("handle log"))

    [received], [handled] = spans.named("receive"), spans.named("handle log")
    assert received.parent is not None
    assert handled.parent is not None
    assert f"{received.parent.span_id:016x}" == SPAN
    assert {f"{span.context.trace_id:032x}" for span in spans.all} == {TRACE}
    assert handled.parent.span_id == received.context.span_id
    ids = {"event_id": "evt_traced", "session_id": "vs_1"}
    assert ids.items() <= attributes_of(received).items()
    assert ids.items() <= attributes_of(handled).items()
    assert attributes_of(received)["outcome"] == "admitted"
    assert attributes_of(handled)["handler"] == "log"

    [transition] = handler
    place = f"00-{TRACE}-{received.context.span_id:016x}-01"
    assert transition.traceparent == place
    sent = message(transition)
    assert orjson.loads(sent.body)["traceparent"] == sent.headers["traceparent"] == place


async def test_a_thin_event_is_traced(
    connections: Connections, settings: Settings, keys: Keys, spans: Spans
) -> None:
    """The span of a thin event has its ids, and its notification continues the trace."""
    body = thin_event()
    settings = replace(settings, stripe_api_key=(Secret("rk_test_1"),))
    async with receiving(connections, settings, spans.tracing) as client:
        await client.post("/webhooks/stripe", content=body, headers=signed(body))

    [received] = spans.named("receive")
    assert attributes_of(received) == {
        "outcome": "queued",
        "event_id": "evt_thin_1",
        "event_type": "identity.verification_session.created",
        "session_id": "vs_1",
    }
    [[_, fields]] = await connections.client.xrange(keys.notifications(keys.partition("vs_1")))
    place = f"00-{received.context.trace_id:032x}-{received.context.span_id:016x}-"
    assert str(thin_notification.unpack(fields).traceparent).startswith(place)


@pytest.mark.parametrize("is_traced", [True, False])
async def test_dead_letters_and_replays_stay_in_the_trace(
    connections: Connections, settings: Settings, keys: Keys, spans: Spans, is_traced: bool
) -> None:
    """Dead letters and replays keep the trace context, also without tracing."""
    body = event(id="evt_dead")
    refused: list[StatusTransition] = []

    async def refuse_once(transition: StatusTransition) -> None:
        refused.append(transition)
        if len(refused) == 1:
            raise Undeliverable("never")

    async with (
        receiving(connections, settings, spans.tracing if is_traced else None) as client,
        working(connections, settings, keys, refuse_once),
    ):
        headers = {**signed(body), "traceparent": PARENT}
        await client.post("/webhooks/stripe", content=body, headers=headers)

        async def find_letters() -> list[dead_letters.Entry]:
            found = dead_letters.read_dead_letters(connections, keys, "log", EntryFilter())
            return [one async for one in found]

        letters: list[dead_letters.Entry] = await until(find_letters)
        assert letters[0].item is not None
        stored = letters[0].item.traceparent
        await dead_letters.replay(connections, keys, "log", letters, name="again")
        await until(lambda: len(refused) == 2)

    assert {one.traceparent for one in refused} == {stored}
    assert (stored == PARENT) is not is_traced
    assert f"-{TRACE}-" in str(stored)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "garbage",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"{PARENT}-{CANARY}",
    ],
)
async def test_an_invalid_traceparent_is_dropped(
    connections: Connections, settings: Settings, keys: Keys, header: str | None
) -> None:
    """Without a valid header nothing is stored or invented, and the message has none."""
    body, handler = event(id="evt_none"), RecordingHandler()
    async with (
        receiving(connections, settings, None) as client,
        working(connections, settings, keys, handler),
    ):
        headers = signed(body) | ({} if header is None else {"traceparent": header})
        answer = await client.post("/webhooks/stripe", content=body, headers=headers)
        assert answer.status_code == 200
        [entry] = await connections.client.xrange(keys.transitions(keys.partition("vs_1")))
        assert b"traceparent" not in entry[1][b"change"]
        await until(lambda: handler)
    [transition] = handler
    assert transition.traceparent is msgspec.UNSET
    assert b"traceparent" not in message(transition).body
    assert "traceparent" not in message(transition).headers


async def test_spans_hold_ids_and_words_only(
    connections: Connections, settings: Settings, keys: Keys, spans: Spans
) -> None:
    """Attributes are from an allow list; no header, query, body or exception is in a span."""
    secret: dict[str, Any] = {
        "client_secret": f"vs_1_secret_{CANARY}",
        "metadata": {"user": CANARY},
    }
    genuine = event(id="evt_canary", **secret, verified_outputs={"first_name": CANARY})
    path = f"/webhooks/stripe?token={CANARY}"

    async def fail(transition: StatusTransition) -> None:
        raise ValueError(CANARY)

    hostile = {"user-agent": CANARY, "tracestate": f"a={CANARY}", "x-forwarded-for": CANARY}
    async with receiving(connections, settings, spans.tracing) as client:
        for body in (genuine, event(id=CANARY), b"{}" + CANARY.encode(), genuine):
            headers = {**hostile, **signed(body), "traceparent": PARENT}
            await client.post(path, content=body, headers=headers)
        await client.post(path, content=genuine, headers=hostile)
    async with working(
        connections, settings, keys, trace_handlers(spans.tracing, {"log": fail})["log"]
    ):
        await until(lambda: spans.named("handle log"))

    for span in spans.all:
        assert attributes_of(span).keys() <= ALLOWED
        assert not span.events
        assert CANARY not in span.to_json()
    outcomes = [attributes_of(span)["outcome"] for span in spans.named("receive")]
    assert outcomes == [
        *("admitted", "field_mistyped", "body_not_json", "duplicate", "signature_missing"),
    ]
    assert attributes_of(spans.named("handle log")[0])["error"] == "ValueError"


def test_tracing_is_off_by_default() -> None:
    """Without the address of a collector, or with the SDK disabled, nothing is traced."""
    address = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    for environ in ({}, {**address, "OTEL_SDK_DISABLED": "true"}):
        with tracing.open_tracing(environ) as traced:
            assert traced is None
    # redis-py imports parts of OpenTelemetry by itself, but not its SDK.
    names = "[name for name in sys.modules if 'opentelemetry.sdk.trace' in name]"
    program = f"import sys, service.cli; print({names})"
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, cwd=PACKAGE.parent
    )
    assert said.stdout == b"[]\n"


def test_tracing_is_off_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the extra is not installed, the service starts without tracing."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with tracing.open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}) as traced:
        assert traced is None


@takes_long
def test_real_processes_send_their_spans(
    tmp_path: Path,
) -> None:
    """`serve` and `work` send their spans to the collector, at the latest when they stop."""
    with open_sandbox(tmp_path) as ground, http_sink() as collector:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        serve, work = (ground.start(each, **settings).ready() for each in ("serve", "work"))
        body = event(id="evt_exported")
        headers = {**signed(body), "traceparent": PARENT}
        assert httpx2.post(serve.url, content=body, headers=headers).is_success
        wait_until(lambda: work.lines("transition"))
        assert [serve.stop(), work.stop()] == [0, 0]
    traces = b"".join(body for path, body in collector.received if path == "/v1/traces")
    for word in (b"receive", b"handle log", b"evt_exported", bytes.fromhex(TRACE)):
        assert word in traces
    assert b"identity-webhooks" in traces


@takes_long
def test_an_unreachable_collector_costs_only_spans(tmp_path: Path) -> None:
    """A collector that is down or silent loses no event and does not delay the shutdown."""
    with open_sandbox(tmp_path) as ground, socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (1, silent.getsockname()[1]):
            address = f"http://127.0.0.1:{port}"
            serve = ground.start("serve", OTEL_EXPORTER_OTLP_ENDPOINT=address).ready()
            body = event(id=f"evt_unsent{port}")
            assert httpx2.post(serve.url, content=body, headers=signed(body)).is_success
            # The exporter's own retries would take longer than this waits.
            assert serve.stop() == 0
            assert b"Traceback" not in serve.out + serve.err
