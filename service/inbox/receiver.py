"""Verify, parse, admit: this page is the specification of what becomes of a request.

It knows nothing of HTTP (`web` does), of Redis (`admission` does) and of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from ..config import Livemode
from ..errors import Unavailable, UnavailableReason
from ..secret import Secret
from ..stripe.events import Event, Ignored, IgnoredReason, ThinEvent, parse
from ..stripe.signatures import verify
from ..transitions.thin_notification import Notification, make_notification
from ..transitions.transition import SessionChange, make_change
from .admission import Admission, Inbox, Outcome


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What became of a genuine request.

    Attributes:
        outcome: What is answered.
        secret_fingerprint: Which signing secret matched.
        event: What was parsed.
        change: The part of a snapshot event that may leave the process.
        admission: The decision on it; None when ignored.
        notification: What is remembered of a thin event.
    """

    outcome: Outcome
    secret_fingerprint: str
    event: Event | ThinEvent | Ignored
    change: SessionChange | None = None
    admission: Admission | None = None
    notification: Notification | None = None


class Receiver:
    """Receives signed bytes.

    Args:
        inbox: Admits events.
        tolerance_s: How far a signature's timestamp may lie from now, in seconds.
        livemode: Whether live events, test events or both are received.
        account_name: The configured name of our own account, empty for none.
        has_api_key: Says whether events of live mode (True) or test mode (False) can be fetched
            from Stripe's API.
    """

    def __init__(
        self,
        inbox: Inbox,
        *,
        tolerance_s: float,
        livemode: Livemode,
        account_name: str = "",
        has_api_key: Callable[[bool], bool] = lambda _: False,
    ) -> None:
        self._inbox = inbox
        self._tolerance_s = tolerance_s
        self._livemode = livemode
        self._account_name = account_name or None
        self._has_api_key = has_api_key

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
        """Return what became of *body*.

        Args:
            body: The bytes that were signed.
            signature: The header that signs them; None where it is missing.
            secrets: The endpoint's signing secrets.
            now: Unix time in seconds.
            endpoint: The endpoint's name, empty for the default one; it goes into the change.
            other_secrets: The signing secrets of all other endpoints, tried where none matches.
            traceparent: The trace that this request is part of; it goes into the change.

        Raises:
            Rejected: The request is refused as it stands; nothing was remembered.
            Unavailable: Nothing is decided; the same bytes may come again.
        """
        payload = verify(
            body,
            signature,
            secrets,
            now=now,
            tolerance_s=self._tolerance_s,
            other_secrets=other_secrets,
        )
        event = self._relevant(parse(payload))
        if isinstance(event, Ignored):
            return Receipt(Outcome.IGNORED, payload.secret_fingerprint, event)
        trace = msgspec.UNSET if traceparent is None else traceparent
        if isinstance(event, ThinEvent):
            if not self._has_api_key(event.is_live):
                # After a 200 Stripe would never send it again, and no worker could fetch it.
                raise Unavailable(UnavailableReason.API_KEY_MISSING)
            notification = make_notification(
                event,
                received_at=now,
                endpoint=endpoint or None,
                account_name=self._account_name,
                traceparent=trace,
            )
            admission = await self._inbox.note(notification)
            return Receipt(
                admission.outcome,
                payload.secret_fingerprint,
                event,
                admission=admission,
                notification=notification,
            )
        change = make_change(
            event,
            endpoint=endpoint or None,
            account_name=self._account_name,
            traceparent=trace,
        )
        admission = await self._inbox.admit(event, change)
        return Receipt(admission.outcome, payload.secret_fingerprint, event, change, admission)

    def _relevant(self, event: Event | ThinEvent | Ignored) -> Event | ThinEvent | Ignored:
        """Ignore events of the mode that is not received; an event without `livemode` is live."""
        if isinstance(event, Ignored) or self._livemode is Livemode.BOTH:
            return event
        if event.is_live == (self._livemode is Livemode.LIVE):
            return event
        if isinstance(event, ThinEvent):
            about = event.event_id, event.event_type, event.session_id
        else:
            about = event.id, event.type, event.session.id
        return Ignored(IgnoredReason.LIVEMODE, *about)
