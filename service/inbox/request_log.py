"""The request log: each answered request is counted, and written as one line.

Requests that were answered within one loop turn are logged together after it, so that no answer
waits for the log. Which values may stand in a line at all is decided in `redaction`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import structlog

from ..errors import Rejected, RejectionReason, Unavailable, UnavailableReason
from ..stripe.events import EVENT_TYPE_PREFIX, THIN_EVENT_TYPE_PREFIX, Event, Ignored, ThinEvent
from ..telemetry import metrics
from ..telemetry.logs import write_line
from ..transitions.lifecycle import TYPE_RANKS
from ..transitions.transition import is_selftest
from .admission import Outcome
from .decision_log import record_decision
from .receiver import Receipt

Fields = dict[str, Any]

SELFTEST = "selftest"
_WORDS = [event_type.removeprefix(EVENT_TYPE_PREFIX) for event_type in TYPE_RANKS]
_SHORT_TYPES = {
    prefix + word: word for prefix in (EVENT_TYPE_PREFIX, THIN_EVENT_TYPE_PREFIX) for word in _WORDS
}

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class AnsweredRequest(msgspec.Struct, frozen=True, gc=False):
    """One answered request.

    Attributes:
        result: What became of it.
        request_id: Its id, ours or a balancer's.
        body_bytes: The size of its body; 0 when that was not read to its end.
        duration_s: Seconds from its headers to its answer.
        endpoint: The name of the endpoint; None for the default one, or where it is not ours.
    """

    result: Receipt | Rejected | Unavailable
    request_id: str
    body_bytes: int
    duration_s: float
    endpoint: str | None = None


class _TurnCounts:
    """What is counted of the requests of one loop turn; one by one it would cost more."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.secrets: list[str] = []
        self.durations_s: list[float] = []
        self.body_bytes: list[int] = []
        self.ages_s: list[float] = []

    def add_to_metrics(self, now: float) -> None:
        """Add all to the metrics; *now* is Unix time in seconds."""
        for (outcome, event_type), times in Counter(self.events).items():
            metrics.EVENTS.labels(outcome, event_type).inc(times)
        for fingerprint, times in Counter(self.secrets).items():
            metrics.SECRET_MATCHES.labels(fingerprint).inc(times)
        metrics.RECEIVE_SECONDS.observe_all(self.durations_s)
        metrics.BODY_BYTES.observe_all(self.body_bytes)
        metrics.EVENT_AGE_SECONDS.observe_all(self.ages_s)
        if self.ages_s:
            metrics.LAST_EVENT.set(now)


class RequestLog:
    """Counts answered requests, and writes the line of each."""

    def __init__(self) -> None:
        self._requests: list[AnsweredRequest] = []
        # Prometheus sees no increase in a series that appears with its first count.
        for reason in (*RejectionReason, *UnavailableReason):
            metrics.EVENTS.labels(reason, metrics.OTHER_TYPE)
        for outcome in Outcome:
            for event_type in (*_WORDS, metrics.OTHER_TYPE):
                metrics.EVENTS.labels(outcome, event_type)

    def add(self, request: AnsweredRequest) -> None:
        """Record *request* as soon as this loop turn is over."""
        self._requests.append(request)
        if len(self._requests) == 1:
            asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn(self) -> None:
        requests, self._requests = self._requests, []
        self.record(requests)

    def record(self, requests: Sequence[AnsweredRequest]) -> None:
        """Count *requests*, and write the line of each."""
        counts = _TurnCounts()
        now = time.time()
        for request in requests:
            try:
                self._record_one(request, now, counts)
            except Exception:  # noqa: BLE001, S112 - a line that cannot be written costs no other
                continue
        with contextlib.suppress(Exception):
            counts.add_to_metrics(now)

    def _record_one(self, request: AnsweredRequest, now: float, counts: _TurnCounts) -> None:
        result = request.result
        counts.durations_s.append(request.duration_s)
        if isinstance(result, Receipt):
            self._record_receipt(result, request, now, counts)
            return
        counts.events.append((result.reason, metrics.OTHER_TYPE))
        if isinstance(result, Rejected):
            log.warning(
                "event.rejected",
                reason=result.reason,
                field=result.field,
                **_request_fields(request),
            )
        else:
            log.error("event.unavailable", reason=result.reason, **_request_fields(request))

    def _record_receipt(
        self, receipt: Receipt, request: AnsweredRequest, now: float, counts: _TurnCounts
    ) -> None:
        event = receipt.event
        event_type = event.type if isinstance(event, Event) else event.event_type
        short_type = _SHORT_TYPES.get(event_type, metrics.OTHER_TYPE)
        change = receipt.change
        is_test = change is not None and is_selftest(change.session_id)
        # That an event of a self-test has expired is no loss to warn of.
        outcome = SELFTEST if is_test and receipt.outcome is Outcome.EXPIRED else receipt.outcome
        counts.events.append((outcome, short_type))
        counts.secrets.append(receipt.secret_fingerprint)
        counts.body_bytes.append(request.body_bytes)
        if not (is_test or isinstance(event, Ignored)):
            counts.ages_s.append(max(0.0, now - event.created))
        fields, is_warning = _receipt_fields(receipt)
        fields |= _request_fields(request)
        fields["secret_fingerprint"] = receipt.secret_fingerprint
        fields["event"] = f"event.{receipt.outcome}"
        write_line("warning" if is_warning else "info", fields)


def _receipt_fields(receipt: Receipt) -> tuple[Fields, bool]:
    """Return the fields of what became of an event, and whether the line is a warning."""
    event = receipt.event
    if isinstance(event, Event) and receipt.change and receipt.admission:
        return record_decision(event, receipt.change, receipt.admission)
    fields: Fields = {}
    if isinstance(event, Ignored):
        fields["reason"] = event.reason
        fields |= {"event_id": event.event_id, "event_type": event.event_type}
        if event.session_id:
            fields["session_id"] = event.session_id
    elif isinstance(event, ThinEvent):
        fields |= {"event_id": event.event_id, "event_type": event.event_type}
        fields |= {"session_id": event.session_id, "livemode": event.is_live}
        fields["context"] = event.context
    return fields, False


def _request_fields(request: AnsweredRequest) -> Fields:
    """Return the fields that every line has."""
    return {
        "endpoint": request.endpoint,
        "request_id": request.request_id,
        "body_bytes": request.body_bytes,
        "duration_ms": round(request.duration_s * 1000, 3),
    }
