"""Tracing around the receiver and the handlers: each call of either in a span.

Used only where tracing is configured; how spans are made is in `telemetry.tracing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..delivery.sources import Item, log_fields
from ..handlers import AnyHandler, wrap
from ..inbox.receiver import Receipt, Receiver
from ..secret import Secret
from ..stripe.events import Ignored
from ..telemetry.tracing import Tracing


class TracedReceiver(Receiver):
    """A receiver that handles each request in a span."""

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
        other_secrets: Iterable[Secret[bytes]] = (),
        traceparent: str | None = None,
    ) -> Receipt:
        """Receive *body* in a span, of which the handlers' spans will be children."""
        with self._tracing.receive_span(traceparent) as (span, inner_traceparent):
            receipt = await super().receive(
                body,
                signature,
                secrets,
                now=now,
                endpoint=endpoint,
                other_secrets=other_secrets,
                traceparent=inner_traceparent,
            )
            span.set_attribute("outcome", receipt.outcome)
            event = receipt.event
            if isinstance(event, Ignored):
                span.set_attribute("event_type", event.event_type)
            elif decided := receipt.change or receipt.notification:
                span.set_attributes(
                    {
                        "event_id": decided.event_id,
                        "event_type": decided.event_type,
                        "session_id": decided.session_id,
                    }
                )
            return receipt


def trace_handlers(tracing: Tracing, handlers: Mapping[str, AnyHandler]) -> dict[str, AnyHandler]:
    """Return *handlers* with each call in a span that is a child of the receiver's."""
    return {name: _trace(tracing, name, handler) for name, handler in handlers.items()}


def _trace(tracing: Tracing, name: str, handler: AnyHandler) -> AnyHandler:
    async def handle(item: Item, /) -> None:
        attributes = {**log_fields(item), "event_type": item.event_type}
        with tracing.handler_span(name, item.traceparent or None, attributes):
            await handler(item)

    return wrap(handler, handle)
