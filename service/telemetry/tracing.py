"""OpenTelemetry spans from the POST to each handler call.

Off unless OpenTelemetry's own variables name a collector. Needs the `otel` extra. The attributes
of a span are an allow list: ids, types and words from closed lists, never a header, an address or
a body. Traced objects are wrapped in `runtime.traced`; without a collector nothing here runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from .. import __version__
from ..errors import ApiError, Rejected, Unavailable

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVICE_NAME = "identity-webhooks"
COLLECTORS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_S = 2.0

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Tracing:
    """Creates spans and propagates their context (W3C Trace Context)."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        self._kinds = trace.SpanKind
        self._error = trace.StatusCode.ERROR
        self._tracer = provider.get_tracer(SERVICE_NAME, __version__)
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def receive_span(self, traceparent: str | None) -> Iterator[tuple[Span, str | None]]:
        """Enter a span of the receiver; yield it, and the `traceparent` of what follows from it."""
        parent = self._extract(traceparent)
        with self._span("receive", self._kinds.SERVER, parent) as span:
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier)
            yield span, carrier.get("traceparent")

    @contextmanager
    def handler_span(
        self, name: str, traceparent: str | None, attributes: Mapping[str, str | int]
    ) -> Iterator[None]:
        """Enter a span of a handler call, whose parent is the receiver's span."""
        parent = self._extract(traceparent)
        with self._span(f"handle {name}", self._kinds.CONSUMER, parent) as span:
            span.set_attributes({"handler": name, **attributes})
            yield

    @contextmanager
    def api_span(self, endpoint: str) -> Iterator[None]:
        """Enter a span of one reading of Stripe's API, a child of the span it is made in."""
        with self._span(f"GET {endpoint}", self._kinds.CLIENT, None) as span:
            span.set_attribute("endpoint", endpoint)
            yield

    def _extract(self, traceparent: str | None) -> Context:
        return self._propagator.extract({"traceparent": traceparent} if traceparent else {})

    @contextmanager
    def _span(self, name: str, kind: Any, parent: Context | None) -> Iterator[Span]:
        """Enter a span whose parent is in a context; where that is None, it is the present span."""
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            kind=kind,
            # The message of an exception may quote a request.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except (ApiError, Rejected, Unavailable) as error:
                span.set_attribute("outcome", error.reason)
                raise
            except BaseException as error:
                span.set_attribute("error", type(error).__name__)
                span.set_status(self._error)
                raise


@contextmanager
def open_tracing(environ: Mapping[str, str]) -> Iterator[Tracing | None]:
    """Yield a `Tracing` that sends spans to the collector; None if no collector is named."""
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if is_off or not any(environ.get(name) for name in COLLECTORS):
        yield None
        return
    try:
        provider, spans = _open_provider(environ)
    except ImportError:
        log.warning("tracing.unavailable", missing="the otel extra is not installed")
        yield None
        return
    try:
        yield Tracing(provider)
    finally:
        # A collector that does not answer must not delay the shutdown: its last spans are lost.
        shutdown = threading.Thread(target=spans.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(FLUSH_S)


def _open_provider(environ: Mapping[str, str]) -> tuple[TracerProvider, Any]:
    from opentelemetry import trace  # noqa: PLC0415 - an extra
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    attributes = {"service.version": __version__}
    is_named = "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not (is_named or environ.get("OTEL_SERVICE_NAME")):
        attributes["service.name"] = SERVICE_NAME
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    spans = BatchSpanProcessor(OTLPSpanExporter())
    provider.add_span_processor(spans)
    # So that custom handlers can create spans with OpenTelemetry's API alone.
    trace.set_tracer_provider(provider)
    return provider, spans
