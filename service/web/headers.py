"""The few headers of a request that anybody here looks at, each only if it is as it should be.

What they mean is decided by who reads them.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Sequence

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

    def __init__(self, sent: Sequence[tuple[bytes, bytes]]) -> None:
        found = _joined(sent)
        length = found.get(b"content-length", b"")
        request_id = found.get(b"x-request-id")
        parent = found.get(b"traceparent")
        traced = _TRACEPARENT.fullmatch(parent) if parent else None
        self.signature = found.get(b"stripe-signature")
        # Twenty digits tell too large from not; int() refuses thousands of them.
        self.declared_bytes = int(length[:20]) if length.isdigit() else 0
        self.body_bytes = 0
        self.traceparent = traced[0].decode() if traced else None
        self._request_id: str | None = None
        if request_id and _REQUEST_ID.fullmatch(request_id):
            self._request_id = request_id.decode()
        elif traced:
            self._request_id = traced[1].decode()

    @property
    def request_id(self) -> str:
        """The id given by whoever stands before us, else one made here."""
        if self._request_id is None:
            self._request_id = f"{_PROCESS}{next(_NUMBERS):08x}"
        return self._request_id


def _joined(sent: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name; sent in several lines, one means those joined (RFC 9110, 5.3)."""
    found = dict(sent)
    if len(found) < len(sent):
        found.clear()
        for name, value in sent:
            found[name] = found[name] + b"," + value if name in found else value
    return found
