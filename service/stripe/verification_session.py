"""Stripe's VerificationSession, with all its fields.

What it shares with the report is in `verification_report`; what its statuses mean, in
`transitions.lifecycle`.
"""

from __future__ import annotations

import msgspec

from ..secret import Secret
from .stripe_object import EpochSeconds, HiddenRepr, Source, read
from .verification_report import (
    Address,
    CalendarDate,
    DocumentOptions,
    IdNumberOptions,
    VerificationReport,
)


class LastError(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """Why the latest attempt failed; both fields are None if it did not.

    `code` may be any text: those of the checks (see `CheckError`) and others, such as `abandoned`,
    `consent_declined` or `under_supported_age`. `reason` is written for the person.
    """

    shown = ("code",)

    code: str | None = None
    reason: Secret[str] | None = None


class Redaction(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """State of the redaction by Stripe: `processing`, `validated`, `redacted` or newer."""

    status: str | None = None


class EmailOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the e-mail check requires."""

    require_verification: bool | None = None


class PhoneOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the phone check requires."""

    require_verification: bool | None = None


class MatchingOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How closely document and provided details must agree: `none`, `similar` or newer."""

    dob: str | None = None
    name: str | None = None


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The checks that a session requires, and how strict each is."""

    document: DocumentOptions | None = None
    email: EmailOptions | None = None
    id_number: IdNumberOptions | None = None
    matching: MatchingOptions | None = None
    phone: PhoneOptions | None = None


class ProvidedDetails(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """What you have given Stripe about the person. Only if expanded, never in an event."""

    email: Secret[str] | None = None
    phone: Secret[str] | None = None


class RelatedPerson(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """The Person that the session is about, and the connected account it belongs to: their ids."""

    account: str | None = None
    person: str | None = None


class VerifiedOutputs(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """What the checks verified about the person. Only if expanded, never in an event.

    `dob` and `id_number` also need a restricted key; of a `us_ssn` only four digits are kept.
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
    """The verification of one person, as an event or the API represents it.

    `status` is `requires_input`, `processing`, `verified` or `canceled`, and `type` is `document`,
    `id_number` or `verification_flow`; both may be newer words.

    `client_secret` opens the session in a browser or app, once, within 24 hours; `url` opens it on
    Stripe's page, once, within 48. Neither may be stored, logged or passed to anyone but the
    person. `metadata` and `client_reference_id` are yours; `repr` does not show them.
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
        """Read JSON, a mapping or the SDK's object; the ValueError for others holds no input."""
        return read(cls, source)

    @property
    def last_error_code(self) -> str | None:
        """The code of `last_error`, if any."""
        return self.last_error.code if self.last_error else None

    @property
    def redaction_status(self) -> str | None:
        """The status of `redaction`; None unless a redaction was requested."""
        return self.redaction.status if self.redaction else None

    @property
    def report_id(self) -> str | None:
        """The id of the latest report, whether the report is expanded or not."""
        report = self.last_verification_report
        return report.id if isinstance(report, VerificationReport) else report
