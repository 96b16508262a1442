"""The receiver verifies, then parses, then admits, in this order."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from service.config import Livemode
from service.errors import Rejected, RejectionReason, Unavailable, UnavailableReason
from service.inbox.admission import Admission, Inbox, Outcome
from service.inbox.receiver import Receipt, Receiver
from service.stripe.events import Event, Ignored, IgnoredReason
from service.stripe.signatures import fingerprint, sign
from service.transitions.thin_notification import Notification
from service.transitions.transition import SessionChange, make_change
from tests.support.harness import NOW, SECRET, event, thin_event

VERIFIED = event("verified", status="verified", metadata={"a": "b"})
ADMITTED = Admission(Outcome.ADMITTED, 3, "processing", after_final=False)


class FakeInbox(Inbox):
    """Records what it is given, and answers as configured."""

    def __init__(self, answer: Admission | Unavailable = ADMITTED) -> None:
        self.admitted: list[tuple[Event, SessionChange]] = []
        self.noted: list[Notification] = []
        self._answer = answer

    async def admit(self, event: Event, change: SessionChange) -> Admission:
        """Record an event."""
        self.admitted.append((event, change))
        return self._answered()

    async def note(self, notification: Notification) -> Admission:
        """Record a notification."""
        self.noted.append(notification)
        return self._answered()

    def _answered(self) -> Admission:
        if isinstance(self._answer, Unavailable):
            raise self._answer
        return self._answer


async def receive(
    inbox: FakeInbox,
    body: bytes,
    *,
    signature: bytes | None = None,
    livemode: Livemode = Livemode.BOTH,
    now: float = NOW,
    **changes: Any,
) -> Receipt:
    """Receive *body*, with a valid signature unless one is given."""
    receiver = Receiver(inbox, tolerance_s=300, livemode=livemode, account_name="shop", **changes)
    if signature is None:
        signature = sign(body, SECRET, NOW).encode()
    return await receiver.receive(body, signature, [SECRET], now=now, endpoint="acme")


async def test_a_genuine_event_is_admitted() -> None:
    """The receipt has the event, the change and the decision."""
    inbox = FakeInbox()

    receipt = await receive(inbox, VERIFIED)

    [(parsed, change)] = inbox.admitted
    assert receipt == Receipt(Outcome.ADMITTED, fingerprint(SECRET), parsed, change, ADMITTED)
    assert change == make_change(parsed, endpoint="acme", account_name="shop")
    assert (change.origin, change.endpoint, change.account_name) == ("webhook", "acme", "shop")
    assert (change.session_id, change.current, change.metadata) == ("vs_1", "verified", {"a": "b"})


@pytest.mark.parametrize(
    "sent",
    [b"", b"[", b"[]", b"{}", event(envelope={"id": 1}), VERIFIED],
    ids=["empty", "no JSON", "no event", "incomplete", "mistyped", "genuine"],
)
@pytest.mark.parametrize(
    ("signature", "now", "reason"),
    [
        (b"", NOW, RejectionReason.SIGNATURE_MISSING),
        (b"junk", NOW, RejectionReason.SIGNATURE_MALFORMED),
        (b"t=1,v1=" + b"0" * 64, NOW, RejectionReason.SIGNATURE_MISMATCH),
        (None, NOW + 301, RejectionReason.TIMESTAMP_TOO_OLD),
        (None, NOW - 301, RejectionReason.TIMESTAMP_TOO_NEW),
    ],
    ids=["missing", "malformed", "mismatch", "old", "new"],
)
async def test_nothing_is_parsed_before_it_is_verified(
    sent: bytes, signature: bytes | None, now: float, reason: RejectionReason
) -> None:
    """With a wrong signature the reason is the signature's, whatever the body is."""
    inbox = FakeInbox()

    with pytest.raises(Rejected) as refused:
        await receive(inbox, sent, signature=signature, now=now)

    assert (refused.value.reason, inbox.admitted) == (reason, [])


async def test_other_events_are_ignored() -> None:
    """An event of another type is ignored; the receipt has the reason and the matching secret."""
    inbox = FakeInbox()

    receipt = await receive(inbox, event("charge.succeeded"))

    ignored = Ignored(IgnoredReason.OTHER_TYPE, "evt_1", "charge.succeeded")
    assert receipt == Receipt(Outcome.IGNORED, fingerprint(SECRET), ignored)
    assert inbox.admitted == []


QUEUED = Admission(Outcome.QUEUED, 0, None, after_final=False)


@pytest.mark.parametrize(
    "word", ["canceled", "created", "processing", "redacted", "requires_input", "verified"]
)
async def test_a_thin_event_of_a_session_is_noted(word: str) -> None:
    """What is needed to fetch the snapshot event is handed to the inbox."""
    inbox = FakeInbox(QUEUED)

    receipt = await receive(inbox, thin_event(word, context="acct_1"), has_api_key=lambda _: True)

    [notification] = inbox.noted
    assert (receipt.outcome, receipt.notification) == (Outcome.QUEUED, notification)
    assert (notification.event_id, notification.session_id) == ("evt_thin_1", "vs_1")
    assert notification.event_type == f"identity.verification_session.{word}"
    assert (notification.context, notification.livemode) == ("acct_1", False)
    assert (notification.endpoint, notification.account_name) == ("acme", "shop")
    assert inbox.admitted == []


@pytest.mark.parametrize("is_live", [True, False])
async def test_a_thin_event_without_an_api_key_is_unavailable(is_live: bool) -> None:
    """Without a key of its mode it gets no 200, so that Stripe sends it again."""
    inbox = FakeInbox()
    body = thin_event(livemode=is_live)

    with pytest.raises(Unavailable) as undecided:
        await receive(inbox, body, has_api_key=lambda asked: asked is not is_live)

    assert (undecided.value.reason, inbox.noted) == (UnavailableReason.API_KEY_MISSING, [])
    await receive(inbox, body, has_api_key=lambda asked: asked is is_live)
    assert len(inbox.noted) == 1


SENT: dict[str, Callable[[bool | None], bytes]] = {
    "in the envelope": lambda is_live: event(envelope={"livemode": is_live}),
    "in the session": lambda is_live: event(livemode=is_live, envelope={"livemode": None}),
    "in a thin event": lambda is_live: thin_event(livemode=is_live),
}
RECEIVED: dict[Livemode, set[bool | None]] = {
    Livemode.BOTH: {True, False, None},
    Livemode.LIVE: {True, None},
    Livemode.TEST: {False},
}


@pytest.mark.parametrize("livemode", Livemode)
@pytest.mark.parametrize("is_live", [True, False, None])
@pytest.mark.parametrize("send", SENT.values(), ids=SENT)
async def test_livemode(
    livemode: Livemode, is_live: bool | None, send: Callable[[bool | None], bytes]
) -> None:
    """Events of a mode that is not received are ignored, those of others handed on with theirs."""
    inbox, sent = FakeInbox(), send(is_live)

    receipt = await receive(inbox, sent, livemode=livemode, has_api_key=lambda _: True)

    is_received = is_live in RECEIVED[livemode]
    assert len(inbox.admitted) + len(inbox.noted) == is_received
    assert {change.livemode for _, change in inbox.admitted} <= {is_live}
    if not is_received:
        event_id, event_type = json.loads(sent)["id"], json.loads(sent)["type"]
        assert receipt.event == Ignored(IgnoredReason.LIVEMODE, event_id, event_type, "vs_1")
        assert receipt.outcome is Outcome.IGNORED


async def test_no_decision_is_no_receipt() -> None:
    """`Unavailable` from admission is raised, and not replaced by an answer."""
    with pytest.raises(Unavailable) as undecided:
        await receive(FakeInbox(Unavailable(UnavailableReason.REDIS_SLOW)), VERIFIED)

    assert undecided.value.reason is UnavailableReason.REDIS_SLOW
