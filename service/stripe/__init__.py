"""Stripe's data, without I/O: signed bytes become a verified event and a typed session."""

from .verification_report import VerificationReport
from .verification_session import VerificationSession

__all__ = ["VerificationReport", "VerificationSession"]
