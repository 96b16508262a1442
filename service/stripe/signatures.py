"""Stripe-Signature: who sent these bytes, and when. Pure: no clock, no environment, no request.

Everything happens on raw bytes, before anything is parsed. What the payload means lives in
`events`. The scheme: https://docs.stripe.com/webhooks#verify-manually
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import msgspec

from ..errors import Rejected, RejectionReason
from ..secret import Secret

HEADER_BYTES_LOOKED_AT = 4096
ITEMS_LOOKED_AT = 64
# Each forged request costs a digest for every one of them.
OTHER_SECRETS_LOOKED_AT = 16

# One item of a scheme we know: a timestamp, with no second equals sign, or a well-formed v1.
_ITEM = re.compile(rb"(?:\A|,) ?(?:t=([^=,]*)|v1=([0-9a-f]{64}))(?=,|\Z)")
_TIMESTAMP = re.compile(rb"0|[1-9][0-9]{0,11}")
# What nearly every header looks like, in the live world and in test mode.
_USUAL = re.compile(rb"t=(0|[1-9][0-9]{0,11}),v1=([0-9a-f]{64})(?:,v0=[0-9a-f]{64})?")


class VerifiedPayload(msgspec.Struct, frozen=True, gc=False):
    """Bytes that `verify` has accepted. Nothing else makes one, and `events.parse` takes no less.

    Attributes:
        body: The request body, exactly as it was signed.
        secret_fingerprint: Which of the configured secrets matched, as `fingerprint` names it.
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
    """Return *body* as proven, when *header* holds a fresh signature by one of *secrets*.

    Args:
        body: The raw request body.
        header: The value of `Stripe-Signature` as received; None when there was none.
        secrets: Whole signing secrets, `whsec_` included; any match suffices.
        now: Unix time in seconds.
        tolerance_s: How far the timestamp may lie from *now*, on either side.
        other_secrets: Secrets of the other endpoints, tried when none of *secrets* matches: a
            sender that signed with one of them gets a reason of its own.

    Raises:
        Rejected: With `signature_missing`, `signature_malformed`, `signature_mismatch`,
            `signature_of_other_endpoint`, `timestamp_too_old` or `timestamp_too_new`. A mismatch
            wins over age, so a forged old header is a mismatch.
    """
    if not header:
        raise Rejected(RejectionReason.SIGNATURE_MISSING)
    timestamp, signatures = _split(header)
    signed = timestamp + b"." + body
    matched = _match(signed, signatures, secrets)
    if matched is None:
        tried = list(islice(other_secrets, OTHER_SECRETS_LOOKED_AT))
        is_others = _match(signed, signatures, tried) is not None
        raise Rejected(
            RejectionReason.SIGNATURE_OF_OTHER_ENDPOINT
            if is_others
            else RejectionReason.SIGNATURE_MISMATCH
        )
    age_s = now - int(timestamp)
    if age_s > tolerance_s:
        raise Rejected(RejectionReason.TIMESTAMP_TOO_OLD)
    if age_s < -tolerance_s:
        raise Rejected(RejectionReason.TIMESTAMP_TOO_NEW)
    return VerifiedPayload(body, matched.fingerprint)


def sign(body: bytes, secret: Secret[bytes], timestamp: int) -> str:
    """Return the `Stripe-Signature` header value for *body* at *timestamp* (Unix seconds)."""
    signed = b"%d.%b" % (timestamp, body)
    return f"t={timestamp},v1={hmac.digest(secret.reveal(), signed, 'sha256').hex()}"


def fingerprint(secret: Secret[bytes]) -> str:
    """Return the name under which a secret may be logged: the first 8 hex of its SHA-256."""
    return _signing_key(secret).fingerprint


class _SigningKey(NamedTuple):
    """A secret with its HMAC begun, so that no body has to begin it anew."""

    keyed: hmac.HMAC
    fingerprint: str

    def __repr__(self) -> str:
        return f"_SigningKey({self.fingerprint})"


@lru_cache(maxsize=1024)
def _signing_key(secret: Secret[bytes]) -> _SigningKey:
    value = secret.reveal()
    keyed = hmac.new(value, digestmod="sha256")
    return _SigningKey(keyed, hashlib.sha256(value).hexdigest()[:8])


def _split(header: bytes) -> tuple[bytes, list[bytes]]:
    """Return the timestamp as sent and every well-formed v1; other schemes count for nothing."""
    usual = _USUAL.fullmatch(header)
    if usual:
        return usual[1], [usual[2]]
    looked_at = header[:HEADER_BYTES_LOOKED_AT]
    if looked_at.count(b",") >= ITEMS_LOOKED_AT:
        looked_at = b",".join(looked_at.split(b",", ITEMS_LOOKED_AT)[:ITEMS_LOOKED_AT])
    timestamps: set[bytes] = set()
    signatures: list[bytes] = []
    for timestamp, signature in _ITEM.findall(looked_at):
        if signature:
            signatures.append(signature)
        else:
            timestamps.add(timestamp)
    if len(timestamps) != 1 or not signatures:
        raise Rejected(RejectionReason.SIGNATURE_MALFORMED)
    timestamp = timestamps.pop()
    if not _TIMESTAMP.fullmatch(timestamp):
        raise Rejected(RejectionReason.SIGNATURE_MALFORMED)
    return timestamp, signatures


def _match(
    signed: bytes, signatures: Sequence[bytes], secrets: Sequence[Secret[bytes]]
) -> _SigningKey | None:
    """Return the key that made one of *signatures*, trying every pair whatever matches."""
    matched: _SigningKey | None = None
    for secret in secrets:
        key = _signing_key(secret)
        keyed = key.keyed.copy()
        keyed.update(signed)
        expected = keyed.hexdigest().encode()
        for signature in signatures:
            if hmac.compare_digest(expected, signature) and matched is None:
                matched = key
    return matched
