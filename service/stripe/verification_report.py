"""Stripe's VerificationReport, and the values that a VerificationSession has, too.

Every personal value is declared `Secret`. Nothing here knows events, Redis or the network.
"""

from __future__ import annotations

import msgspec

from ..secret import Secret
from .stripe_object import EpochSeconds, HiddenRepr, Source, read


class CheckError(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """Why a check or a session failed: a `code` for programs, a `reason` for people.

    `code` may be any text: `document_expired`, `id_number_mismatch`, `selfie_face_mismatch`,
    `consent_declined`, or a newer one.
    """

    shown = ("code",)

    code: str | None = None
    reason: Secret[str] | None = None


class Address(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """A postal address; `country` has two letters (ISO 3166-1) and may survive redaction."""

    city: Secret[str] | None = None
    country: Secret[str] | None = None
    line1: Secret[str] | None = None
    line2: Secret[str] | None = None
    postal_code: Secret[str] | None = None
    state: Secret[str] | None = None


class CalendarDate(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """A date in numbers, months from 1. A redacted date is day 1, month 1, year 1."""

    day: Secret[int] | None = None
    month: Secret[int] | None = None
    year: Secret[int] | None = None


class DocumentOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the document check requires; `allowed_types` as in `DocumentCheck.type`."""

    allowed_types: list[str] | None = None
    require_id_number: bool | None = None
    require_live_capture: bool | None = None
    require_matching_selfie: bool | None = None


class IdNumberOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the id number check requires: an object without any field so far."""


class ReportOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The options that the checks of a report were made with."""

    document: DocumentOptions | None = None
    id_number: IdNumberOptions | None = None


class DocumentCheck(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """What was read from an identity document.

    `type` is `driving_license`, `id_card`, `passport` or newer; `status` is `verified` or
    `unverified`; `files` are ids of images. Date of birth, expiry date, number, sex and the
    unparsed texts are present only if expanded, some of them only for a restricted key.
    """

    address: Address | None = None
    dob: CalendarDate | None = None
    error: CheckError | None = None
    expiration_date: CalendarDate | None = None
    files: Secret[list[str]] | None = None
    first_name: Secret[str] | None = None
    issued_date: CalendarDate | None = None
    issuing_country: Secret[str] | None = None
    last_name: Secret[str] | None = None
    number: Secret[str] | None = None
    sex: Secret[str] | None = None
    status: str | None = None
    type: str | None = None
    unparsed_place_of_birth: Secret[str] | None = None
    unparsed_sex: Secret[str] | None = None


class EmailCheck(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """Whether the person has access to an e-mail address."""

    email: Secret[str] | None = None
    error: CheckError | None = None
    status: str | None = None


class IdNumberCheck(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """Whether a government id number belongs to the given name and date of birth.

    `id_number_type` is `br_cpf`, `sg_nric`, `us_ssn` (only the last four digits) or newer.
    """

    dob: CalendarDate | None = None
    error: CheckError | None = None
    first_name: Secret[str] | None = None
    id_number: Secret[str] | None = None
    id_number_type: str | None = None
    last_name: Secret[str] | None = None
    status: str | None = None


class PhoneCheck(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """Whether the person has access to a phone number."""

    error: CheckError | None = None
    phone: Secret[str] | None = None
    status: str | None = None


class SelfieCheck(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """Whether a selfie shows the face on the document; both images are file ids."""

    document: Secret[str] | None = None
    error: CheckError | None = None
    selfie: Secret[str] | None = None
    status: str | None = None


class VerificationReport(HiddenRepr, frozen=True, kw_only=True, gc=False):
    """The result of one attempt, made when all its checks were done (`created`).

    A check that was not requested is None. `type` is `document`, `id_number`,
    `verification_flow` or newer. https://docs.stripe.com/api/identity/verification_reports/object
    """

    shown = ("id", "type", "verification_session", "livemode", "created")

    id: str | None = None
    object: str | None = None
    client_reference_id: str | None = None
    created: EpochSeconds | None = None
    document: DocumentCheck | None = None
    email: EmailCheck | None = None
    id_number: IdNumberCheck | None = None
    livemode: bool | None = None
    options: ReportOptions | None = None
    phone: PhoneCheck | None = None
    selfie: SelfieCheck | None = None
    type: str | None = None
    verification_flow: str | None = None
    verification_session: str | None = None

    @classmethod
    def from_json(cls, source: Source) -> VerificationReport:
        """Read JSON, a mapping or the SDK's object; the ValueError for others holds no input."""
        return read(cls, source)
