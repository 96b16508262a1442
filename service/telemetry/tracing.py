"""Traces, from the POST to each handler: off unless OpenTelemetry's own variables name a collector.

Needs the `otel` extra. What a span tells is an allow list: ids, types and words, never a header,
an address or a body. What is traced is wrapped in `runtime.traced`: a process without a collector
runs none of this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from .. import __version__
from ..errors import Rejected, Unavailable

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
    def receive_span(self, traceparent: str | None) -> Iterator[tuple[Span, str | None]]:
        """Be in a span of the receiver's; yield it, and how it is told to whoever comes after."""
        with self._span("receive", self._kinds.SERVER, traceparent) as span:
            carrier: dict[str, str] = {}
            self._form.inject(carrier)
            yield span, carrier.get("traceparent")

    @contextmanager
    def handler_span(
        self, name: str, traceparent: str | None, attributes: Mapping[str, str | int]
    ) -> Iterator[None]:
        """Be in a span of a handler's call, which goes on from the receiver's."""
        with self._span(f"handle {name}", self._kinds.CONSUMER, traceparent) as span:
            span.set_attributes({"handler": name, **attributes})
            yield

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


@contextmanager
def open_tracing(environ: Mapping[str, str]) -> Iterator[Tracing | None]:
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
