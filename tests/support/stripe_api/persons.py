"""What the checks found out about a person, with a canary in every field that has room for one.

https://docs.stripe.com/api/identity/verification_reports/object
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .tokens import CANARY_NUMBERS, canary

REDACTED: Final = "[redacted]"
# Codes of errors that end a person's visit rather than a check: they come without a report.
VISIT_ERRORS: Final = frozenset(
    {
        *("abandoned", "consent_declined", "country_not_supported", "device_not_supported"),
        "under_supported_age",
    }
)
# What stays readable in a redacted object. Stripe may keep the country.
_KEPT: Final = frozenset({"country", "issuing_country", "status", "type", "code"})
_DATES: Final = frozenset({"dob", "expiration_date", "issued_date"})


def date(first: int) -> dict[str, int]:
    """Return a date of three canaries, counted from the number *first*."""
    day, month, year = CANARY_NUMBERS[first : first + 3]
    return {"day": day, "month": month, "year": year}


def address(word: str) -> dict[str, Any]:
    """Return an address."""
    names = ("city", "line1", "line2", "postal_code", "state")
    return {**{name: canary(f"{word}_{name}") for name in names}, "country": "US"}


def provided_details() -> dict[str, str]:
    """Return what the session's creator knew of the person."""
    return {"email": canary("given_email"), "phone": canary("given_phone")}


def verified_outputs() -> dict[str, Any]:
    """Return the `verified_outputs` of a session, with everything that can be expanded."""
    names = ("email", "first_name", "id_number", "last_name", "phone")
    unparsed = ("unparsed_place_of_birth", "unparsed_sex")
    return {
        "address": address("outputs"),
        "dob": date(0),
        **{name: canary(f"outputs_{name}") for name in (*names, *unparsed)},
        "id_number_type": "us_ssn",
        "sex": "female",
    }


def document_check(error: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the document's part of a report; with an error nothing was read."""
    texts = ("first_name", "last_name", "number", "unparsed_place_of_birth", "unparsed_sex")
    read: dict[str, Any] = {
        "address": address("document"),
        "dob": date(3),
        "expiration_date": date(6),
        "files": [canary("file_front"), canary("file_back")],
        "issued_date": date(9),
        "issuing_country": "US",
        "sex": "female",
        "type": "driving_license",
        **{name: canary(f"document_{name}") for name in texts},
    }
    if error:
        read = dict.fromkeys(read)
    return {**read, "error": error, "status": "unverified" if error else "verified"}


def selfie_check(error: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the selfie's part of a report; its values are ids of images."""
    return {
        "document": canary("file_selfie_document"),
        "error": error,
        "selfie": canary("file_selfie"),
        "status": "unverified" if error else "verified",
    }


def contact_check(name: str, value: str, error: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of a report about an `email` or a `phone`."""
    return {name: value, "error": error, "status": "unverified" if error else "verified"}


def id_number_check(error: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the id number's part of a report."""
    texts = ("first_name", "id_number", "last_name")
    return {
        "dob": date(12),
        "error": error,
        **{name: canary(f"id_number_{name}") for name in texts},
        "id_number_type": "us_ssn",
        "status": "unverified" if error else "verified",
    }


def redacted(found: Any, name: str = "") -> Any:
    """Return personal values as Stripe shows them after a redaction.

    Texts become `[redacted]`, dates the first day of the year 1, and what kind of id number it was
    is lost. https://docs.stripe.com/identity/verification-sessions#redact
    """
    if name in _DATES and found is not None:
        return {"day": 1, "month": 1, "year": 1}
    if name == "id_number_type":
        return None
    if isinstance(found, dict):
        return {key: redacted(value, key) for key, value in found.items()}
    if isinstance(found, list):
        return [redacted(value, name) for value in found]
    return REDACTED if isinstance(found, str) and name not in _KEPT else found
