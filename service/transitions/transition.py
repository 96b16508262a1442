"""One change of one session: the data that leaves the process, and that handlers receive."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import ClassVar, NoReturn

import msgspec

from ..stripe.events import Event
from ..stripe.stripe_object import HiddenRepr
from ..stripe.verification_session import RelatedPerson
from .lifecycle import current_status

# No session id of Stripe's begins like this: after `vs_` they have letters and digits only. Events
# are signed, so only a holder of the signing secret can send one with such an id.
SELFTEST_PREFIX = "vs_selftest_"


class Origin(StrEnum):
    """How an event first reached us."""

    WEBHOOK = "webhook"
    THIN = "thin"
    EVENTS_API = "events_api"


class ReadOnlyDict(dict[str, str]):
    """A dict that cannot be changed, so that a handler cannot change what its next attempt sees.

    A copy of it is an ordinary dict.
    """

    def __reduce__(self) -> tuple[type[dict[str, str]], tuple[dict[str, str]]]:
        return dict, (dict(self),)

    def _refuse(self, *arguments: object, **keywords: object) -> NoReturn:
        raise TypeError("a transition cannot be changed: change a copy, dict(…)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


class SessionChange(HiddenRepr, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What one event says about its session: the allow list of data that leaves the process.

    `metadata` and `client_reference_id` are yours: handlers receive them, `repr` hides them.

    Attributes:
        event_id: Stripe's event id; the id of the message on every queue.
        event_type: Stripe's event type.
        occurred_at: When Stripe created the event (whole seconds, UTC).
        livemode: False in test mode; None if the event does not say.
        account: The connected account of the event; None for your own account.
        account_name: The name that ACCOUNT_NAME gives your own account; None without one.
        context: Stripe's authentication context of the event.
        origin: How the event first reached us: `webhook`, `thin` or `events_api`.
        endpoint: The endpoint name in the URL that received the event; None for the default one.
        session_id: The `vs_…` id.
        session_type: `document`, `id_number`, `verification_flow` or a newer word.
        current: The status after this change; `redacted` once redaction has finished.
        stripe_status: Stripe's own status, which redaction does not change.
        last_error_code: Stripe's code for why the latest attempt failed.
        redaction_status: `processing`, `redacted`, `validated` or a newer word.
        report_id: The latest verification report's `vr_…` id.
        client_reference_id: Your own reference, as you gave it to Stripe.
        related_customer: A `cus_…` id.
        related_customer_account: The id of an account acting as customer.
        related_person: The Person of a connected account that the session is about.
        metadata: Your own keys and values, as you gave them to Stripe.
        traceparent: The W3C Trace Context in which it was received; absent without tracing.
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
    """One change of one session, as every handler receives it. Holds no secret.

    Attributes:
        previous: The status before this change; None if the session was not known before.
        sequence: 1, 2, 3 … without a gap within an *epoch*.
        epoch: When the numbering began, in Unix milliseconds. It begins with the record of the
            session, and again, with a later epoch, where Redis may have lost transitions.
        expected: False if Stripe's lifecycle has no such change (see `NEXT_STATUSES`): an earlier
            event is missing, or staff approved the session on review.
        reversal: Whether a final status changed into another one that is not `redacted`: staff
            overrode the result.
        replay: The name of the replay that an operator asked for; None for a first delivery.
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
    """Return the data of an event that may leave the process."""
    session = event.session
    return SessionChange(
        event_id=event.id,
        event_type=event.type,
        occurred_at=datetime.fromtimestamp(event.created, UTC),
        livemode=event.said_livemode,
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
    """Say whether a session was made by `selftest`. No handler receives its transitions."""
    return session_id.startswith(SELFTEST_PREFIX)
