"""What may be a request at all, and the answers where there is none to route.

A request has to be readable in one way only. Pure: no connection, no clock. Who is told what, and
when, is `protocol`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from .errors import RETRY_AFTER_S, Refusal, Shortage

MOST_HEADER_BYTES = 32 * 1024


class Farewell(NamedTuple):
    """Why a connection ends, and what is answered before, if anything."""

    reason: str
    answer: bytes = b""


def _farewell(reason: str, status_line: str, word: str, more: str = "") -> Farewell:
    body = f'{{"error":"{word}"}}'
    head = f"HTTP/1.1 {status_line}\r\ncontent-type: application/json\r\n"
    framing = f"content-length: {len(body)}\r\nconnection: close\r\n"
    return Farewell(reason, f"{head}{framing}{more}\r\n{body}".encode())


MALFORMED = _farewell(Refusal.REQUEST_MALFORMED, "400 Bad Request", Refusal.REQUEST_MALFORMED)
TOO_LARGE = _farewell(
    Refusal.HEADERS_TOO_LARGE, "431 Request Header Fields Too Large", Refusal.HEADERS_TOO_LARGE
)
BUSY = _farewell(
    Shortage.BUSY,
    "503 Service Unavailable",
    "unavailable",
    f"retry-after: {RETRY_AFTER_S}\r\n",
)
# The same, where the connection stays.
NOT_NOW = BUSY.answer.replace(b"connection: close\r\n", b"")
# What decides where a request ends, and whether its connection does.
_FRAMING = re.compile(
    rb"\r\n(?i:content-length|transfer-encoding|connection|expect|upgrade):[ \t]*([^\r]*)"
)
TOO_SLOW = Farewell("too_slow")
IDLE = Farewell("idle")


class RefusedError(Exception):
    """Raised into the parser, it ends the connection with a farewell."""

    def __init__(self, farewell: Farewell) -> None:
        super().__init__(farewell.reason)
        self.farewell = farewell


def is_whole_post(data: bytes) -> bool:
    """Say whether *data* is one POST with its body, no more and no less, and plainly so."""
    end_of_line = data.find(b"\r\n")
    if not (data.startswith(b"POST ") and data.endswith(b" HTTP/1.1", 0, end_of_line)):
        return False
    end = data.find(b"\r\n\r\n") + 4
    return _FRAMING.findall(data, 0, end) == [b"%d" % (len(data) - end)]


def examine(
    url: bytes, headers: Sequence[tuple[bytes, bytes]], version: str, received: int
) -> bool:
    """Say whether the client waits to be told to send the body.

    Args:
        url: As sent.
        headers: With names in lower case.
        version: HTTP's.
        received: The bytes in which all this came, and perhaps more: only where they are many
            need anybody count.

    Raises:
        RefusedError: Headers beyond the cap, a coding nobody here decodes, two hosts or none.
    """
    if received > MOST_HEADER_BYTES:
        size = len(url) + sum(map(len, chain.from_iterable(headers)))
        if size > MOST_HEADER_BYTES:
            raise RefusedError(TOO_LARGE)
    names = dict(headers)
    if b"transfer-encoding" in names:
        for name, value in headers:
            is_chunked = value.strip().lower() == b"chunked" and version != "1.0"
            if name == b"transfer-encoding" and not is_chunked:
                raise RefusedError(MALFORMED)
    if b"host" not in names:
        if version == "1.1":
            raise RefusedError(MALFORMED)
    elif len(names) < len(headers) and sum(name == b"host" for name, _ in headers) > 1:
        raise RefusedError(MALFORMED)
    if b"expect" not in names:
        return False
    return any(name == b"expect" and value.lower() == b"100-continue" for name, value in headers)
