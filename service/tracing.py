"""Traces, from the POST to each handler: off unless OpenTelemetry's own variables name a collector.

Needs the `otel` extra. What a span tells is an allow list: ids, types and words, never a header,
an address or a body. Receivers and handlers are wrapped where processes are put together, so
whoever is not traced pays nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from . import __version__
from .errors import Rejected, Unavailable
from .events import Event
from .handlers import Handler, wrapped
from .receiver import Receipt, Receiver
from .secret import Secret
from .transitions import StatusTransition

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVICE_NAME = "identity-webhooks"
COLLECTORS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_S = 2.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Tracing:
    """Makes spans, and carries on those that came from elsewhere."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        self._kinds = trace.SpanKind
        self._error = trace.StatusCode.ERROR
        self._tracer = provider.get_tracer(SERVICE_NAME, __version__)
        self._form = TraceContextTextMapPropagator()

    @contextmanager
    def receiving(self, traceparent: str | None) -> Iterator[tuple[Span, str | None]]:
        """Be in a span of the receiver's; yield it, and how it is told to whoever comes after."""
        with self._span("receive", self._kinds.SERVER, traceparent) as span:
            carrier: dict[str, str] = {}
            self._form.inject(carrier)
            yield span, carrier.get("traceparent")

    def following(self, handlers: Mapping[str, Handler]) -> dict[str, Handler]:
        """Return *handlers* with each call in a span that goes on from the receiver's."""
        return {name: self._following(name, handler) for name, handler in handlers.items()}

    def _following(self, name: str, handler: Handler) -> Handler:
        async def handle(transition: StatusTransition, /) -> None:
            parent = transition.traceparent or None
            with self._span(f"handle {name}", self._kinds.CONSUMER, parent) as span:
                span.set_attributes(
                    {
                        "handler": name,
                        "event_id": transition.event_id,
                        "event_type": transition.event_type,
                        "session_id": transition.session_id,
                        "sequence": transition.sequence,
                    }
                )
                await handler(transition)

        return wrapped(handler, handle)

    @contextmanager
    def _span(self, name: str, kind: Any, traceparent: str | None) -> Iterator[Span]:
        context = self._form.extract({"traceparent": traceparent} if traceparent else {})
        with self._tracer.start_as_current_span(
            name,
            context=context,
            kind=kind,
            # An exception's message may quote a request.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except (Rejected, Unavailable) as error:
                span.set_attribute("outcome", error.reason)
                raise
            except BaseException as error:
                span.set_attribute("error", type(error).__name__)
                span.set_status(self._error)
                raise


class TracedReceiver(Receiver):
    """A receiver with each request in a span."""

    def __init__(self, tracing: Tracing, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._tracing = tracing

    async def receive(
        self,
        body: bytes,
        signature: bytes | None,
        secrets: Sequence[Secret[bytes]],
        *,
        now: float,
        endpoint: str = "",
        others: Iterable[Secret[bytes]] = (),
        traceparent: str | None = None,
    ) -> Receipt:
        """Return what became of *body*; what is handed over goes on from this span."""
        with self._tracing.receiving(traceparent) as (span, told):
            receipt = await super().receive(
                body,
                signature,
                secrets,
                now=now,
                endpoint=endpoint,
                others=others,
                traceparent=told,
            )
            span.set_attribute("outcome", receipt.outcome)
            event = receipt.event
            if isinstance(event, Event):
                span.set_attributes({"event_id": event.id, "event_type": event.type})
            else:
                span.set_attribute("event_type", event.event_type)
            if receipt.change is not None:
                span.set_attribute("session_id", receipt.change.session_id)
            return receipt


@contextmanager
def opened(environ: Mapping[str, str]) -> Iterator[Tracing | None]:
    """Yield what makes spans and sends them where OpenTelemetry's variables say, or nothing."""
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if is_off or not any(environ.get(name) for name in COLLECTORS):
        yield None
        return
    try:
        provider, spans = _sending(environ)
    except ImportError:
        log.warning("tracing.unavailable", missing="the otel extra is not installed")
        yield None
        return
    try:
        yield Tracing(provider)
    finally:
        # A collector that does not answer must not hold up the end: what it misses is lost.
        ending = threading.Thread(target=spans.shutdown, daemon=True)
        ending.start()
        ending.join(FLUSH_S)


def _sending(environ: Mapping[str, str]) -> tuple[TracerProvider, Any]:
    from opentelemetry import trace  # noqa: PLC0415 - an extra
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    named = {"service.version": __version__}
    is_named = "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not (is_named or environ.get("OTEL_SERVICE_NAME")):
        named["service.name"] = SERVICE_NAME
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    spans = BatchSpanProcessor(OTLPSpanExporter())
    provider.add_span_processor(spans)
    # Handlers of one's own may make spans as well, through the API alone.
    trace.set_tracer_provider(provider)
    return provider, spans
