"""What may leave in a log line: the second net under the allow lists of the log calls. Pure.

The first net is that secrets are `Secret`s and that log calls name their fields. Nothing here
knows structlog.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

from ..secret import MASK

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

# No word boundaries: whatever stands before a secret does not make it less of one. Repetitions
# are bounded where they could be tried from many places.
_SECRETS = re.compile(
    r"whsec_[!-~]*"
    r"|vs_[A-Za-z0-9_]{1,255}?_secret_[A-Za-z0-9_]*"
    r"|[sr]k_(?:live|test|org)_[A-Za-z0-9_]*"
    r"|v[01]=[0-9A-Fa-f]{16,}"
    r"|https://verify\.stripe\.com\S*"
)
_CREDENTIALS = re.compile(r"://[^@\s]{1,512}@")
# Control characters, and those that end a line or turn its direction on a terminal.
_UNRULY = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# What no secret, credential, control character or nested value can do without is not among these.
_EVERYDAY = (string.ascii_letters + string.digits + ' ",-.:_').encode()
_DEEPEST = 12
_MOST_CHARACTERS = 1000


def sanitize(fields: Mapping[Any, Any], depth: int = 0) -> dict[str, Any]:
    """Return *fields* fit for any renderer: names, numbers and short one-line texts only.

    Fields whose name says that they are secret or personal are masked; texts are scrubbed. Of an
    exception its class is told, of bytes their number: either may quote a request.
    """
    found = {}
    for key, value in fields.items():
        name, is_forbidden = _name(str(key))
        found[name] = MASK if is_forbidden else _sanitize_value(value, depth + 1)
    return found


def is_clean(line: bytes, keys: tuple[Any, ...]) -> bool:
    """Say whether a flat JSON object is what `sanitize` would make of it: the usual case.

    Args:
        line: The object, encoded.
        keys: Its keys.
    """
    # Whatever has to be mended holds a character that is not among these, or has its own word.
    return (
        0 < len(line) < _MOST_CHARACTERS
        and not line[1:-1].translate(None, _EVERYDAY)
        # Not `in`, which for bytes tries each as a number first, and costs twice as much.
        and line.find(b"k_") < 0
        and line.find(b"whsec_") < 0
        and line.find(b"_secret_") < 0
        and _are_plain(keys)
    )


@lru_cache(maxsize=1024)
def _are_plain(keys: tuple[Any, ...]) -> bool:
    """Say whether keys may stand as they are."""
    return all(isinstance(key, str) and _name(key) == (key, False) for key in keys)


def scrub(text: str) -> str:
    """Return *text* without anything that looks like a secret, wherever it stands."""
    return _CREDENTIALS.sub(f"://{MASK}@", _SECRETS.sub(MASK, text))


def one_line(text: str) -> str:
    r"""Return *text* with what could break or turn a line escaped, as in Python: `\n`."""
    if text.isprintable():
        return text
    encodable = text.encode(errors="backslashreplace").decode()
    return _UNRULY.sub(lambda found: ascii(found[0])[1:-1], encodable)


def _text(text: str) -> str:
    # Cut twice: whatever begins in the part that stays must be whole while it is looked at.
    return one_line(scrub(text[: 2 * _MOST_CHARACTERS])[:_MOST_CHARACTERS])


@lru_cache(maxsize=1024)
def _name(key: str) -> tuple[str, bool]:
    """Return a key's text, and whether it is forbidden."""
    return _text(key), key.lower().replace("-", "_") in FORBIDDEN_KEYS


def _sanitize_value(value: object, depth: int) -> Any:
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool | float | datetime):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < 64 else f"{value.bit_length()} bits"  # noqa: PLR2004
    if isinstance(value, dict) and depth < _DEEPEST:
        return sanitize(value, depth)
    if (type(value) is list or type(value) is tuple) and depth < _DEEPEST:
        return [_sanitize_value(each, depth + 1) for each in value]
    return _described(value)


def _described(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"
    if not isinstance(value, BaseException):
        with suppress(Exception):
            return _text(repr(value))
    return type(value).__name__
