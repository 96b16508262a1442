"""What may be a request at all, and the answers where there is none to route.

A request has to be readable in one way only. Pure: no connection, no clock. Who is told what, and
when, is `protocol`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from ..errors import RETRY_AFTER_S, RejectionReason, UnavailableReason

MAX_HEADER_BYTES = 32 * 1024
# Parsed, a header of a few bytes takes 200: their bytes alone bound no memory.
MAX_HEADERS = 128
# Each chunk of a body costs a call, however small: beyond the first few they must average this.
MIN_CHUNK_BYTES = 128
MAX_SMALL_CHUNKS = 256


class Farewell(NamedTuple):
    """Why a connection ends, and what is answered before, if anything."""

    reason: str
    answer: bytes = b""


def _farewell(reason: str, status_line: str, word: str, more: str = "") -> Farewell:
    body = f'{{"error":"{word}"}}'
    head = f"HTTP/1.1 {status_line}\r\ncontent-type: application/json\r\n"
    framing = f"content-length: {len(body)}\r\nconnection: close\r\n"
    return Farewell(reason, f"{head}{framing}{more}\r\n{body}".encode())


MALFORMED = _farewell(
    RejectionReason.REQUEST_MALFORMED, "400 Bad Request", RejectionReason.REQUEST_MALFORMED
)
TOO_LARGE = _farewell(
    RejectionReason.HEADERS_TOO_LARGE,
    "431 Request Header Fields Too Large",
    RejectionReason.HEADERS_TOO_LARGE,
)
BUSY = _farewell(
    UnavailableReason.BUSY,
    "503 Service Unavailable",
    "unavailable",
    f"retry-after: {RETRY_AFTER_S}\r\n",
)
# The same, where the connection stays.
SHED = BUSY.answer.replace(b"connection: close\r\n", b"")
TOO_MANY_CHUNKS = _farewell(
    RejectionReason.TOO_MANY_CHUNKS, "400 Bad Request", RejectionReason.TOO_MANY_CHUNKS
)
TOO_SLOW = Farewell("too_slow")
IDLE = Farewell("idle")

_NAME = rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*"
_HOST = re.compile(rb"(?:%b|\[[A-Za-z0-9.:%%_~-]+\])(?::[0-9]*)?" % _NAME)


class RefusedError(Exception):
    """Raised into the parser, it ends the connection with a farewell."""

    def __init__(self, farewell: Farewell) -> None:
        super().__init__(farewell.reason)
        self.farewell = farewell


def examine(
    url: bytes, headers: Sequence[tuple[bytes, bytes]], version: str, received: int
) -> bool:
    """Say whether the client waits to be told to send the body.

    Args:
        url: As sent.
        headers: With names in lower case, and no whitespace around their values.
        version: HTTP's.
        received: The bytes in which all this came, and perhaps more: only where they are many
            need anybody count.

    Raises:
        RefusedError: Headers beyond the cap; a transfer coding other than chunked; no host, two of
            them, or an invalid one.
    """
    if received > MAX_HEADER_BYTES:
        size = len(url) + sum(map(len, chain.from_iterable(headers)))
        if size > MAX_HEADER_BYTES:
            raise RefusedError(TOO_LARGE)
    names = dict(headers)
    if b"transfer-encoding" in names:
        for name, value in headers:
            is_chunked = value.lower() == b"chunked" and version != "1.0"
            if name == b"transfer-encoding" and not is_chunked:
                raise RefusedError(MALFORMED)
    if not (_is_host(names[b"host"]) if b"host" in names else version == "1.0"):
        raise RefusedError(MALFORMED)
    if len(names) < len(headers) and sum(name == b"host" for name, _ in headers) > 1:
        raise RefusedError(MALFORMED)
    if b"expect" not in names:
        return False
    return any(name == b"expect" and value.lower() == b"100-continue" for name, value in headers)


@lru_cache(maxsize=64)
def _is_host(value: bytes) -> bool:
    """Say whether *value* is a host and maybe a port (RFC 9110, 7.2); it may be empty."""
    return _HOST.fullmatch(value) is not None


def without_upgrade(
    method: bytes, url: bytes, headers: Sequence[tuple[bytes, bytes]], version: str
) -> bytes:
    """Return the head of a request that offers an upgrade, written without the offer.

    A server may ignore any offer (RFC 9110, 7.8). The parser takes everything after such a head,
    even the body, for another protocol, so the request has to be parsed again without the offer.
    It has been parsed strictly once: no name or value can end its line.

    Raises:
        RefusedError: For CONNECT, and in HTTP/1.1 for an offer of anything but h2c.
    """
    offers = [value.lower() for name, value in headers if name == b"upgrade"]
    if method == b"CONNECT" or (version != "1.0" and offers != [b"h2c"]):
        raise RefusedError(MALFORMED)
    kept = [b"%b: %b" % header for header in headers if header[0] != b"upgrade"]
    line = b"%b %b HTTP/%b" % (method, url, version.encode())
    return b"\r\n".join([line, *kept, b"", b""])
