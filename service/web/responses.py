"""The responses of the webhook path: which outcome is which status code.

The few responses to bytes that are no valid request are in `server.framing`.
"""

from __future__ import annotations

from functools import lru_cache

import orjson
from starlette.types import Message, Send

from ..errors import RETRY_AFTER_S, Rejected, RejectionReason, Unavailable
from ..inbox.receiver import Receipt

# Every other reason is a 400.
STATUS_CODES = {
    RejectionReason.BODY_TOO_LARGE: 413,
    RejectionReason.SOURCE_NOT_ALLOWED: 403,
    RejectionReason.ENDPOINT_UNKNOWN: 404,
    RejectionReason.TRAILING_SLASH: 404,
}


async def respond(send: Send, result: Receipt | Rejected | Unavailable) -> None:
    """Send the response to a request that ended in *result*."""
    if isinstance(result, Receipt):
        start, body = _response(200, "outcome", result.outcome)
    elif isinstance(result, Unavailable):
        start, body = _response(503, "error", "unavailable")
    else:
        status = STATUS_CODES.get(result.reason, 400)
        start, body = _response(status, "error", result.reason, result.field)
    await send(start)
    await send(body)


@lru_cache(maxsize=1024)
def _response(
    status: int, key: str, word: str, field: str | None = None
) -> tuple[Message, Message]:
    """Return a response, ready to be sent: there are few, since words and fields are lists."""
    body = orjson.dumps({key: word} if field is None else {key: word, "field": field})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 503:  # noqa: PLR2004 - HTTP's own number
        headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
    start = {"type": "http.response.start", "status": status, "headers": headers}
    return start, {"type": "http.response.body", "body": body}
