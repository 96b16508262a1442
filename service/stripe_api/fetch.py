"""The handler `fetch`: from a thin notification to an event that is admitted like a webhook's.

A worker delivers notifications to it as it delivers transitions to other handlers: those of one
session one after the other, with retries and dead letters, and with one circuit breaker for each
key and context. So a revoked key or a deauthorised account does not stop the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog

from ..errors import ApiError, ApiErrorReason, Unavailable, Undeliverable, Unreachable
from ..inbox.admission import Admission, Inbox
from ..inbox.decision_log import record_decision
from ..stripe.events import Event
from ..telemetry import metrics
from ..transitions.thin_notification import Notification
from ..transitions.transition import Origin, SessionChange, make_change
from .client import EVENTS_KEPT_S, StripeApi
from .rounds import Rounds, open_rounds

# Below the worker's time limit of a call: that a notification waited for its turn while Stripe
# answered slowly must not count as a failed attempt at it.
DEADLINE_S = 80.0
# These concern one notification; all other reasons, each that has the same key and context.
_OF_ONE = {ApiErrorReason.NOT_FOUND, ApiErrorReason.UNEXPECTED}

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Fetcher:
    """Fetches the events of notifications and admits them; made by `open_fetcher`."""

    def __init__(self, rounds: Rounds, inbox: Inbox) -> None:
        self._rounds = rounds
        self._inbox = inbox

    async def __call__(self, notification: Notification, /) -> None:
        """Fetch the event of *notification*, and admit it.

        Raises:
            ApiError: There is neither event nor session, or the answer is not what was asked for.
            Undeliverable: As `Unreachable`, of Stripe's API, which has deleted the event by now.
            Unreachable: Stripe's API or Redis does not answer, or refuses this key and context.
        """
        try:
            event = await self._find(notification)
            change = make_change(
                event,
                origin=Origin.THIN,
                endpoint=notification.endpoint,
                account_name=notification.account_name,
                traceparent=notification.traceparent,
            )
            admission = await self._inbox.admit(event, change)
        except (ApiError, Unavailable) as error:
            if error.reason in _OF_ONE:
                raise
            is_kept = notification.created > time.time() - EVENTS_KEPT_S
            if isinstance(error, ApiError) and not is_kept:
                raise Undeliverable("deleted_by_stripe", unreachable=error.reason) from None
            raise Unreachable(error.reason) from None
        _record(notification, event, change, admission)

    async def _find(self, notification: Notification) -> Event:
        with suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE_S):
                return await self._rounds.find(notification)
        raise ApiError(ApiErrorReason.UNREACHABLE)

    def destination(self, notification: Notification) -> str:
        """Return which key and context a notification is fetched with."""
        mode = "live" if notification.livemode else "test"
        return f"{mode} {notification.context}" if notification.context else mode


@asynccontextmanager
async def open_fetcher(api: StripeApi, inbox: Inbox) -> AsyncIterator[Fetcher]:
    """Yield the handler.

    Args:
        api: Stripe's API.
        inbox: Admits events of any age: that was judged when the notification arrived.
    """
    async with open_rounds(api) as rounds:
        yield Fetcher(rounds, inbox)


def _record(
    notification: Notification, event: Event, change: SessionChange, admission: Admission
) -> None:
    """Count and log a fetched event."""
    seconds = max(0.0, time.time() - notification.received_at)
    metrics.FETCH_SECONDS.labels(admission.outcome).observe(seconds)
    fields, is_warning = record_decision(event, change, admission)
    write = log.warning if is_warning else log.info
    write(
        "event.fetched",
        outcome=admission.outcome,
        notification_id=notification.event_id,
        **fields,
        duration_ms=round(seconds * 1000, 3),
    )
