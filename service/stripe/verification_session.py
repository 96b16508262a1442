"""Stripe's VerificationSession, every field of it, with its own parts.

What it shares with the report lives in `reports`; what its states mean, in `transitions`.
"""

from __future__ import annotations

import msgspec

from ..secret import Secret
from .verification_report import (
    Address,
    CalendarDate,
    DocumentOptions,
    EpochSeconds,
    HiddenRepr,
    IdNumberOptions,
    Source,
    VerificationReport,
    read,
)


class LastError(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """Why the latest attempt failed; both fields None means that nothing did.

    `code` is open: those of the checks (see `reports.CheckError`) and of the visit itself, such
    as `abandoned`, `consent_declined` or `under_supported_age`. `reason` is worded for the person.
    """

    shown = ("code",)

    code: str | None = None
    reason: Secret[str] | None = None


class Redaction(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How far Stripe is with erasing the session: `processing`, `validated`, `redacted` or new."""

    status: str | None = None


class EmailOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the e-mail check demands."""

    require_verification: bool | None = None


class PhoneOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the phone check demands."""

    require_verification: bool | None = None


class MatchingOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How closely document and provided details must agree: `none`, `similar` or new."""

    dob: str | None = None
    name: str | None = None


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The checks a session asks for, and how strict each is."""

    document: DocumentOptions | None = None
    email: EmailOptions | None = None
    id_number: IdNumberOptions | None = None
    matching: MatchingOptions | None = None
    phone: PhoneOptions | None = None


class ProvidedDetails(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """What you told Stripe about the person beforehand; expanded only, never in an event."""

    email: Secret[str] | None = None
    phone: Secret[str] | None = None


class RelatedPerson(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """The Person of a connected account whom the session is about: the ids of both."""

    account: str | None = None
    person: str | None = None


class VerifiedOutputs(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """What the checks established about the person; expanded only, never in an event.

    `dob` and `id_number` need a restricted key besides; of a `us_ssn` only four digits are kept.
    """

    address: Address | None = None
    dob: CalendarDate | None = None
    email: Secret[str] | None = None
    first_name: Secret[str] | None = None
    id_number: Secret[str] | None = None
    id_number_type: str | None = None
    last_name: Secret[str] | None = None
    phone: Secret[str] | None = None
    sex: Secret[str] | None = None
    unparsed_place_of_birth: Secret[str] | None = None
    unparsed_sex: Secret[str] | None = None


class VerificationSession(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """One person's way through Stripe Identity, as an event or the API shows it.

    Words are open, unknown ones stay text: `status` is `requires_input`, `processing`, `verified`
    or `canceled`; `type` is `document`, `id_number` or `verification_flow`.

    `client_secret` opens the session in a browser or app, once, within 24 hours; `url` does so on
    Stripe's page, once, within 48. Neither may be stored, logged or passed to anyone but the
    person. `metadata` and `client_reference_id` are yours, and `repr` keeps them to itself.
    https://docs.stripe.com/api/identity/verification_sessions/object
    """

    shown = (
        "id",
        "status",
        "type",
        "last_error_code",
        "redaction_status",
        "report_id",
        "livemode",
        "created",
    )

    id: str
    status: str
    object: str | None = None
    client_reference_id: str | None = None
    client_secret: Secret[str] | None = None
    created: EpochSeconds | None = None
    last_error: LastError | None = None
    last_verification_report: str | VerificationReport | None = None
    livemode: bool | None = None
    metadata: dict[str, str] | None = None
    options: SessionOptions | None = None
    provided_details: ProvidedDetails | None = None
    redaction: Redaction | None = None
    related_customer: str | None = None
    related_customer_account: str | None = None
    related_person: RelatedPerson | None = None
    type: str | None = None
    url: Secret[str] | None = None
    verification_flow: str | None = None
    verified_outputs: VerifiedOutputs | None = None

    @classmethod
    def from_json(cls, source: Source) -> VerificationSession:
        """Read JSON, a mapping or the SDK's session; raise a ValueError without any of it."""
        return read(cls, source)

    @property
    def last_error_code(self) -> str | None:
        """The code of `last_error`, if any."""
        return self.last_error.code if self.last_error else None

    @property
    def redaction_status(self) -> str | None:
        """The status of `redaction`, None while nothing is being erased."""
        return self.redaction.status if self.redaction else None

    @property
    def report_id(self) -> str | None:
        """The id of the latest report, whether the report itself came along or not."""
        report = self.last_verification_report
        return report.id if isinstance(report, VerificationReport) else report
