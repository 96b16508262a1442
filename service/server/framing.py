"""Which bytes are a request at all, and the responses to those that are not. Pure.

A request must have one reading only: a proxy in front of us that reads it in another way could be
made to smuggle a request in. It knows no connection and no clock: when a response is sent is
decided in `protocol` and `closing`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote

import httptools

from ..errors import RETRY_AFTER_S, RejectionReason, UnavailableReason

MAX_HEADER_BYTES = 32 * 1024
# A parsed header takes about 200 bytes, however short it is: their size alone bounds no memory.
MAX_HEADERS = 128
# Each chunk of a body costs a call, however small: beyond the first few they must average this.
MIN_CHUNK_BYTES = 128
MAX_SMALL_CHUNKS = 256


class FinalResponse(NamedTuple):
    """Why a connection ends, and the last bytes that are sent on it, if any."""

    reason: str
    content: bytes = b""


def _final_response(
    reason: str, status_line: str, error: str, more_headers: str = ""
) -> FinalResponse:
    body = f'{{"error":"{error}"}}'
    head = f"HTTP/1.1 {status_line}\r\ncontent-type: application/json\r\n"
    framing = f"content-length: {len(body)}\r\nconnection: close\r\n"
    return FinalResponse(reason, f"{head}{framing}{more_headers}\r\n{body}".encode())


MALFORMED = _final_response(
    RejectionReason.REQUEST_MALFORMED, "400 Bad Request", RejectionReason.REQUEST_MALFORMED
)
TOO_LARGE = _final_response(
    RejectionReason.HEADERS_TOO_LARGE,
    "431 Request Header Fields Too Large",
    RejectionReason.HEADERS_TOO_LARGE,
)
BUSY = _final_response(
    UnavailableReason.BUSY,
    "503 Service Unavailable",
    "unavailable",
    f"retry-after: {RETRY_AFTER_S}\r\n",
)
# The same for a request that is shed: the connection stays open.
SHED = BUSY.content.replace(b"connection: close\r\n", b"")
TOO_MANY_CHUNKS = _final_response(
    RejectionReason.TOO_MANY_CHUNKS, "400 Bad Request", RejectionReason.TOO_MANY_CHUNKS
)
TOO_SLOW = FinalResponse("too_slow")
IDLE = FinalResponse("idle")

_NAME = rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*"
_HOST = re.compile(rb"(?:%b|\[[A-Za-z0-9.:%%_~-]+\])(?::[0-9]*)?" % _NAME)


class CloseConnectionError(Exception):
    """Raised inside a callback of the parser, it ends the connection with a final response."""

    def __init__(self, final_response: FinalResponse) -> None:
        super().__init__(final_response.reason)
        self.final_response = final_response


def check_head(
    url: bytes, headers: Sequence[tuple[bytes, bytes]], version: str, *, received: int
) -> None:
    """Check the head of a request that the parser accepts.

    Args:
        url: As sent.
        headers: With names in lower case, and no whitespace around their values.
        version: The version of HTTP.
        received: The size of all that came, head and maybe more: an upper bound on the head's.

    Raises:
        CloseConnectionError: The head is too large; it has a transfer coding other than chunked; or
            it has no host, two of them, or an invalid one.
    """
    if received > MAX_HEADER_BYTES:
        size = len(url) + sum(len(name) + len(value) for name, value in headers)
        if size > MAX_HEADER_BYTES:
            raise CloseConnectionError(TOO_LARGE)
    values = dict(headers)
    if b"transfer-encoding" in values:
        codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
        if version == "1.0" or any(coding != b"chunked" for coding in codings):
            raise CloseConnectionError(MALFORMED)
    host = values.get(b"host")
    if host is None:
        if version != "1.0":
            raise CloseConnectionError(MALFORMED)
    elif not _is_host(host):
        raise CloseConnectionError(MALFORMED)
    if len(values) < len(headers) and sum(name == b"host" for name, _ in headers) > 1:
        raise CloseConnectionError(MALFORMED)


@lru_cache(maxsize=64)
def _is_host(value: bytes) -> bool:
    """Say whether *value* is a host and maybe a port (RFC 9110, 7.2); it may be empty."""
    return _HOST.fullmatch(value) is not None


@lru_cache(maxsize=64)
def split_url(url: bytes) -> tuple[str, bytes, bytes]:
    """Return the path of a request's URL, decoded and as sent, and its query.

    Nearly all requests have the same.

    Raises:
        CloseConnectionError: The URL is invalid, or has no path.
    """
    try:
        parsed = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError:
        raise CloseConnectionError(MALFORMED) from None
    path: bytes | None = parsed.path
    if path is None or not path.isascii():
        raise CloseConnectionError(MALFORMED)
    return unquote(path.decode()), path, parsed.query or b""


def without_upgrade(
    method: bytes, url: bytes, headers: Sequence[tuple[bytes, bytes]], version: str
) -> bytes:
    """Return the head of a request that offers an upgrade, without the offer.

    A server may ignore any offer (RFC 9110, 7.8). The parser takes all bytes after such a head,
    even the body, for another protocol, so the head has to be parsed again without the offer. It
    has passed the strict parser once: no name or value in it can end its line.

    Raises:
        CloseConnectionError: For CONNECT, and in HTTP/1.1 for an offer of anything but h2c.
    """
    offers = [value.lower() for name, value in headers if name == b"upgrade"]
    if method == b"CONNECT" or (version != "1.0" and offers != [b"h2c"]):
        raise CloseConnectionError(MALFORMED)
    kept = [b"%b: %b" % header for header in headers if header[0] != b"upgrade"]
    line = b"%b %b HTTP/%b" % (method, url, version.encode())
    return b"\r\n".join([line, *kept, b"", b""])
