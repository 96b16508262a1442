"""What may leave in a log line: the second net under the allow lists of the log calls. Pure.

The first net is that secrets are `Secret`s and that log calls name their fields. Nothing here
knows structlog.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from .secret import MASK

FORBIDDEN_KEYS = frozenset(
    {
        "address",
        "authorization",
        "body",
        "client_secret",
        "date_of_birth",
        "dob",
        "email",
        "first_name",
        "id_number",
        "last_name",
        "metadata",
        "name",
        "number",
        "password",
        "payload",
        "phone",
        "provided_details",
        "secret",
        "sex",
        "stripe_signature",
        "url",
        "verified_outputs",
    }
)

# One cheap look for these decides whether the expressions run at all.
_TELLTALES = (b"whsec_", b"_secret_", b"sk_", b"rk_", b"://", b"v1=")
_SECRETS = re.compile(
    rb"whsec_[!-\[\]-~]*"
    rb"|vs_[A-Za-z0-9_]*_secret_[A-Za-z0-9_]*"
    rb"|\b[sr]k_(?:live|test)_[A-Za-z0-9_]*"
    rb"|\bv[0-9]=[0-9a-f]{16,}"
)
_CREDENTIALS = re.compile(rb"(://)[^/@\s\"]*@")
_LINKS = re.compile(rb"https://verify\.stripe\.com[^\s\"\\]*")


def drop_forbidden(fields: MutableMapping[str, object]) -> None:
    """Mask the values of fields whose name says that they are secret or personal."""
    for key in FORBIDDEN_KEYS & fields.keys():
        fields[key] = MASK


def scrub(line: bytes) -> bytes:
    """Return *line* without anything that looks like a secret, wherever it stands."""
    if not any(telltale in line for telltale in _TELLTALES):
        return line
    mask = MASK.encode()
    line = _SECRETS.sub(mask, line)
    line = _LINKS.sub(mask, line)
    return _CREDENTIALS.sub(rb"\1" + mask + b"@", line)
