"""The request headers that the service reads, each only if it is valid.

It does not know what they mean: signatures are verified in `stripe`, traces continued in
`telemetry`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_REQUEST_ID = re.compile(rb"[0-9a-fA-F-]{8,64}")
# https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


class Headers:
    """What a request's headers say.

    Attributes:
        signature: Stripe-Signature, all lines of it.
        content_length: The declared size of the body; 0 without a valid one.
        body_bytes: The actual size of the body, once it has been read.
        traceparent: The trace that the request belongs to; None without a valid one.
    """

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        values = _joined(raw)
        length = values.get(b"content-length", b"")
        request_id = values.get(b"x-request-id")
        parent = values.get(b"traceparent")
        traced = _TRACEPARENT.fullmatch(parent) if parent else None
        self.signature = values.get(b"stripe-signature")
        # Twenty digits are enough to see that it is too large; int() refuses thousands of them.
        self.content_length = int(length[:20]) if length.isdigit() else 0
        self.body_bytes = 0
        self.traceparent = traced[0].decode() if traced else None
        self._request_id: str | None = None
        if request_id and _REQUEST_ID.fullmatch(request_id):
            self._request_id = request_id.decode()
        elif traced:
            self._request_id = traced[1].decode()

    @property
    def request_id(self) -> str:
        """The load balancer's id of the request, else one of our own."""
        if self._request_id is None:
            self._request_id = f"{random.getrandbits(64):016x}"
        return self._request_id


def _joined(raw: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return header values by name; several lines of one name are joined (RFC 9110, 5.3)."""
    values = dict(raw)
    if len(values) < len(raw):
        values.clear()
        for name, value in raw:
            values[name] = values[name] + b"," + value if name in values else value
    return values
