"""Verifies the Stripe-Signature header: who sent these bytes, and when. Pure, without a clock.

Works on raw bytes, before anything is parsed; what the payload means is decided in `events`.
The scheme: https://docs.stripe.com/webhooks#verify-manually
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice

import msgspec

from ..errors import Rejected, RejectionReason
from ..secret import Secret

MAX_HEADER_BYTES = 4096
# A forged request costs one digest for each of these secrets.
MAX_OTHER_SECRETS = 16

# One item that counts: a timestamp without a second equals sign, or a well-formed v1 signature.
_ITEM = re.compile(rb"(?:\A|,) ?(?:t=([^=,]*)|v1=([0-9a-f]{64}))(?=,|\Z)")
_TIMESTAMP = re.compile(rb"0|[1-9][0-9]{0,11}")
# The form of nearly every header, in live mode and (with v0) in test mode.
_USUAL = re.compile(rb"t=(0|[1-9][0-9]{0,11}),v1=([0-9a-f]{64})(?:,v0=[0-9a-f]{64})?")


class VerifiedPayload(msgspec.Struct, frozen=True, gc=False):
    """A body whose signature is valid: only `verify` creates one, and `events.parse` requires one.

    Attributes:
        body: The request body, exactly as it was signed.
        secret_fingerprint: The `fingerprint` of the secret that matched.
    """

    body: bytes
    secret_fingerprint: str

    def __repr__(self) -> str:
        return f"VerifiedPayload({len(self.body)} bytes)"


def verify(
    body: bytes,
    header: bytes | None,
    secrets: Sequence[Secret[bytes]],
    *,
    now: float,
    tolerance_s: float,
    other_secrets: Iterable[Secret[bytes]] = (),
) -> VerifiedPayload:
    """Return *body* as a `VerifiedPayload` if *header* has a fresh signature by one of *secrets*.

    Args:
        body: The raw request body.
        header: The value of `Stripe-Signature` as received; None if there was none.
        secrets: Whole signing secrets, including `whsec_`; one match suffices.
        now: Unix time in seconds.
        tolerance_s: The largest difference between the timestamp and *now*, in both directions.
        other_secrets: Secrets of the other endpoints, tried when none of *secrets* matches: a
            sender that signed with one of them gets a reason of its own.

    Raises:
        Rejected: With `signature_missing`, `signature_malformed`, `signature_mismatch`,
            `signature_of_other_endpoint`, `timestamp_too_old` or `timestamp_too_new`. The age is
            checked last, so a forged old header is a mismatch.
    """
    if not header:
        raise Rejected(RejectionReason.SIGNATURE_MISSING)
    timestamp, signatures = _parse_header(header)
    signed = timestamp + b"." + body
    matched = _match(signed, signatures, secrets)
    if matched is None:
        if _match(signed, signatures, list(islice(other_secrets, MAX_OTHER_SECRETS))):
            raise Rejected(RejectionReason.SIGNATURE_OF_OTHER_ENDPOINT)
        raise Rejected(RejectionReason.SIGNATURE_MISMATCH)
    age_s = now - int(timestamp)
    if age_s > tolerance_s:
        raise Rejected(RejectionReason.TIMESTAMP_TOO_OLD)
    if age_s < -tolerance_s:
        raise Rejected(RejectionReason.TIMESTAMP_TOO_NEW)
    return VerifiedPayload(body, matched)


def sign(body: bytes, secret: Secret[bytes], timestamp: int) -> str:
    """Return the `Stripe-Signature` header value for *body* at *timestamp* (Unix seconds)."""
    signed = b"%d.%b" % (timestamp, body)
    return f"t={timestamp},v1={hmac.digest(secret.reveal(), signed, 'sha256').hex()}"


def fingerprint(secret: Secret[bytes]) -> str:
    """Return the name under which a secret may be logged: 8 hex digits of its SHA-256."""
    return _signing_key(secret)[1]


@lru_cache(maxsize=1024)
def _signing_key(secret: Secret[bytes]) -> tuple[hmac.HMAC, str]:
    """Return the HMAC state of a secret, to be copied for each body, and its fingerprint."""
    value = secret.reveal()
    return hmac.new(value, digestmod="sha256"), hashlib.sha256(value).hexdigest()[:8]


def _parse_header(header: bytes) -> tuple[bytes, list[bytes]]:
    """Return the timestamp and every well-formed v1 signature; other schemes are skipped."""
    if usual := _USUAL.fullmatch(header):
        return usual[1], [usual[2]]
    items = _ITEM.findall(header[:MAX_HEADER_BYTES])
    signatures = [signature for _, signature in items if signature]
    timestamps = {timestamp for timestamp, signature in items if not signature}
    timestamp = timestamps.pop() if len(timestamps) == 1 else b""
    if not signatures or not _TIMESTAMP.fullmatch(timestamp):
        raise Rejected(RejectionReason.SIGNATURE_MALFORMED)
    return timestamp, signatures


def _match(
    signed: bytes, signatures: Sequence[bytes], secrets: Sequence[Secret[bytes]]
) -> str | None:
    """Return the fingerprint of the secret that made one of *signatures*.

    Every pair is compared even after a match, so that the time taken reveals nothing.
    """
    matched: str | None = None
    for secret in secrets:
        key, name = _signing_key(secret)
        keyed = key.copy()
        keyed.update(signed)
        expected = keyed.hexdigest().encode()
        for signature in signatures:
            if hmac.compare_digest(expected, signature) and matched is None:
                matched = name
    return matched
