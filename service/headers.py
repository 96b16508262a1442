"""The few headers of a request that anybody here looks at, each only if it is as it should be.

What they mean is decided by who reads them.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterable

_REQUEST_ID = re.compile(rb"[0-9a-fA-F-]{8,64}")
# https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)

# What is made here is unique among processes, and cheap.
_PROCESS = secrets.token_hex(4)
_NUMBERS = itertools.count()


class Headers:
    """What a request's headers say.

    Attributes:
        signature: Stripe's, all lines of it.
        declared_bytes: How large the body is said to be; 0 when nothing is said.
        body_bytes: How large it was, once it is here.
        traceparent: Where in a trace the request was sent; None without a valid one.
    """

    def __init__(self, sent: Iterable[tuple[bytes, bytes]]) -> None:
        self.signature: bytes | None = None
        self.declared_bytes = 0
        self.body_bytes = 0
        self.traceparent: str | None = None
        self._request_id: str | None = None
        for name, value in sent:
            if name == b"stripe-signature":
                # Sent in several lines, they mean what they would mean joined (RFC 9110, 5.3).
                self.signature = value if self.signature is None else self.signature + b"," + value
            elif name == b"content-length" and value.isdigit():
                # Twenty digits tell too large from not; int() refuses thousands of them.
                self.declared_bytes = int(value[:20])
            elif name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                self._request_id = value.decode()
            elif name == b"traceparent" and (traced := _TRACEPARENT.fullmatch(value)):
                self.traceparent = traced[0].decode()
                self._request_id = self._request_id or traced[1].decode()

    @property
    def request_id(self) -> str:
        """The id given by whoever stands before us, else one made here."""
        if self._request_id is None:
            self._request_id = f"{_PROCESS}{next(_NUMBERS):08x}"
        return self._request_id
