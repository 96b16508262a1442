"""One change of one session: what of an event may leave the process, and what handlers receive."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import ClassVar, NoReturn

import msgspec

from ..stripe.events import Event
from ..stripe.verification_report import HiddenRepr
from ..stripe.verification_session import RelatedPerson
from .lifecycle import current_status

# Stripe's ids are letters and digits behind `vs_`, so no session of Stripe's begins so; and since
# events are signed, nobody but a holder of the signing secret can send one that does.
SELFTEST_PREFIX = "vs_selftest_"


class Origin(StrEnum):
    """How an event came to us first."""

    WEBHOOK = "webhook"
    THIN = "thin"
    EVENTS_API = "events_api"


class ReadOnlyDict(dict[str, str]):
    """A dict that cannot be changed, so that no attempt of a handler changes what the next sees.

    A copy of it is an ordinary dict.
    """

    def __reduce__(self) -> tuple[type[dict[str, str]], tuple[dict[str, str]]]:
        return dict, (dict(self),)

    def _refuse(self, *arguments: object, **keywords: object) -> NoReturn:
        raise TypeError("a transition cannot be changed: change a copy, dict(…)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


class SessionChange(HiddenRepr, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What one event says of its session: the allow list of all that may leave the process.

    `metadata` and `client_reference_id` are yours: handlers receive them, `repr` does not tell.

    Attributes:
        event_id: Stripe's event id; the id of the message on every queue.
        event_type: Stripe's event type.
        occurred_at: When Stripe created the event (whole seconds, UTC).
        livemode: False for test mode; None when the event does not say.
        account: The connected account the event is of; None for one's own.
        account_name: The name that ACCOUNT_NAME gave to one's own account; None without one.
        context: The authentication context of Stripe's that the event is of.
        origin: How the event came first: `webhook`, `thin` or `events_api`.
        endpoint: The name of the endpoint in the URL it came by; None for the default one.
        session_id: The `vs_…` id.
        session_type: `document`, `id_number`, `verification_flow` or a newer word.
        current: The status now; `redacted` once redaction has finished.
        stripe_status: Stripe's own word for the status, which redaction does not hide.
        last_error_code: Why the latest attempt failed, as Stripe's word.
        redaction_status: `processing`, `redacted`, `validated` or a newer word.
        report_id: The latest verification report's `vr_…` id.
        client_reference_id: Your own reference, as you gave it to Stripe.
        related_customer: A `cus_…` id.
        related_customer_account: The id of an account acting as customer.
        related_person: The person and the account it belongs to.
        metadata: Your own keys and values, as you gave them to Stripe.
        traceparent: Where in a trace it was received (W3C Trace Context); absent without one.
    """

    shown: ClassVar[tuple[str, ...]] = ("event_id", "event_type", "session_id", "current")

    event_id: str
    event_type: str
    occurred_at: datetime
    livemode: bool | None = None
    account: str | None = None
    account_name: str | None = None
    context: str | None = None
    origin: str = Origin.WEBHOOK
    endpoint: str | None = None
    session_id: str
    session_type: str | None = None
    current: str
    stripe_status: str | None = None
    last_error_code: str | None = None
    redaction_status: str | None = None
    report_id: str | None = None
    client_reference_id: str | None = None
    related_customer: str | None = None
    related_customer_account: str | None = None
    related_person: RelatedPerson | None = None
    metadata: dict[str, str] | None = None
    traceparent: str | msgspec.UnsetType = msgspec.UNSET


class StatusTransition(SessionChange, frozen=True, kw_only=True, gc=False, omit_defaults=False):
    """One real change of one session, as every handler receives it. Holds no secret.

    Attributes:
        previous: The status before; None when the ledger had no memory of the session.
        sequence: 1, 2, 3 … without a gap within *epoch*.
        epoch: When the numbering began, in Unix milliseconds: with the ledger's record of this
            session, or anew where Redis may have lost transitions. A later one is greater.
        expected: False when no such step is known (see `FOLLOWS`): an earlier event was missed, or
            staff approved the session on review.
        reversal: Whether a final status was changed into another one that is not `redacted`:
            staff have overridden the result.
        replay: Which replay this is part of, when an operator asked for it to come again.
    """

    shown = (*SessionChange.shown, "previous", "sequence", "epoch", "replay")

    previous: str | None = None
    sequence: int
    epoch: int
    expected: bool
    reversal: bool = False
    replay: str | None = None

    def __post_init__(self) -> None:
        if self.metadata is not None:
            msgspec.structs.force_setattr(self, "metadata", ReadOnlyDict(self.metadata))


def make_change(
    event: Event,
    *,
    origin: Origin = Origin.WEBHOOK,
    endpoint: str | None = None,
    account_name: str | None = None,
    traceparent: str | msgspec.UnsetType = msgspec.UNSET,
) -> SessionChange:
    """Return what of an event may leave the process, and how the event came."""
    session = event.session
    return SessionChange(
        event_id=event.id,
        event_type=event.type,
        occurred_at=datetime.fromtimestamp(event.created, UTC),
        livemode=event.livemode,
        account=event.account,
        account_name=account_name,
        context=event.context,
        origin=origin,
        endpoint=endpoint,
        session_id=session.id,
        session_type=session.type,
        current=current_status(event.type, session),
        stripe_status=session.status,
        last_error_code=session.last_error_code,
        redaction_status=session.redaction_status,
        report_id=session.report_id,
        client_reference_id=session.client_reference_id,
        related_customer=session.related_customer,
        related_customer_account=session.related_customer_account,
        related_person=session.related_person,
        metadata=session.metadata,
        traceparent=traceparent,
    )


def is_selftest(session_id: str) -> bool:
    """Say whether a session is one of `selftest`'s own: settled by every handler, shown to none."""
    return session_id.startswith(SELFTEST_PREFIX)
